"""At the end of rank 0, the termination message names the checkpoint that was uploaded after training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grounding.api import parse, resolve
from grounding.progress import ProgressWriter
from grounding.train.checkpoints import local as checkpoints
from grounding.train.rank0 import surrounded

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: j}
spec: {preset: tiny-sft, data: {shapes: {}}, output: "file://OUTPUT"}
"""


def _step(out: Path, step: int) -> None:
    folder = out / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * step)
    checkpoints.mark_complete(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_checkpoint_is_in_the_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    log, out = tmp_path / "termination", tmp_path / "work"
    monkeypatch.setenv("EGM_TERMINATION_LOG", str(log))
    job = resolve(parse(JOB.replace("OUTPUT", str(tmp_path / "output")))[0])
    try:
        with surrounded(job, out, gpus=0):
            writer = ProgressWriter(out / "progress.jsonl", "sft", 7, 0)
            writer.step(7, {"loss": 0.5})
            writer.close()
            _step(out, 7)
            if fails:
                raise KeyError("trouble")
    except KeyError:
        assert fails
    told = json.loads(log.read_text())
    assert told["step"] == 7
    assert told["checkpoint"] == {"step": 7, "uri": str(tmp_path / "output/checkpoints/checkpoint-7")}
