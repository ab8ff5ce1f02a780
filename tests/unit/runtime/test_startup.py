"""What a role does before its work: network interface, shared memory, its first line, and its reaction to signals."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grounding.api import load_job, resolve
from grounding.errors import UserError
from grounding.runtime import logs, startup
from grounding.runtime.startup import Facts

TWO = {"10.0.0.5": "eth0", "192.168.7.2": "ib0", "127.0.0.1": "lo"}
JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: look}
spec: {engine: sglang, model: {source: "s3://models/x"}, data: {shapes: {}}}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def test_several_nodes_meet_on_the_interface_of_the_pods_address() -> None:
    found = startup.network({}, Facts(interfaces=TWO, route="192.168.7.2"))
    assert found == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}


def test_one_node_needs_no_interface() -> None:
    assert startup.network({}, Facts(interfaces=TWO)) == {}


def test_the_users_variables_stay() -> None:
    found = startup.network({"NCCL_SOCKET_IFNAME": "eth0"}, Facts(interfaces=TWO, route="192.168.7.2"))
    assert found == {"GLOO_SOCKET_IFNAME": "ib0"}


def test_an_interface_may_be_named() -> None:
    found = startup.network({"EGM_NETWORK_INTERFACE": "eth0"}, Facts(interfaces=TWO, route="192.168.7.2"))
    assert found["GLOO_SOCKET_IFNAME"] == "eth0"
    with pytest.raises(UserError, match=r"EGM_NETWORK_INTERFACE: no interface 'eth9'.*eth0, ib0, lo"):
        startup.network({"EGM_NETWORK_INTERFACE": "eth9"}, Facts(interfaces=TWO))


def test_this_machine_is_seen_as_it_is() -> None:
    facts = startup.observe({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"})
    assert facts.interfaces["127.0.0.1"] == "lo" and facts.route == "127.0.0.1"
    assert startup.observe({"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}).route == ""
    assert startup.observe({"WORLD_SIZE": "2", "MASTER_ADDR": "not.known.invalid"}).route == ""


@pytest.mark.parametrize(("role", "gpus", "holds", "refused"), [
    ("rl", 8, 64 * 2**20, True), ("sft", 1, 64 * 2**20, True), ("server", 1, 2**30 - 1, True), ("rl", 8, 2**30, False),
    ("rl", 0, 64 * 2**20, False), ("prepare", 8, 0, False), ("rl", 8, None, True),
])  # fmt: skip
def test_little_shared_memory_is_refused_where_gpus_are(role: str, gpus: int, holds: int | None, refused: bool) -> None:
    facts = Facts(shm_bytes=holds, gpus=gpus)
    if not refused:
        startup.check_shared_memory(role, {}, facts)
        return
    with pytest.raises(
        UserError,
        match=rf"/dev/shm has .* but {role} on {gpus} GPUs needs at least 1 GiB\nSet spec.resources.sharedMemory",
    ):
        startup.check_shared_memory(role, {}, facts)
    startup.check_shared_memory(role, {"EGM_SHM_MIN_BYTES": "0"}, facts)


def test_a_role_says_in_one_line_what_it_is_about_to_do(job_file: Path) -> None:
    job = resolve(load_job(job_file))
    environ = {
        "EGM_JOB": "team/look",
        "EGM_ATTEMPT": "2",
        "EGM_PORT": "30000",
        "RAY_AUTH_TOKEN": "hidden",
        "AWS_SECRET_ACCESS_KEY": "hidden",
    }
    facts = Facts(2**34, 2, TWO, "", {"torch": "2.11.0", "sglang": "0.5.12"}, "3.12.1")
    said = startup.line("server", job, environ, facts, {"SGLANG_IS_FLASHINFER_AVAILABLE": "false"})
    assert said.split("; ") == [
        "server of evaluation job team/look", "attempt 2", "sglang on port 30000", "2 GPUs", "/dev/shm 16 GiB", "FlashInfer off",
        "Python 3.12.1 torch 2.11.0 sglang 0.5.12",
    ]  # fmt: skip


def test_a_role_then_says_that_it_loads_its_packages(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup.logs, "set_up", lambda *_: None)
    monkeypatch.setattr(startup, "observe", lambda _: Facts(2**34, 0, TWO, "", {}, "3.12.1"))
    monkeypatch.setattr(startup, "network", lambda *_: {})
    monkeypatch.setattr(startup.flashinfer, "environment", lambda _: {})
    job = resolve(load_job(job_file))
    startup.begin("evaluate", job)
    first, last = capsys.readouterr().err.splitlines()
    assert "evaluate of evaluation job look" in first and last == "loading the packages of the role evaluate"
    monkeypatch.setenv("LOCAL_RANK", "0")  # one of several ranks of a pod
    startup.begin("evaluate", job)
    assert not capsys.readouterr().err


def test_the_first_process_of_a_container_goes_under_an_init() -> None:
    assert startup.under_init(["egm", "role"], {}, 1, "/usr/bin/tini") == ["/usr/bin/tini", "--", "egm", "role"]
    assert startup.under_init(["egm", "role"], {"EGM_INIT": "1"}, 1, "/usr/bin/tini") == []
    assert startup.under_init(["egm", "role"], {}, 7, "/usr/bin/tini") == []
    assert startup.under_init(["egm", "role"], {}, 1, None) == []


def test_log_lines_are_json_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:], logging.root.level, logging.getLogger("grounding").level
    try:
        logs.set_up({"EGM_LOG_FORMAT": "json"}, {"role": "rl"})
        logging.getLogger("grounding.x").info("step %d", 3)
        logging.getLogger("urllib3").info("not this")
        line = json.loads(capsys.readouterr().err)
    finally:
        logging.root.handlers[:] = before[0]
        logging.root.setLevel(before[1])
        logging.getLogger("grounding").setLevel(before[2])
    assert (
        line["message"] == "step 3" and line["role"] == "rl" and line["level"] == "info" and line["time"].endswith("Z")
    )


@pytest.mark.parametrize("variable", ["EGM_LOG_FORMAT", "EGM_LOG_LEVEL", "EGM_SHM_MIN_BYTES"])
def test_a_wrong_setting_ends_the_role_with_2_and_names_it(variable: str, job_file: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "grounding.cli",
        "role",
        "prepare",
        "--job",
        str(job_file),
        "--data",
        str(tmp_path / "data"),
    ]
    done = subprocess.run(words, env=os.environ | {variable: "loud"}, capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {variable}: expected" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_ends_a_role_with_143_and_no_traceback(job_file: Path, tmp_path: Path) -> None:
    """SIGTERM ends a role in this way even while it waits for its job file, which is a pipe without a writer here."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    words = [sys.executable, "-m", "grounding.cli", "role", "prepare", "--job", str(pipe), "--data", str(tmp_path)]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for _ in range(300):  # wait until the role opens the pipe, which it does after it has set the handler
        try:
            other = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
            continue
        break
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=20)
    os.close(other)
    assert child.returncode == 143 and "Traceback" not in said
