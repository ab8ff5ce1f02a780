"""SFT on two pods that share no folder, only an S3 server: one is killed, both start again with empty disks, and no uploaded step is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson
import pytest

from grounding.cli import run as egm
from grounding.data.shapes import ShapeSet, generate
from grounding.progress import read_progress
from grounding.storage import open_store
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from tests.stack.test_sft_shard import _close, _losses, _port

pytestmark = [pytest.mark.train, pytest.mark.timeout(900)]
STEPS = 12
MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  model: {source: "tiny://"}
  data: {shapes: {train: 96, perFile: 2}}
  resources: {nodes: 2}
  hyperparameters:
    {maxSteps: STEPS, saveEvery: EVERY, warmupSteps: 2, batchSize: 8, microBatchSize: 2, freezeVision: true, keepCheckpoints: 2}
"""


class Pods:
    """Both pods of one attempt, each with a new, empty disk."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        attempt: int,
        every: int = 3,
        change: str = "",
        manifest: str = MANIFEST,
        **second: str,
    ) -> None:
        """`change` replaces `perFile: 2` in the second pod's job; `second` are further variables of the second pod's environment."""
        self.disks = [folder / f"attempt-{attempt}" / f"disk-{rank}" for rank in range(2)]
        self.logs = [disk.with_suffix(".log") for disk in self.disks]
        self.marks = [f"{folder}-{attempt}-{rank}" for rank in range(2)]
        port, self.pods = _port(), []
        for rank, disk in enumerate(self.disks):
            disk.mkdir(parents=True)
            job = disk.with_suffix(".yaml")
            text = manifest.replace("STEPS", str(STEPS)).replace("EVERY", str(every))
            job.write_text(text.replace("perFile: 2", change) if change and rank else text)
            # each pod prepares its own data, as its init container does on a cluster
            assert egm(["role", "prepare", "--job", str(job), "--data", str(disk / "data")]) == 0
            env = os.environ | {
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "EGM_SFT_SHARD": "1",
                "OMP_NUM_THREADS": "1",
                "EGM_OUTPUT": uri,
                "EGM_ATTEMPT": str(attempt),
                "EGM_GRACE_SECONDS": "90",
                "CUDA_VISIBLE_DEVICES": "-1",
                "EGM_TEST_POD": self.marks[rank],
                **(second if rank else {}),
            }
            role = ["role", "sft", "--job", job, "--data", disk / "data", "--model", "tiny://", "--out", disk]
            command = [sys.executable, "-m", "grounding.cli", *map(str, role)]
            with self.logs[rank].open("ab") as log:
                self.pods.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def said(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in self.logs)

    def steps(self) -> int:
        return max((line["step"] for line in read_progress(self.disks[0] / "progress.jsonl")), default=0)

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for an event while both pods run."""
        until = time.monotonic() + 300
        while not reached():
            assert time.monotonic() < until and all(pod.poll() is None for pod in self.pods), self.said()
            time.sleep(0.01)

    def await_step(self, step: int) -> None:
        self.until(lambda: self.steps() >= step)

    def kill(self, rank: int) -> None:
        """Simulate a power cut of the node. The processes are found by their environment, because torchrun gives each rank its own session."""
        wanted = f"EGM_TEST_POD={self.marks[rank]}".encode()
        while found := [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _has(p, wanted)]:
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.pods[rank].poll()
            time.sleep(0.02)

    def wait(self) -> list[int]:
        codes = []
        for pod in self.pods:
            try:
                codes.append(pod.wait(400))
            except subprocess.TimeoutExpired:
                for rank in range(2):
                    self.kill(rank)
                raise AssertionError(self.said()) from None
        return codes


def _has(process: Path, wanted: bytes) -> bool:
    with suppress(OSError):
        return wanted in (process / "environ").read_bytes().split(b"\0")
    return False


def _saved(uri: str) -> int:
    """Return the newest checkpoint that is complete in the store."""
    whole = [found for found in checkpoints.inventory(open_store(uri)) if found.whole]
    return max((found.step for found in whole), default=0)


def test_one_of_two_pods_is_killed_and_both_start_again_with_empty_disks(tmp_path: Path, s3) -> None:
    _, bucket = s3
    straight = Pods(tmp_path / "straight", f"s3://{bucket}/straight", 1)
    assert straight.wait() == [0, 0], straight.said()
    uri = f"s3://{bucket}/killed"
    first = Pods(tmp_path / "killed", uri, 1)
    until = time.monotonic() + 300
    while _saved(uri) < 3:
        assert time.monotonic() < until and all(pod.poll() is None for pod in first.pods), first.said()
        time.sleep(0.1)
    first.kill(1)
    code = first.pods[0].wait(300)
    assert code not in (0, 2), first.said()
    saved = _saved(uri)
    assert 3 <= saved < STEPS
    second = Pods(tmp_path / "killed", uri, 2)
    assert second.wait() == [0, 0], second.said()
    assert f"resuming after step {saved}" in second.logs[0].read_text()
    assert _losses(second.disks[0]) == _losses(straight.disks[0]) and len(_losses(second.disks[0])) == STEPS
    _close(second.disks[0] / "model", straight.disks[0] / "model", 0.0)
    assert not (second.disks[1] / "model").exists(), (
        "expected no model on the second pod's disk, because only the first pod exports"
    )
    # each pod has only its own shard on its disk, the store has both
    here = [sorted(p.name for p in d.glob(f"checkpoints/checkpoint-{STEPS}/*/*.distcp")) for d in second.disks]
    assert set(here[0]) == {"__0_0.distcp"} and set(here[1]) == {"__1_0.distcp"}
    assert _saved(uri) == STEPS
    copy = tmp_path / "export"
    assert egm(["checkpoint", "export", f"{uri}/checkpoints/checkpoint-{STEPS}", str(copy)]) == 0
    _close(copy, second.disks[0] / "model", 0.0)


@pytest.mark.parametrize("asked", [(0, 1), (1,)], ids=["both", "the second"])
def test_sigterm_saves_the_step_under_way_in_the_store(tmp_path: Path, s3, asked: tuple[int, ...]) -> None:
    _, bucket = s3
    uri = f"s3://{bucket}/stopped"
    first = Pods(tmp_path / "stopped", uri, 1, every=100)
    first.await_step(2)
    for rank in asked:
        first.pods[rank].terminate()
    assert first.wait() == [143, 143], first.said()
    trained = first.steps()
    assert 2 <= trained < STEPS and _saved(uri) == trained
    second = Pods(tmp_path / "stopped", uri, 2, every=100)
    assert second.wait() == [0, 0], second.said()
    assert f"resuming after step {trained}" in second.logs[0].read_text()
    assert [line["step"] for line in read_progress(second.disks[0] / "progress.jsonl")] == list(range(1, STEPS + 1))


def test_sigterm_while_the_best_step_waits_for_files_of_the_other_pod_is_a_stop(tmp_path: Path, s3) -> None:
    _, bucket = s3
    made = tmp_path / "set"
    generate(made, ShapeSet(seed=7, train=24, per_file=2, size=224))
    rows = orjson.loads((made / "train_data/sft.json").read_bytes())
    for name, some in (("train", rows[:16]), ("validation", rows[16:20])):
        (made / f"{name}.json").write_bytes(orjson.dumps(some))
    files = f"{{train: [{made}/train.json], validation: [{made}/validation.json], images: [{made}/images]}}"
    # at this learning rate no weight changes, so both validations have the same figure, and the first step stays the best
    keep_best = "{learningRate: 1.0e-30, validateEvery: 1, keepBest: valLoss, "
    manifest = MANIFEST.replace("{shapes: {train: 96, perFile: 2}}", files).replace("STEPS", "2")
    manifest = manifest.replace("{maxSteps", f"{keep_best}maxSteps").replace("warmupSteps: 2", "warmupSteps: 1")
    uri = f"s3://{bucket}/best"
    pods = Pods(tmp_path / "best", uri, 1, every=1, manifest=manifest, EGM_FAILPOINTS="upload.file=error")
    pods.until(lambda: all(checkpoints.is_complete(disk / "checkpoints" / "checkpoint-2") for disk in pods.disks))
    pods.until(lambda: "exporting step 1: " in pods.logs[0].read_text())
    for pod in pods.pods:
        pod.terminate()
    assert pods.wait() == [143, 143], pods.said()
    assert "stopping without a model: checkpoint-1 is not complete in s3://" in pods.logs[0].read_text(), pods.said()
    assert not (pods.disks[0] / "model").exists() and _saved(uri) == 0


def test_pods_that_have_prepared_other_data_are_refused(tmp_path: Path, s3) -> None:
    _, bucket = s3
    pods = Pods(tmp_path / "apart", f"s3://{bucket}/apart", 1, change="perFile: 2, seed: 8")
    assert pods.wait() == [1, 1], pods.said()
    assert "have different data or models" in pods.logs[0].read_text() and "spec.data" in pods.logs[0].read_text()
    assert uploads.checkpoints_in(open_store(f"s3://{bucket}/apart")) == []
