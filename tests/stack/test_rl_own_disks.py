"""RL on two nodes that share no folder, only an S3 server: killed nodes lose no step of the last upload, and SIGTERM loses no step.

Each node is a network namespace with a disk of its own, which is mounted at the same path on both. Needs root and `ip`.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from grounding.progress import read_progress
from grounding.runtime.environment import BEGUN
from grounding.storage import open_store
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rl.run import stop_file
from grounding.train.rl.stopping import Doing
from tests.stack.test_ray_cluster import Gang, can_make_nodes, two_nodes

pytestmark = [
    pytest.mark.gang,
    pytest.mark.timeout(2400),  # two or three starts of verl on two nodes, and more of them on a busy machine
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces need root and ip"),
]
STEPS = 8
MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: "tiny://"}
  data: {shapes: {train: 48, perFile: 1}}
  reward: {file: REWARD, entryPoint: mine}
  resources: {nodes: 2}
  startDeadlineSeconds: 240
  hyperparameters: {maxSteps: STEPS, saveEvery: EVERY, validateEvery: 100, validateBeforeTrain: false, batchSize: 4,
                    miniBatchSize: 4, rollouts: 4, responseLength: 32, keepCheckpoints: 5}
"""
REWARD = """
def mine(data_source, solution_str, ground_truth, extra_info):
    return sum(map(ord, solution_str)) % 7 / 7  # this value differs between the answers of an untrained model
"""
MOUNTED = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


def _listen_in(namespace: str, port: int) -> socket.socket:
    """Return a socket that listens on a port of a namespace's loopback address; other sockets of this process stay outside."""
    found: list[socket.socket] = []

    def listen() -> None:  # a namespace is set for a thread, so a short thread enters it
        with Path(f"/run/netns/{namespace}").open() as namespace_file:
            if ctypes.CDLL(None, use_errno=True).setns(namespace_file.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
            found.append(socket.create_server(("127.0.0.1", port)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    return found[0]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _serve(listening: socket.socket, port: int) -> None:
    with suppress(OSError):  # the test has closed the socket
        while True:
            inside, _ = listening.accept()
            outside = socket.create_connection(("127.0.0.1", port))
            for pair in ((inside, outside), (outside, inside)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()


@contextmanager
def nodes_with_s3(port: int) -> Iterator[list[tuple[str, str, str]]]:
    """Return two nodes that reach each other and the S3 server of this machine, at its own address."""
    with two_nodes() as nodes:
        listening = [_listen_in(name, port) for name, _, _ in nodes]
        for each in listening:
            threading.Thread(target=_serve, args=(each, port), daemon=True).start()
        try:
            yield nodes
        finally:
            for each in listening:
                each.close()


class Pods(Gang):
    """Both pods of one attempt, each with a new, empty disk."""

    def __init__(
        self, nodes: list[tuple[str, str, str]], folder: Path, uri: str, attempt: int, save_every: int = 1
    ) -> None:
        self.disks = [folder / f"attempt-{attempt}" / f"disk-{rank}" for rank in range(2)]
        self.logs = [disk.with_suffix(".log") for disk in self.disks]
        self.marks = [f"{secrets.token_hex(8)}-{rank}" for rank in range(2)]
        at, reward, token = folder / "pod", folder / "reward.py", secrets.token_hex(16)
        at.mkdir(parents=True, exist_ok=True)
        reward.write_text(REWARD)
        self.pods = []
        for rank, (name, interface, _) in enumerate(nodes):
            disk = self.disks[rank]
            disk.mkdir(parents=True)
            text = MANIFEST.replace("STEPS", str(STEPS)).replace("EVERY", str(save_every))
            (disk / "job.yaml").write_text(text.replace("REWARD", str(reward)))
            env = os.environ | {
                "MASTER_ADDR": nodes[0][2],
                "MASTER_PORT": "23456",
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "RAY_AUTH_TOKEN": token,
                "EGM_ATTEMPT": str(attempt),
                "EGM_LOST_SECONDS": "20",
                "EGM_GRACE_SECONDS": "200",
                "EGM_OUTPUT": uri,
                "EGM_CACHE": str(at / "cache"),
                "GLOO_SOCKET_IFNAME": interface,
                "EGM_TEST_POD": self.marks[rank],
                "CUDA_VISIBLE_DEVICES": "-1",  # use the CPU path even on a machine with a GPU
            }
            here = ["ip", "netns", "exec", name, "sh", "-c", MOUNTED, "sh", str(disk), str(at)]
            where = ["--job", str(at / "job.yaml"), "--data", str(at / "data")]
            role = [*here, sys.executable, "-m", "grounding.cli", "role"]
            # each pod prepares its own data, as its init container does on a cluster
            subprocess.run([*role, "prepare", *where], env=env, check=True, capture_output=True)
            with self.logs[rank].open("wb") as log:
                command = [*role, "rl", *where, "--model", "tiny://", "--out", str(at)]
                self.pods.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def said(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}" for log in self.logs)

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for an event while both pods run."""
        end = time.monotonic() + 700
        while not reached():
            assert time.monotonic() < end and all(pod.poll() is None for pod in self.pods), self.said()
            time.sleep(0.05)

    def ended(self) -> list[int]:
        """Return the exit codes of both pods."""
        try:
            return self.wait(700)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def lines(self) -> list[tuple[int, float]]:
        """Return (step, time) of each trained step, from the disk of rank 0."""
        lines = read_progress(self.disks[0] / "progress.jsonl")
        return [(line["step"], line["time"]) for line in lines if line["step"] > 0]

    def steps(self) -> list[int]:
        return [step for step, _ in self.lines()]

    def stopping(self) -> str:
        """Return rank 0's last message about its stop; empty if there is none."""
        said = self.logs[0].read_text(errors="replace").splitlines()
        return next((line for line in reversed(said) if line.startswith("rl: stopping; ")), "")

    def ranks_on(self, pod: int, step: int = STEPS) -> set[str]:
        """Return which ranks have written files of a step's checkpoint to a pod's disk."""
        shards = self.disks[pod].glob(f"checkpoints/global_step_{step}/actor/optim_*.pt")
        return {path.stem.rpartition("_")[2] for path in shards}


def _saved(uri: str) -> int:
    """Return the step of the newest checkpoint of which the store has every file."""
    return max((found.step for found in checkpoints.inventory(open_store(uri)) if found.whole), default=0)


@contextmanager
def cleared(pods: Pods) -> Iterator[Pods]:
    """End the remaining processes of an attempt when the block ends."""
    try:
        yield pods
    finally:
        pods.clear()


def _finish(pods: Pods, uri: str, after: int) -> None:
    """Check that an attempt with empty disks continues after the step `after`, which may be the last one, and succeeds."""
    assert pods.ended() == [0, 0], pods.said()
    if after < STEPS:
        assert f"resuming after step {after}" in pods.logs[0].read_text(errors="replace"), pods.said()
    assert pods.steps() == list(range(1, STEPS + 1)) and _saved(uri) == STEPS
    if after < STEPS:
        assert {frozenset(pods.ranks_on(pod)) for pod in (0, 1)} == {frozenset("0"), frozenset("1")}, (
            "expected only the files of this pod's rank on its disk"
        )
    assert (pods.disks[0] / "model" / "config.json").exists() and not (pods.disks[1] / "model").exists()
    assert open_store(uri).find("model/config.json") is not None


def _continues(pods: Pods, after: int, earlier: Pods) -> None:
    """Check that an attempt began exactly after the step `after`, with the progress lines of the steps before it unchanged."""
    text = pods.logs[0].read_text(errors="replace")
    assert re.findall(r"^rl: .*, resuming after step (\d+)", text, re.MULTILINE) == [str(after)], pods.said()
    kept = pods.lines()[:after]
    before = earlier.lines()[:after]  # without the line of a step that was saved because of a signal
    assert kept[: len(before)] == before and len(kept) == after, "expected no saved step to be trained again"


def test_nodes_with_empty_disks_continue_from_the_last_upload_after_kills(tmp_path: Path, s3) -> None:
    server, bucket = s3
    uri = f"s3://{bucket}/killed"
    with nodes_with_s3(server.ports[0]) as nodes:
        with cleared(Pods(nodes, tmp_path, uri, 1)) as first:
            first.until(lambda: _saved(uri) >= 1)
            first.kill(1)
            first.kill(0)
        both = _saved(uri)
        assert 1 <= both < STEPS, first.said()
        with cleared(Pods(nodes, tmp_path, uri, 2)) as second:
            second.until(lambda: _saved(uri) > both)
            second.kill(1)
            code = second.pods[0].wait(300)
            assert code not in (0, 2), f"expected rank 0 to end as failed without the other node: {second.said()}"
        _continues(second, both, first)
        one = _saved(uri)
        assert both < one <= STEPS
        with cleared(Pods(nodes, tmp_path, uri, 3)) as third:
            _finish(third, uri, one)
        if one < STEPS:
            _continues(third, one, second)


def test_sigterm_of_both_nodes_saves_the_step_under_way_in_the_store(tmp_path: Path, s3) -> None:
    server, bucket = s3
    uri = f"s3://{bucket}/stopped"
    with nodes_with_s3(server.ports[0]) as nodes:
        with cleared(Pods(nodes, tmp_path, uri, 1, save_every=100)) as first:
            begun = stop_file(first.disks[0]).with_name(BEGUN)
            first.until(lambda: (doing := Doing.read(begun)) is not None and (doing.phase, doing.step) == ("update", 2))
            assert _saved(uri) == 0
            for pod in first.pods:
                pod.terminate()
            assert first.ended() == [143, 143], first.said()
        saved = _saved(uri)
        assert saved in (2, 3), first.said()  # 3 if step 2 ended before the role looked
        # the line of the saved step may be missing; the next attempt writes it from the checkpoint
        assert first.steps()[-1] in (saved - 1, saved), first.said()
        assert first.stopping().endswith(f"saved step {saved}"), first.said()
        assert [first.ranks_on(pod, saved) for pod in (0, 1)] == [{"0"}, {"1"}]
        with cleared(Pods(nodes, tmp_path, uri, 2, save_every=100)) as second:
            _finish(second, uri, saved)
        _continues(second, saved, first)
