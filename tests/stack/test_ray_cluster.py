"""RL over a real Ray cluster of two network namespaces with a logical GPU each: one is killed, and the gang starts
again and continues.

Needs root and `ip`. As a script, it repeats this, and each time kills a random node at a random step:

    python tests/stack/test_ray_cluster.py --model FOLDER --count 10 --out FILE.json

`--parallel` is the number of gangs at a time, each with its own namespaces; a gang needs about four cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import platform
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from grounding.files import complete_lines
from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints

STEPS = 5
MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 48, perFile: 10}}
  resources: {nodes: 2}
  startDeadlineSeconds: 240
  hyperparameters: {maxSteps: STEPS, saveEvery: 1, validateEvery: 5, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 48}
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def can_make_nodes() -> bool:
    """Return whether we may create network namespaces on this machine."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"egm-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    _ip("netns", "del", name)
    return True


@contextmanager
def two_nodes() -> Iterator[list[tuple[str, str, str]]]:
    """Create two connected network namespaces; yield (namespace, interface, address) of each."""
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
                "CUDA_VISIBLE_DEVICES": "-1",  # use the CPU path even on a machine with a GPU
            }
            role = [sys.executable, "-m", "grounding.cli", "role", "rl", "--job", str(folder / "job.yaml")]
            role += ["--data", str(folder / "data"), "--model", str(model), "--out", str(folder / "out")]
            with (folder / f"attempt{attempt}-rank{rank}.log").open("wb") as log:
                command = ["ip", "netns", "exec", name, *role]
                self.pods.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def processes(self, rank: int) -> list[int]:
        """Return all processes in a pod."""
        wanted, found = f"EGM_TEST_POD={self.marks[rank]}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self, rank: int) -> None:
        """Kill the node with everything on it."""
        while left := self.processes(rank):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.pods[rank].poll()
            time.sleep(0.05)

    def wait(self, seconds: float) -> list[int]:
        """Wait until all pods have ended; return their exit codes."""
        until = time.monotonic() + seconds
        return [pod.wait(max(1.0, until - time.monotonic())) for pod in self.pods]

    def clear(self) -> None:
        for rank in range(len(self.pods)):
            self.kill(rank)


def _steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_progress(folder / "out" / "progress.jsonl") if line["step"] > 0]


def ask(node: str, url: str) -> dict:
    """Return the JSON of a GET request from inside a namespace."""
    code = f"import urllib.request; print(urllib.request.urlopen({url!r}, timeout=10).read().decode())"
    done = subprocess.run(
        ["ip", "netns", "exec", node, sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def _files(folder: Path) -> list[Path]:
    """Return verl's own files, one per attempt, oldest first."""
    return sorted((folder / "out" / "verl").glob("metrics-*-from-*.jsonl"))


def _written(file: Path) -> list[int]:
    return [line["step"] for line in complete_lines(file) if line["step"] > 0]


def train_through_a_kill(folder: Path, model: Path, victim: int, at_step: int, steps: int = STEPS) -> dict:
    """Train, kill node `victim` after step `at_step`, and start the gang again until it succeeds. Return what happened."""
    (folder / "out").mkdir(parents=True)
    (folder / "job.yaml").write_text(MANIFEST.replace("MODEL", str(model)).replace("STEPS", str(steps)))
    role = [sys.executable, "-m", "grounding.cli", "role", "prepare"]
    subprocess.run([*role, "--job", folder / "job.yaml", "--data", folder / "data"], check=True)
    begun, attempts, killed_at, before = time.monotonic(), [], 0.0, 0
    seconds: dict[str, float] = {}
    with two_nodes() as nodes:
        for attempt in range(1, 4):
            started, earlier = time.monotonic(), len(_files(folder))
            gang = Gang(nodes, folder, model, attempt)
            try:
                if not killed_at:
                    until = started + 420
                    while max(_steps(folder), default=0) < at_step:
                        assert time.monotonic() < until, "the training did not reach the step in time"
                        assert gang.pods[0].poll() is None and gang.pods[1].poll() is None, (
                            "a pod ended before the kill"
                        )
                        time.sleep(0.05)
                    # the worker queries rank 0 as the operator does
                    report = ask(nodes[1][0], f"http://{nodes[0][2]}:8090/progress")
                    assert report["step"] >= at_step and report["totalSteps"] == steps and report["attempt"] == attempt
                    killed_at = time.monotonic()
                    gang.kill(victim)
                    codes = gang.wait(420)
                    seconds["gang_ended_after_kill"] = round(time.monotonic() - killed_at, 1)
                    before = max(_written(_files(folder)[-1]))
                else:
                    while gang.pods[0].poll() is None and not any(_written(f) for f in _files(folder)[earlier:]):
                        time.sleep(0.05)
                    seconds.setdefault("first_step_after_start", round(time.monotonic() - started, 1))
                    codes = gang.wait(420)
            finally:
                gang.clear()
            attempts.append(codes)
            if codes == [0, 0]:
                break
    out = folder / "out"
    lines = [line for line in read_progress(out / "progress.jsonl") if line["step"] > 0]
    resumed = [int(file.stem.rpartition("-")[2]) for file in _files(folder)]
    return {
        "victim": victim,
        "at_step": at_step,
        "codes": attempts,
        "total": steps,
        "steps": [line["step"] for line in lines],
        "scores": [round(line["metrics"]["score"], 4) for line in lines],
        "resumed_from": resumed,
        "steps_repeated": before - resumed[-1] if len(attempts) > 1 else 0,
        "checkpoint": (checkpoints.peek(out / "checkpoints") or checkpoints.Checkpoint(0, out)).step,
        "world_size": checkpoints.world_size(out / "checkpoints" / f"global_step_{steps}"),
        "model": (out / "model" / "config.json").exists(),
        "seconds": {**seconds, "all": round(time.monotonic() - begun, 1)},
    }


def check(told: dict) -> None:
    """Check what happened and the final result, for any killed node and step."""
    first, last = told["codes"][0], told["codes"][-1]
    if first != [0, 0]:  # after the last step, the other pod may end well before it notices the kill
        assert first[told["victim"]] != 0 and len(told["codes"]) == 2, told
        assert told["resumed_from"][0] == 0 and told["resumed_from"][-1] >= told["at_step"] - 1, told
        assert first[1 - told["victim"]] != 0, told
    assert last == [0, 0], told
    assert told["steps"] == list(range(1, told["total"] + 1)) and told["checkpoint"] == told["total"], told
    assert told["world_size"] == 2 and told["model"], told
    assert all(math.isfinite(s) and 0.0 <= s <= 1.0 for s in told["scores"]), told
    assert max(told["scores"]) > 0.0, "expected a score above 0 in some step"


@pytest.mark.skipif(not can_make_nodes(), reason="network namespaces need root and ip")
def test_a_gang_of_two_nodes_goes_on_when_one_is_killed(tmp_path: Path, speaking_model: Path) -> None:
    check(train_through_a_kill(tmp_path / "run", speaking_model, victim=1, at_step=2))


def one(model: Path, victim: int, at_step: int, steps: int) -> dict:
    """Run a gang with a kill and check it; `failed` says what is wrong, and where the logs are."""
    folder = Path(tempfile.mkdtemp(prefix="egm-gang-"))
    told: dict = {"victim": victim, "at_step": at_step}
    try:
        told = train_through_a_kill(folder / "run", model, victim, at_step, steps)
        check(told)
    except (AssertionError, subprocess.SubprocessError, OSError, ValueError) as error:
        told |= {"failed": f"{type(error).__name__}: {error}", "logs": str(folder)}
    else:
        shutil.rmtree(folder)
    print(json.dumps(told), flush=True)
    return told


def summed_up(told: list[dict]) -> dict:
    """Return medians over the successful gangs, and their number."""
    good = [t for t in told if "failed" not in t]
    names = sorted({name for t in good for name in t["seconds"]})
    half = [(t["scores"][: t["total"] // 2], t["scores"][-(t["total"] // 2) :]) for t in good]
    return {
        "good": len(good),
        "of": len(told),
        "steps_repeated_most": max((t["steps_repeated"] for t in good), default=0),
        "seconds_median": {n: statistics.median(t["seconds"][n] for t in good if n in t["seconds"]) for n in names},
        "score_first_half": round(statistics.mean(s for a, _ in half for s in a), 4) if half else 0.0,
        "score_last_half": round(statistics.mean(s for _, b in half for s in b), 4) if half else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a tiny model that answers with boxes")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills = [(rng.randrange(2), rng.randrange(1, args.steps)) for _ in range(args.count)]
    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        told = list(pool.map(lambda kill: one(args.model.resolve(), *kill, args.steps), kills))
    summary = summed_up(told)
    if args.out:
        cores = len(os.sched_getaffinity(0))
        report = {
            "what": "RL on two nodes, network namespaces with a logical GPU each; a random one is killed after a random step",
            "machine": f"{platform.machine()}, {cores} cores, Python {platform.python_version()}",
            "at_a_time": args.parallel,
            "seed": args.seed,
            "summary": summary,
            "gangs": told,
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(summary))
    print(f"{summary['good']} of {summary['of']}")
    return 0 if summary["good"] == summary["of"] else 1


if __name__ == "__main__":
    sys.exit(main())
