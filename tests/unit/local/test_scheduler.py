"""The local back end with real processes: order, resume, servers, failures, signals, kill -9."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.errors import EgmError, UserError
from grounding.local.gpus import gpus_of
from grounding.local.process import Found, claim_port, start_ticks, survivors
from grounding.local.runs import RoleState, read_state, tail, write_state
from grounding.local.scheduler import (
    LocalRun,
    ModelSource,
    PlannedJob,
    digest,
    first_error,
    locked,
    ordered,
    write_manifest,
)
from grounding.roles import Layout, Probe, Role

SERVER = """
import http.server, os, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", int(os.environ["EGM_PORT"])), H).serve_forever()
"""


def python(code: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", textwrap.dedent(code), *args)


def task(code: str = "", name: str = "work", after: Sequence[str] = (), **more: object) -> Role:
    return Role(name=name, argv=python(code), after=tuple(after), **more)  # type: ignore[arg-type]


def server(code: str = SERVER, name: str = "server", **more: object) -> Role:
    probe = Probe("/health", timeout_s=20)
    return Role(name=name, kind="server", argv=python(code), ports={"http": 0}, probe=probe, **more)  # type: ignore[arg-type]


def work(name: str, *roles: Role, upstream: str = "", lr: float = 1.0, kind: str = "GroundingTrainJob") -> PlannedJob:
    document = {"kind": kind, "metadata": {"name": name}, "spec": {"lr": lr}}
    return PlannedJob(name, kind, document, lambda layout: roles, (ModelSource(upstream),))


def go(run_dir: Path, *works: PlannedJob, only: str = "", grace: float = 2.0, **more: object) -> LocalRun:
    run = LocalRun(run_dir, works, grace=grace, gpu_ids=[], **more)  # type: ignore[arg-type]
    lock = locked(run_dir)
    try:
        run.check()
        manifest = run_dir.parent / "m.yaml"
        manifest.write_text("x")
        run.prepare_folders(manifest)
        try:
            asyncio.run(run.run(only))
        except BaseExceptionGroup as e:
            raise first_error(e) from None
    finally:
        lock.release()
    return run


def alive(pid: int) -> bool:
    return start_ticks(pid) > 0


def eventually(what: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "the expected state was not reached in time"
        time.sleep(0.05)


def test_jobs_run_in_order_and_are_skipped_when_done(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "demo"
    trace = tmp_path / "trace"
    note = f"open({str(trace)!r}, 'a').write("
    works = [
        work("late", task(f"{note}'late ')"), upstream="early"),
        work("early", task(f"{note}'one ')", "prepare"), task(f"{note}'two ')", "sft", after=["prepare"])),
    ]
    run = go(run_dir, *works)
    assert run.exit_code == 0
    assert trace.read_text() == "one two late "
    assert {s.phase for s in run.states.values()} == {"Succeeded"}
    assert [r.exit_code for r in run.states["early"].roles] == [0, 0]
    again = go(run_dir, *works)
    assert again.skipped == {"early", "late"}
    assert trace.read_text() == "one two late "


def test_a_job_that_is_done_runs_again_if_what_it_reads_has_changed(tmp_path: Path) -> None:
    rows, pictures, trace = tmp_path / "rows.json", tmp_path / "img", tmp_path / "trace"
    rows.write_text("[1]")
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"one")
    job = replace(work("a", task(f"open({str(trace)!r}, 'a').write('x')")), inputs=(str(rows), str(pictures)))

    def runs() -> int:
        before = len(trace.read_text()) if trace.exists() else 0
        run = go(tmp_path / "demo", job)
        assert run.skipped == ({"a"} if len(trace.read_text()) == before else set())
        return len(trace.read_text()) - before

    assert [runs(), runs()] == [1, 0]
    before = (pictures / "a.png").stat()
    (pictures / "a.png").write_bytes(b"two")
    os.utime(pictures / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time are the same
    assert [runs(), runs()] == [1, 0]
    (tmp_path / "other.json").write_text("[2]")
    (tmp_path / "other.json").rename(rows)
    assert [runs(), runs()] == [1, 0]
    assert not (tmp_path / "demo" / "previous").exists(), (
        "expected no folder `previous`: only the roles may move the earlier work"
    )


def test_a_changed_upstream_runs_both_anew_and_keeps_the_earlier_work(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    keep = task("import pathlib, sys; pathlib.Path('x')")
    go(run_dir, work("a", keep), work("b", keep, upstream="a"), work("c", keep))
    (run_dir / "a" / "model").write_text("old")
    run = go(run_dir, work("a", keep, lr=2.0), work("b", keep, upstream="a"), work("c", keep))
    assert run.skipped == {"c"}
    assert (run_dir / "previous" / "a-1" / "model").read_text() == "old"
    assert not (run_dir / "a" / "model").exists()
    assert (run_dir / "previous" / "b-1").is_dir()


def test_a_change_that_is_allowed_continues_begun_work_and_another_one_starts_anew(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def job(lr: float, begun: str, done: str, code: int = 0) -> PlannedJob:
        role = task(f"open({str(trace)!r}, 'a').write('x'); raise SystemExit({code})")
        return replace(work("a", role, lr=lr), begun=begun, done=done)

    def aside() -> int:
        return len(list((tmp_path / "demo" / "previous").glob("a-*")))

    go(tmp_path / "demo", job(1.0, "b", "d1", code=1))
    go(tmp_path / "demo", job(2.0, "b", "d2", code=1))
    assert aside() == 0, "expected that an unfinished training continues with the new learning rate"
    go(tmp_path / "demo", job(3.0, "b", "d3"))
    assert (aside(), trace.read_text()) == (0, "xxx")
    go(tmp_path / "demo", job(4.0, "b", "d3"))
    assert (aside(), trace.read_text()) == (0, "xxxx"), (
        "expected that the job runs again and keeps its work: only the place of the output has changed"
    )
    go(tmp_path / "demo", job(5.0, "b", "d5"))
    assert aside() == 1, "expected that the finished model is set aside: it was trained with another learning rate"
    go(tmp_path / "demo", job(6.0, "c", "d6", code=1))
    go(tmp_path / "demo", job(7.0, "e", "d7"))
    assert aside() == 3


def test_a_failed_job_says_why_and_only_its_dependants_wait(tmp_path: Path) -> None:
    run = go(
        tmp_path / "demo",
        work("bad", task("print('the disk is on fire'); raise SystemExit(3)")),
        work("child", task(), upstream="bad"),
        work("other", task()),
    )
    assert run.exit_code == 1
    assert run.states["bad"].phase == "Failed"
    assert "exit code 3" in run.states["bad"].message
    assert "the disk is on fire" in run.states["bad"].message
    assert str(tmp_path / "demo" / "bad" / "logs" / "work.log") in run.states["bad"].message
    assert run.states["child"].phase == "Pending"
    assert run.states["other"].phase == "Succeeded"
    fixed = go(tmp_path / "demo", work("bad", task()), work("child", task(), upstream="bad"), work("other", task()))
    assert fixed.exit_code == 0
    assert fixed.states["bad"].attempt == 2
    log = (tmp_path / "demo" / "bad" / "logs" / "work.log").read_text()
    assert "--- attempt 1," in log and "--- attempt 2," in log


def test_a_role_that_blames_the_user_passes_exit_code_2_on(tmp_path: Path) -> None:
    run = go(tmp_path / "demo", work("a", task("raise SystemExit(2)")))
    assert "its role work ended with exit code 2" in run.states["a"].message
    assert run.exit_code == 2
    assert run.states["a"].reason == "UserError"


def test_a_server_is_ready_before_its_client_and_gone_after_it(tmp_path: Path) -> None:
    client = """
    import os, urllib.request
    urls = os.environ["EGM_ENDPOINTS"].split(",")
    assert len(urls) == 2, urls
    for url in urls:
        print(urllib.request.urlopen(url + "/x", timeout=5).read())
    """
    run = go(
        tmp_path / "demo",
        work("eval", server(replicas=2), task(client, "evaluate", after=["server"]), kind="GroundingEvalJob"),
    )
    assert run.states["eval"].phase == "Succeeded", run.states["eval"].message
    assert tail(tmp_path / "demo" / "eval" / "logs" / "evaluate.log", 2) == ["b'ok'", "b'ok'"]
    servers = [r for r in run.states["eval"].roles if r.kind == "server"]
    assert {r.phase for r in servers} == {"Stopped"} and len({r.port for r in servers}) == 2
    assert not any(alive(r.pid) for r in servers)


def test_servers_and_their_clients_share_a_key_that_no_file_holds(tmp_path: Path) -> None:
    code = "import os; assert os.environ['EGM_API_KEY'] == os.environ['EGM_API_KEY'].strip() != ''\n" + SERVER
    code = code.replace('b"ok"', 'os.environ["EGM_API_KEY"].encode()')
    client = """
    import hashlib, os, urllib.request
    keys = {urllib.request.urlopen(url + "/x", timeout=5).read() for url in os.environ["EGM_ENDPOINTS"].split(",")}
    assert keys == {os.environ["EGM_API_KEY"].encode()}, "one key a job"
    open(os.environ["TOLD"], "w").write(os.environ["EGM_API_KEY"])
    """
    alone = "import os; assert 'EGM_API_KEY' not in os.environ"
    told = tmp_path / "told"
    roles = (server(code, replicas=2), task(client, "evaluate", ["server"], env={"TOLD": str(told)}), task(alone))
    run = go(tmp_path / "demo", work("eval", *roles, kind="GroundingEvalJob"))
    assert run.states["eval"].phase == "Succeeded", run.states["eval"].message
    key = told.read_text()
    assert len(key) >= 43
    assert not [p for p in (tmp_path / "demo").rglob("*") if p.is_file() and key in p.read_text(errors="replace")]


def test_servers_one_after_the_other_use_the_same_gpus_and_each_task_has_its_own(tmp_path: Path) -> None:
    """In a sweep over models, the first model's servers end before the second model's servers start."""
    code = "import os; open(os.environ['TOLD'], 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n" + SERVER
    client = """
    import os, socket, urllib.parse, urllib.request
    [url] = os.environ["EGM_ENDPOINTS"].split(",")
    print(urllib.request.urlopen(url + "/x", timeout=5).read(), url)
    """
    told = {"TOLD": str(tmp_path / "told")}
    roles = (
        server(code, "server-a", gpus=2, env=told),
        task(client, "evaluate-a", after=["server-a"]),
        server(code, "server-b", gpus=2, env=told, after=("evaluate-a",)),
        task(client, "evaluate-b", after=["server-b"]),
    )
    assert gpus_of(roles) == 2
    assert gpus_of((*roles[:2], replace(roles[2], after=()), roles[3])) == 4  # these servers run at the same time
    run = LocalRun(tmp_path / "demo", [work("eval", *roles, kind="GroundingEvalJob")], grace=2.0, gpu_ids=["0", "1"])
    run.check()
    asyncio.run(run.run())
    assert run.states["eval"].phase == "Succeeded", run.states["eval"].message
    assert (tmp_path / "told").read_text().split() == ["0,1", "0,1"]
    a, _, b, _ = run.states["eval"].roles
    assert (a.name, b.name) == ("server-a", "server-b") and 0 < a.finished_at <= b.started_at
    logs = [tail(tmp_path / "demo/eval/logs" / f"evaluate-{x}.log", 1)[0] for x in "ab"]
    assert [line.split()[1].rpartition(":")[2] for line in logs] == [str(a.port), str(b.port)]


@pytest.mark.parametrize("after", ["", "import time, threading\nthreading.Timer(0.5, lambda: os._exit(7)).start()\n"])
def test_a_server_that_dies_fails_the_job_with_its_own_words(tmp_path: Path, after: str) -> None:
    code = "import os, sys\nprint('no such model: foo', flush=True)\n" + (after + SERVER if after else "sys.exit(7)")
    client = task("import time; time.sleep(30)", "evaluate", after=["server"])
    began = time.monotonic()
    run = go(tmp_path / "demo", work("eval", server(code), client))
    assert time.monotonic() - began < 15
    assert run.states["eval"].phase == "Failed"
    assert "exit code 7" in run.states["eval"].message
    assert "no such model: foo" in run.states["eval"].message


def test_a_server_that_never_answers_runs_into_its_time_limit(tmp_path: Path) -> None:
    silent = Role("server", python("import time; time.sleep(60)"), "server", probe=Probe("/health", timeout_s=0.5))
    run = go(tmp_path / "demo", work("eval", silent, task("", "evaluate", after=["server"])))
    assert "did not answer" in run.states["eval"].message
    assert not alive(run.states["eval"].roles[0].pid)


def test_what_a_role_leaves_behind_is_stopped(tmp_path: Path) -> None:
    """A detached grandchild with its own session, such as Ray and model servers start, is ended together with its role."""
    pid_file = tmp_path / "pid"
    code = f"""
    import subprocess, sys
    p = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    open({str(pid_file)!r}, "w").write(str(p.pid))
    """
    run = go(tmp_path / "demo", work("a", task(code)))
    assert run.states["a"].phase == "Succeeded"
    assert not alive(int(pid_file.read_text()))


def test_a_fixed_port_in_use_names_its_holder(tmp_path: Path) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is already in use by .*process {os.getpid()}"):
            claim_port(port, "server")
        role = Role("server", python(SERVER), "server", ports={"http": port}, probe=Probe("/"))
        run = go(tmp_path / "demo", work("eval", role))
        assert run.exit_code == 2
        assert "already in use" in run.states["eval"].message


def test_a_missing_program_is_a_clear_failure(tmp_path: Path) -> None:
    run = go(tmp_path / "demo", work("a", Role("work", ("no-such-program-here",))))
    assert "exit code 127" in run.states["a"].message
    assert "cannot start no-such-program-here" in run.states["a"].message


def test_more_gpus_than_there_are_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 8 GPUs, but this process may use 0"):
        go(tmp_path / "demo", work("a", task(gpus=8)))
    assert not (tmp_path / "demo" / "a").exists()


def test_gpus_are_shared_out_and_waited_for(tmp_path: Path) -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    run = LocalRun(tmp_path / "demo", [work(n, task(code, gpus=2)) for n in ("a", "b")], gpu_ids=["0", "3"])
    run.check()
    asyncio.run(run.run())
    assert [tail(tmp_path / "demo" / n / "logs" / "work.log", 1) for n in ("a", "b")] == [["0,3"], ["0,3"]]
    a, b = sorted(run.states.values(), key=lambda s: s.started_at)
    assert a.finished_at <= b.started_at + 0.5


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    lock = locked(tmp_path / "demo")
    try:
        with pytest.raises(UserError, match=f"another `egm run` is running.*process {os.getpid()}"):
            locked(tmp_path / "demo")
    finally:
        lock.release()
    locked(tmp_path / "demo").release()


def test_only_needs_its_upstream(tmp_path: Path) -> None:
    works = [work("a", task()), work("b", task(), upstream="a")]
    run = go(tmp_path / "demo", *works, only="b")
    assert run.exit_code == 1 and run.states["b"].reason == "UpstreamNotReady"
    assert go(tmp_path / "demo", *works, only="a").states["a"].phase == "Succeeded"
    assert go(tmp_path / "demo", *works, only="b").states["b"].phase == "Succeeded"


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        locked(tmp_path / "file" / "demo")


def test_a_full_disk_stops_the_roles_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grounding.local.scheduler as scheduler

    real, pids = write_state, list[int]()

    def full(folder: Path, state: object) -> None:
        pids.extend(r.pid for r in state.roles)  # type: ignore[attr-defined]
        if pids:
            raise OSError(28, "No space left on device", str(folder))
        real(folder, state)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler, "write_state", full)
    with pytest.raises(EgmError, match="no space is left"):
        go(tmp_path / "demo", work("a", task("import time; time.sleep(60)")))
    eventually(lambda: not any(alive(p) for p in pids))


DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores SIGINT, so set the default again
sys.path.insert(0, {root!r})
from pathlib import Path
from rich.console import Console
from grounding.local.command import Order, execute
from grounding.local.scheduler import PlannedJob
from grounding.roles import Role
roles = (Role("work", (sys.executable, "-S", "-c", Path({code!r}).read_text())),)
doc = {{"kind": "GroundingTrainJob", "metadata": {{"name": "a"}}, "spec": {{}}}}
works = [PlannedJob("a", "GroundingTrainJob", doc, lambda layout: roles)]
order = Order(Path({manifest!r}), Path({runs!r}))
sys.exit(execute(order, works, Console(), Console(stderr=True), grace={grace}))
"""

STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
GENTLE = """
import signal, sys
def bye(*_):
    print("saved", flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, bye)
"""
SLEEPER = """
import subprocess, sys, time, os
p = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"], start_new_session=True)
open({pids!r} + ".new", "w").write(f"{{os.getpid()}} {{p.pid}}")
os.rename({pids!r} + ".new", {pids!r})
time.sleep(120)
"""


def start_driver(tmp_path: Path, prefix: str = "", grace: int = 2) -> tuple[subprocess.Popen[str], list[int]]:
    """Return a real `egm run` in a separate process, and the ids of its role and of the role's detached child."""
    pids = tmp_path / "pids"
    pids.unlink(missing_ok=True)
    (tmp_path / "demo.yaml").write_text("x")
    (tmp_path / "code.py").write_text(prefix + SLEEPER.format(pids=str(pids)))
    root = str(Path(__file__).parents[3])
    code = DRIVER.format(
        root=root,
        code=str(tmp_path / "code.py"),
        manifest=str(tmp_path / "demo.yaml"),
        runs=str(tmp_path / "runs"),
        grace=grace,
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    try:
        eventually(pids.exists)
    except AssertionError:
        run.kill()
        raise AssertionError(run.communicate()[0]) from None
    return run, [int(p) for p in pids.read_text().split()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_gently_and_prints_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run, pids = start_driver(tmp_path, GENTLE)
    run.send_signal(number)
    out, _ = run.communicate(timeout=20)
    assert run.returncode == code, out
    assert "egm run -f" in out and "Traceback" not in out
    assert not any(alive(p) for p in pids)
    folder = tmp_path / "runs" / "demo" / "a"
    assert tail(folder / "logs" / "work.log", 1) == ["saved"]
    state = read_state(folder)
    assert state and (state.phase, state.reason) == ("Stopped", "Interrupted")


HELPED = """
import os, signal, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(120)"])
def bye(*_):
    time.sleep(0.3)
    print("helper ended" if helper.poll() is not None else f"saved in {os.environ['EGM_GRACE_SECONDS']} s", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, bye)
"""


def test_a_role_keeps_its_helpers_until_it_has_saved_and_knows_its_grace_period(tmp_path: Path) -> None:
    run, pids = start_driver(tmp_path, HELPED)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=20)
    assert tail(tmp_path / "runs" / "demo" / "a" / "logs" / "work.log", 1) == ["saved in 1.5 s"]
    assert not any(alive(p) for p in pids)


def test_a_second_signal_kills(tmp_path: Path) -> None:
    run, pids = start_driver(tmp_path, STUBBORN, grace=600)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == 130
    assert not any(alive(p) for p in pids)


@pytest.mark.parametrize("supervisor_too", [False, True])
def test_kill_9_leaves_nothing_behind_and_the_next_run_goes_on(tmp_path: Path, supervisor_too: bool) -> None:
    run, pids = start_driver(tmp_path, STUBBORN if supervisor_too else "")
    folder = tmp_path / "runs" / "demo" / "a"
    eventually(lambda: (s := read_state(folder)) and s.roles)
    state = read_state(folder)
    assert state and state.phase == "Running"
    if supervisor_too:
        os.kill(state.roles[0].pid, signal.SIGKILL)
    run.kill()
    run.communicate()
    if not supervisor_too:
        eventually(lambda: not any(alive(p) for p in pids))
    again, new = start_driver(tmp_path)
    try:
        assert not any(alive(p) for p in pids)  # the next run has ended the processes that were left
    finally:
        again.terminate()
        again.communicate(timeout=20)
    assert not any(alive(p) for p in new)
    last = read_state(folder)
    assert last and last.attempt == 2 and last.id == state.id


def test_survivors_are_never_strangers() -> None:
    role = RoleState("r", pid=100, ticks=50, machine="boot ns", token="t")
    stranger = [Found(100, 99, 100), Found(7, 60, 100)]  # a new process has the same id
    assert survivors([role], stranger, "boot ns") == []
    assert survivors([role], [Found(100, 50, 100), Found(8, 60, 3, frozenset({"t"})), Found(9, 60, 9)], "boot ns") == [
        100,
        8,
    ]
    assert survivors([role], [Found(7, 60, 100), Found(9, 10, 100)], "boot ns") == [7]
    assert survivors([RoleState("r")], [Found(1, 1, 0)], "boot ns") == []


@pytest.mark.parametrize("recorded", ["", "other-boot ns", "boot other-ns"])
def test_a_state_of_another_boot_container_or_host_stops_nothing(recorded: str) -> None:
    """A recorded process id is used only on the same boot, container and host; otherwise a process must have the run's token."""
    role = RoleState("r", pid=100, ticks=1, machine=recorded, token="t")
    there = [Found(100, 1, 100), Found(7, 60, 100)]
    assert survivors([role], there, "boot ns") == [] and survivors([role], there[1:], "boot ns") == []
    assert survivors([role], [*there, Found(8, 60, 3, frozenset({"t"}))], "boot ns") == [8]


@given(st.integers(1, 8).flatmap(lambda n: st.lists(st.integers(-1, n - 1), min_size=n, max_size=n)))
@settings(max_examples=80, deadline=None)
def test_order_respects_dependencies_or_names_the_circle(parents: list[int]) -> None:
    works = [work(f"j{i}", upstream=f"j{p}" if p >= 0 else "") for i, p in enumerate(parents)]

    def circular(i: int) -> bool:
        seen: set[int] = set()
        while i >= 0 and i not in seen:
            seen.add(i)
            i = parents[i]
        return i >= 0

    if any(circular(i) for i in range(len(parents))):
        with pytest.raises(UserError, match="wait for each other"):
            ordered(works)
    else:
        names = [w.name for w in ordered(works)]
        assert sorted(names) == sorted(w.name for w in works)
        assert all(names.index(other) < names.index(w.name) for w in works for other in w.upstream)


def test_the_digest_ignores_how_a_job_runs_but_not_what_it_does() -> None:
    base = work("a")
    slower = PlannedJob("a", base.kind, {**base.document, "spec": {"lr": 1.0, "concurrency": 4}}, base.plan)
    assert digest(base, ["u"]) == digest(slower, ["u"])
    assert digest(base, ["u"]) != digest(base, ["v"])
    assert digest(base, ["u"]) != digest(work("a", lr=2.0), ["u"])


def test_the_manifest_is_yaml_that_only_its_owner_reads(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    document = {"kind": "X", "metadata": {"name": "a"}, "spec": {"lr": 1e-6, "text": "a: b\n", "on": [True, None]}}
    write_manifest(tmp_path / "job.yaml", document)
    assert YAML(typ="safe").load(tmp_path / "job.yaml") == document
    assert (tmp_path / "job.yaml").read_text().startswith("kind: X")
    assert stat.S_IMODE((tmp_path / "job.yaml").stat().st_mode) == 0o600


def test_the_layout_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = LocalRun(Path("runs/demo"), [])
    base = tmp_path / "runs" / "demo"
    assert run.layout(work("b", upstream="a")) == Layout(
        job_file=str(base / "b" / "job.yaml"),
        data=str(base / "data"),
        out=str(base / "b"),
        model=str(base / "a" / "model"),
        models=(str(base / "a" / "model"),),
    )
