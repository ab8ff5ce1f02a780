"""RL over a real Ray of two nodes: each a network namespace of its own with a logical GPU; one is killed, the gang starts again and goes on.

Needs root and `ip`. As a script it does the same as often as wanted, each time killing a random node at a random step:

    python tests/stack/test_ray_cluster.py --model FOLDER --count 10
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from grounding.train import checkpoints
from grounding.train.progress import read_progress

STEPS = 5
MANIFEST = f"""
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {{name: rl}}
spec:
  preset: tiny-rl
  model: {{source: MODEL}}
  data: {{shapes: {{train: 48, perFile: 10}}}}
  resources: {{nodes: 2}}
  startDeadlineSeconds: 240
  hyperparameters: {{maxSteps: {STEPS}, saveEvery: 1, validateEvery: 5, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}}
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_nodes() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"egm-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    _ip("netns", "del", name)
    return True


@contextmanager
def two_nodes() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces joined by a cable: (namespace, interface, address) of each."""
    tag, net = secrets.token_hex(2), random.randrange(1, 250)
    nodes = [(f"egm{tag}{i}", f"veth{tag}{i}", f"10.213.{net}.{i + 1}") for i in range(2)]
    try:
        for name, _, _ in nodes:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            nodes[0][1],
            "netns",
            nodes[0][0],
            "type",
            "veth",
            "peer",
            "name",
            nodes[1][1],
            "netns",
            nodes[1][0],
        )
        for name, interface, address in nodes:
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
            _ip("-n", name, "route", "add", "default", "dev", interface)
        yield nodes
    finally:
        for name, _, _ in nodes:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Gang:
    """Both pods of one attempt, started as PyTorchJob starts them."""

    def __init__(self, nodes: list[tuple[str, str, str]], folder: Path, model: Path, attempt: int) -> None:
        token = secrets.token_hex(16)
        self.marks = [f"{secrets.token_hex(8)}-{rank}" for rank in range(len(nodes))]
        self.pods = []
        for rank, (name, interface, _) in enumerate(nodes):
            env = os.environ | {
                "MASTER_ADDR": nodes[0][2],
                "MASTER_PORT": "23456",
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "RAY_AUTH_TOKEN": token,
                "EGM_ATTEMPT": str(attempt),
                "EGM_LOST_SECONDS": "20",
                "EGM_PROGRESS_PORT": "8090",
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "GLOO_SOCKET_IFNAME": interface,
                "EGM_TEST_POD": self.marks[rank],
            }
            role = [sys.executable, "-m", "grounding.cli", "role", "rl", "--job", str(folder / "job.yaml")]
            role += ["--data", str(folder / "data"), "--model", str(model), "--out", str(folder / "out")]
            with (folder / f"attempt{attempt}-rank{rank}.log").open("wb") as log:
                command = ["ip", "netns", "exec", name, *role]
                self.pods.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def processes(self, rank: int) -> list[int]:
        """Everything that runs in a pod."""
        wanted, found = f"EGM_TEST_POD={self.marks[rank]}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self, rank: int) -> None:
        """The node is gone, with everything on it."""
        while left := self.processes(rank):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.pods[rank].poll()
            time.sleep(0.05)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of all pods."""
        until = time.monotonic() + seconds
        return [pod.wait(max(1.0, until - time.monotonic())) for pod in self.pods]

    def clear(self) -> None:
        for rank in range(len(self.pods)):
            self.kill(rank)


def _steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_progress(folder / "out" / "progress.jsonl") if line["step"] > 0]


def ask(node: str, url: str) -> dict:
    """GET from inside a namespace."""
    code = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=10).read().decode())"
    done = subprocess.run(
        ["ip", "netns", "exec", node, sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def train_through_a_kill(folder: Path, model: Path, victim: int, at_step: int) -> dict:
    """Train; when `at_step` is done kill node `victim`; start the gang again until it succeeds. Gives what happened."""
    (folder / "out").mkdir(parents=True)
    (folder / "job.yaml").write_text(MANIFEST.replace("MODEL", str(model)))
    role = [sys.executable, "-m", "grounding.cli", "role", "prepare"]
    subprocess.run([*role, "--job", folder / "job.yaml", "--data", folder / "data"], check=True)
    began, attempts, killed_at = time.monotonic(), [], None
    with two_nodes() as nodes:
        for attempt in range(1, 4):
            gang = Gang(nodes, folder, model, attempt)
            try:
                if killed_at is None:
                    until = time.monotonic() + 420
                    while max(_steps(folder), default=0) < at_step:
                        assert time.monotonic() < until, "no step in time"
                        assert gang.pods[0].poll() is None and gang.pods[1].poll() is None, "ended too early"
                        time.sleep(0.05)
                    # the worker asks rank 0 as the operator does
                    report = ask(nodes[1][0], f"http://{nodes[0][2]}:8090/progress")
                    assert report["step"] >= at_step and report["totalSteps"] == STEPS and report["attempt"] == attempt
                    killed_at = time.monotonic()
                    gang.kill(victim)
                codes = gang.wait(420)
            finally:
                gang.clear()
            attempts.append(codes)
            if codes == [0, 0]:
                break
    out = folder / "out"
    lines = [line for line in read_progress(out / "progress.jsonl") if line["step"] > 0]
    resumed = [p.stem.rpartition("-")[2] for p in sorted((out / "verl").glob("metrics-*-from-*.jsonl"))]
    return {
        "victim": victim,
        "at_step": at_step,
        "codes": attempts,
        "steps": [line["step"] for line in lines],
        "scores": [line["metrics"]["score"] for line in lines],
        "resumed_from": [int(r) for r in resumed],
        "checkpoint": (checkpoints.peek(out / "checkpoints") or checkpoints.Checkpoint(0, out)).step,
        "world_size": checkpoints.world_size(out / "checkpoints" / f"global_step_{STEPS}"),
        "model": (out / "model" / "config.json").exists(),
        "seconds": round(time.monotonic() - began, 1),
    }


def check(told: dict) -> None:
    """What must hold whichever node died, and when."""
    first, last = told["codes"][0], told["codes"][-1]
    if first != [0, 0]:  # a kill after the last step may come too late to matter for the other pod
        assert first[told["victim"]] != 0 and len(told["codes"]) == 2, told
        assert told["resumed_from"][0] == 0 and told["resumed_from"][-1] >= told["at_step"] - 1, told
        assert first[1 - told["victim"]] != 0, told
    assert last == [0, 0], told
    assert told["steps"] == list(range(1, STEPS + 1)) and told["checkpoint"] == STEPS, told
    assert told["world_size"] == 2 and told["model"], told
    assert all(math.isfinite(s) and 0.0 <= s <= 1.0 for s in told["scores"]), told
    assert max(told["scores"]) > 0.0, "a model that speaks scores something"


@pytest.mark.skipif(not can_make_nodes(), reason="network namespaces need root and ip")
def test_a_gang_of_two_nodes_goes_on_when_one_is_killed(tmp_path: Path, speaking_model: Path) -> None:
    check(train_through_a_kill(tmp_path / "run", speaking_model, victim=1, at_step=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a tiny model that speaks")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, good = random.Random(args.seed), 0
    for _ in range(args.count):
        folder = Path(tempfile.mkdtemp(prefix="egm-gang-"))
        told = train_through_a_kill(folder / "run", args.model, rng.randrange(2), rng.randrange(1, STEPS))
        print(json.dumps(told), flush=True)
        check(told)
        good += 1
        shutil.rmtree(folder)
    print(f"{good} of {args.count}")


if __name__ == "__main__":
    main()
