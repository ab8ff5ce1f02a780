"""The rendezvous: which pods have joined, which are missing, and how the run ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from grounding.errors import Failure, UserError
from grounding.runtime.grace import Stop
from grounding.runtime.waiting import Every
from grounding.train.rl import ray_cluster, rendezvous
from grounding.train.rl.ray_cluster import Node, shortfall
from grounding.train.rl.rendezvous import Membership, Pods
from tests.cluster.operator_kit import until

TOKEN = "0123456789abcdef"
ENV = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "3", "RAY_AUTH_TOKEN": TOKEN}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_pytorchjob_s_variables(tmp_path: Path) -> None:
    assert (
        rendezvous.from_environment({}) is None
        and rendezvous.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) is None
    )
    pods = rendezvous.from_environment(ENV)
    assert pods == Pods(1, 3, "job-master-0", 23456, 6379, TOKEN) and TOKEN not in repr(pods)
    (tmp_path / "token").write_text(TOKEN + "\n")
    by_file = {k: v for k, v in ENV.items() if k != "RAY_AUTH_TOKEN"} | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert rendezvous.from_environment(by_file) == pods


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "3"}, "0 to 2"),
        ({"RANK": "x"}, "whole number"),
        ({"MASTER_ADDR": ""}, "the address of rank 0"),
        ({"RAY_AUTH_TOKEN": ""}, "needs a token"),
        ({"RAY_AUTH_TOKEN": "short"}, "needs a token"),
    ],
)
def test_a_wrong_environment_is_named(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rendezvous.from_environment(ENV | change)


def test_ranks_do_not_reach_ray_s_workers() -> None:
    assert rendezvous.environment_of_jobs(ENV | {"PET_NNODES": "2", "HOME": "/h"}) == {
        "RAY_AUTH_TOKEN": TOKEN,
        "HOME": "/h",
    }


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as s:
        s.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("master", ["::1", "127.0.0.1"])
def test_pods_with_addresses_of_ipv6_meet(master: str) -> None:
    env = ENV | {"MASTER_ADDR": master, "MASTER_PORT": str(_free_port()), "EGM_POD_IP": "fd00::2"}
    pods = rendezvous.from_environment(env)
    assert pods is not None and pods.ip == "fd00::2" and pods.ray_address == "[fd00::2]:6379"
    membership = Membership(3)
    with rendezvous.meet(replace(pods, rank=0), membership):
        assert rendezvous.say(pods) == {"state": "starting", "ray": "", "resume": ""}
    assert membership.members[1].ip == "fd00::2"
    command = ray_cluster.start_command(pods, Node(1, 40), "/tmp/x")
    assert "--node-ip-address=fd00::2" in command
    assert f"--address={'[::1]' if ':' in master else master}:6379" in command


def test_workers_hear_how_it_ended_and_rank_0_who_is_missing() -> None:
    now = [100.0]
    membership = Membership(3, clock=lambda: now[0])
    pods = Pods(0, 3, "127.0.0.1", _free_port(), 6379, TOKEN, "10.0.0.1")
    one, two = replace(pods, rank=1, ip="10.0.0.2"), replace(pods, rank=2, ip="10.0.0.3")
    assert rendezvous.say(one, timeout_s=0.5) is None, "expected no reply, because rank 0 has not started"
    with rendezvous.meet(pods, membership):
        assert membership.missing() == [1, 2]
        assert rendezvous.say(one) == {"state": "starting", "ray": "", "resume": ""}
        assert membership.missing() == [2] and membership.members[1].ip == "10.0.0.2"
        membership.ray, membership.state = "10.0.0.1:6379", "running"
        assert rendezvous.say(two) == {"state": "running", "ray": "10.0.0.1:6379", "resume": ""}
        assert membership.lost(60.0) == ""
        now[0] += 61.0
        rendezvous.say(two)
        assert "worker 1" in membership.lost(60.0) and "61 s" in membership.lost(60.0)
        rendezvous.say(one)
        rendezvous.say(two, left="its Ray node ended with exit code 1")
        assert membership.lost(60.0).endswith("has left: its Ray node ended with exit code 1")
        membership.state = "failed"
        assert not membership.all_notified()
        assert rendezvous.say(one) == {"state": "failed", "ray": "10.0.0.1:6379", "resume": ""}
        assert membership.all_notified(), "a pod that has left must not be waited for"


def test_pods_with_own_disks_say_what_they_train_and_hear_where_it_continues() -> None:
    membership = Membership(3)
    membership.resume = '{"step": 4}'
    pods = Pods(0, 3, "127.0.0.1", _free_port(), 6379, TOKEN, "10.0.0.1")
    long = "x" * 20_000
    with rendezvous.meet(pods, membership):
        for rank, content in ((2, "two"), (1, long)):
            answer = rendezvous.say(replace(pods, rank=rank, content=content))
            assert answer is not None and answer["resume"] == '{"step": 4}'
    assert membership.contents() == [long, "two"] and long not in repr(replace(pods, content=long))


def test_a_worker_that_cannot_restore_says_so_and_starts_no_ray() -> None:
    pods = Pods(0, 2, "127.0.0.1", _free_port(), 6379, TOKEN, "10.0.0.1")
    membership = Membership(2)
    membership.ray, membership.resume = "10.0.0.1:6379", "step 4"

    def restore(resume: str) -> None:
        raise Failure(f"{resume} is gone")

    with rendezvous.meet(pods, membership), pytest.raises(Failure, match="step 4 is gone"):
        ray_cluster.follow(replace(pods, rank=1), Node(1, 8), {}, 20.0, Stop(1.0), restore)
    assert membership.lost(60.0).endswith("has left: step 4 is gone")


def test_a_worker_sends_heartbeats_while_it_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    pods = Pods(0, 2, "127.0.0.1", _free_port(), 6379, TOKEN, "10.0.0.1")
    membership = Membership(2, clock=lambda: now[0])
    membership.ray = "10.0.0.1:6379"
    monkeypatch.setattr(ray_cluster, "HEARTBEAT_S", 0.02)
    stop = Stop(30.0)

    def restore(_: str) -> None:
        now[0] += 61.0
        until("a heartbeat", lambda: membership.members[1].seen == now[0])
        assert not membership.lost(60.0)
        membership.on_stop = lambda: setattr(membership, "state", "stopped")
        stop.ask()
        until("the news that the run has ended", lambda: membership.all_notified())

    with rendezvous.meet(pods, membership):
        assert ray_cluster.follow(replace(pods, rank=1), Node(1, 8), {}, 20.0, stop, restore) == 143


def test_a_worker_whose_disk_is_full_while_it_restores_says_so() -> None:
    pods = Pods(0, 2, "127.0.0.1", _free_port(), 6379, TOKEN, "10.0.0.1")
    membership = Membership(2)
    membership.ray = "10.0.0.1:6379"

    def restore(_: str) -> None:
        raise OSError(28, "No space left on device")

    with rendezvous.meet(pods, membership), pytest.raises(OSError, match="No space left"):
        ray_cluster.follow(replace(pods, rank=1), Node(1, 8), {}, 20.0, Stop(1.0), restore)
    assert membership.lost(60.0).endswith("has left: [Errno 28] No space left on device")


def test_a_stranger_is_refused() -> None:
    pods = Pods(0, 2, "127.0.0.1", _free_port(), 6379, TOKEN)
    membership = Membership(2)
    with rendezvous.meet(pods, membership):
        with pytest.raises(UserError, match="refuses this pod's token"):
            rendezvous.say(replace(pods, rank=1, token="another token !!"))
        for body in (b"", b"[]", b'{"rank": 7, "host": "h", "ip": "i"}', b'{"rank": 0, "host": "h", "ip": "i"}'):
            request = urllib.request.Request(
                f"http://127.0.0.1:{pods.port}/", data=body, headers={"Authorization": f"Bearer {TOKEN}"}
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=5)
            assert refused.value.code == 400
    assert membership.members == {}


def test_a_run_that_had_ended_before_dismisses_late_workers_with_0() -> None:
    pods = Pods(0, 2, "127.0.0.1", _free_port(), 6379, TOKEN)
    leader = threading.Thread(target=rendezvous.dismiss, args=(pods, 20.0))
    leader.start()
    try:
        child = (
            "import sys; from grounding.train.rl import ray_cluster as r; from grounding.train.rl.rendezvous import Pods;"
            f"sys.exit(r.follow(Pods(1, 2, '127.0.0.1', {pods.port}, 6379, {TOKEN!r}), r.Node(1, 8), {{}}, 20.0))"
        )
        assert subprocess.run([sys.executable, "-c", child], check=False, timeout=60).returncode == 0
    finally:
        leader.join(30)
    assert not leader.is_alive()


def test_shortfall_names_who_is_missing() -> None:
    pods, membership = Pods(0, 3, "m", 1, 2, TOKEN, "10.0.0.1"), Membership(3)
    want = Node(8, 64)

    def node(ip: str, gpus: int, alive: bool = True) -> dict:
        return {"NodeManagerAddress": ip, "Alive": alive, "Resources": {"GPU": float(gpus), "CPU": 64.0}}

    assert shortfall([], membership, pods, want) == "of 3 pods, rank 1, 2 has not joined"
    membership.heartbeat(1, "a", "10.0.0.2")
    membership.heartbeat(2, "b", "10.0.0.3")
    nodes = [node("10.0.0.1", 8), node("10.0.0.2", 8), node("10.0.0.3", 8, alive=False)]
    assert shortfall(nodes, membership, pods, want) == "Ray on rank 2 (10.0.0.3) has not started"
    nodes[2] = node("10.0.0.3", 7)
    assert shortfall(nodes, membership, pods, want) == "rank 2 (10.0.0.3) has 7 GPUs, but 8 are needed"
    nodes[2] = node("10.0.0.3", 8)
    assert shortfall(nodes, membership, pods, want) == ""


def test_only_what_carries_the_mark_is_ended(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    stubborn = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
    ]
    ours = subprocess.Popen(sleep, env=os.environ | {"EGM_RAY_NODE": "mark-a"}, start_new_session=True)
    deaf = subprocess.Popen(stubborn, env=os.environ | {"EGM_RAY_NODE": "mark-a"}, stdout=subprocess.PIPE)
    theirs = subprocess.Popen(sleep, env=os.environ | {"EGM_RAY_NODE": "mark-b"})
    try:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        for child in (ours, deaf):  # reap, as init does for processes without a parent
            threading.Thread(target=child.wait, daemon=True).start()
        ray_cluster.end("mark-a", grace_s=1.0)
        assert ours.wait(5) == -15 and deaf.wait(5) == -9 and theirs.poll() is None
    finally:
        for child in (ours, deaf, theirs):
            child.kill()
            child.wait()


def test_slots_and_commands() -> None:
    assert ray_cluster.cpu_slots(2, 1) == 36 and ray_cluster.cpu_slots(192, 8) == 192
    pods = Pods(0, 2, "m", 1, 6379, TOKEN, "10.0.0.1")
    head = ray_cluster.start_command(pods, Node(8, 64), "/tmp/x")
    assert {"--head", "--port=6379", "--num-gpus=8", "--num-cpus=64", "--temp-dir=/tmp/x", "--block"} <= set(head)
    worker = ray_cluster.start_command(replace(pods, rank=1), Node(8, 64), "/tmp/x")
    assert "--address=m:6379" in worker and "--head" not in worker
    assert not any(TOKEN in part for part in head + worker), "the token must not be in a command line"
    env = ray_cluster.ray_environment(pods, "mark")
    assert env["RAY_AUTH_MODE"] == "token" and env["RAY_AUTH_TOKEN"] == TOKEN


class _FakeRay(ModuleType):
    """A service that is unreachable `failures` times."""

    def __init__(self, failures: int) -> None:
        super().__init__("ray")
        self.failures = failures

    def init(self, **_: object) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the raylet is not there yet\nand more")

    def shutdown(self) -> None: ...

    def nodes(self) -> list[dict]:
        return [{"NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"GPU": 1.0}}]


class _Head:
    up = False

    def ended(self) -> str:
        return ""


def _waits(monkeypatch: pytest.MonkeyPatch, ray: _FakeRay, deadline_s: float) -> bool:
    monkeypatch.setitem(sys.modules, "ray", ray)
    pods = Pods(0, 1, "m", 1, 6379, TOKEN, "10.0.0.1")
    stop = SimpleNamespace(asked=False)
    return ray_cluster._wait(pods, Node(1, 8), Membership(1), _Head(), deadline_s, stop)  # type: ignore[arg-type]


def test_a_head_that_is_not_up_yet_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _waits(monkeypatch, _FakeRay(failures=1), 30.0)
    assert (
        "waiting: Ray's head has not started (ConnectionError: the raylet is not there yet)" in capsys.readouterr().out
    )


def test_what_is_waited_for_is_said_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ray_cluster, "Every", lambda: Every(0.0))
    assert _waits(monkeypatch, _FakeRay(failures=2), 30.0)
    text = capsys.readouterr().out
    assert text.count("the raylet is not there yet") == 2 and "s are left" in text


def test_why_ray_could_not_be_reached_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failure, match=r"head has not started \(ConnectionError: the raylet is not there yet\)"):
        _waits(monkeypatch, _FakeRay(failures=1000), 0.2)
