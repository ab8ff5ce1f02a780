"""SFT as a gang of two pods with a shared claim: the one of rank 1 is killed, and the gang continues from its checkpoint.

The gang is a PyTorchJob. EGM_E2E_BACKENDS=job runs the test with an Indexed Job instead.
The result equals that of one process of `egm run`, except for the rounding of sums in another order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.operator_kit import until
from tests.e2e.kit import Pipeline, egm, folder_claim, write

STEPS = 96


def _job(**spec: Any) -> dict[str, Any]:
    steps = {"maxSteps": STEPS, "saveEvery": 8, "warmupSteps": 4, "microBatchSize": 8}
    shapes = {"seed": 7, "train": 400, "perFile": 2}
    spec = {"preset": "tiny-sft", "data": {"shapes": shapes}, "hyperparameters": steps, **spec}
    kind = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingTrainJob"}
    return {**kind, "metadata": {"name": "gang"}, "spec": spec}


@pytest.fixture
def claim(pipeline: Pipeline, tmp_path: Path) -> Iterator[Path]:
    """Create the claim `egm` over a folder of this machine, and yield the folder."""
    for path in (tmp_path, *tmp_path.parents):  # pods run as user 1000
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o777)
    with folder_claim(pipeline.kubectl, "egm", tmp_path / "volume"):
        yield tmp_path / "volume"


def _losses(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["metrics"]["loss"]) for line in lines if "step" in line]


@pytest.mark.parametrize("backend", os.environ.get("EGM_E2E_BACKENDS", "pytorchjob").split(","))
def test_two_pods_learn_what_one_process_learns(pipeline: Pipeline, claim: Path, tmp_path: Path, backend: str) -> None:
    job = _job(resources={"nodes": 2, "gpusPerNode": 1}, output="pvc://egm/gang", backend=backend)
    pipeline.submit([job], tmp_path)
    pipeline.step("gtj/gang", 8)
    names = sorted(p["metadata"]["name"] for p in pipeline.pods("gang", "sft"))
    beginnings = {"pytorchjob": ("gang-a1-master-0", "gang-a1-worker-0"), "job": ("gang-a1-0-", "gang-a1-1-")}[backend]
    assert len(names) == 2 and all(map(str.startswith, names, beginnings)), names
    pipeline.kill("gang", "sft", 1)
    until("a second attempt", lambda: pipeline.job("gtj/gang").get("attempt") == 2, 180)
    status = pipeline.phase("gtj/gang", "Succeeded", seconds=600)
    assert status["attempt"] == 2 and status["progress"]["step"] == status["checkpoint"]["step"] == STEPS
    there = _losses(claim / "gang" / "progress.jsonl")

    manifest = write([_job()], tmp_path / "gang.yaml")
    egm("run", "-f", str(manifest), "--runs", str(tmp_path / "runs"))
    here = _losses(tmp_path / "runs" / "gang" / "gang" / "progress.jsonl")
    assert [step for step, _ in there] == [step for step, _ in here] == list(range(1, STEPS + 1))
    assert max(abs(a - b) for (_, a), (_, b) in zip(there, here, strict=True)) < 0.002, (there, here)
