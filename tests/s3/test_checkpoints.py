"""What a training job leaves on a real S3 server, and what a node with an empty disk takes up from it."""

from __future__ import annotations

import time
from pathlib import Path

from grounding.api import parse, resolve
from grounding.train import checkpoints, uploads
from grounding.train.checkpoints import Checkpoint


def _make(root: Path, step: int) -> Checkpoint:
    folder = root / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    for rank in range(2):
        for kind in ("model", "optim", "extra_state"):
            (folder / "actor" / f"{kind}_world_size_2_rank_{rank}.pt").write_bytes(bytes([rank + step]) * 100_000)
    checkpoints.mark_complete(folder)
    return Checkpoint(step, folder)


def _same(one: Path, two: Path) -> bool:
    files = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    return files == {p.relative_to(two): p.read_bytes() for p in two.rglob("*") if p.is_file()}


JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  data: {shapes: {}}
  output: OUTPUT
"""


def test_a_real_s3_server_that_goes_away_and_comes_back(tmp_path: Path, s3) -> None:
    """Everything that a job leaves comes to the server; a node with an empty disk goes on from there."""
    from grounding.storage import open_store

    server, bucket = s3
    uri = f"s3://{bucket}/runs/rl"
    job = resolve(parse(JOB.replace("OUTPUT", uri))[0])
    out = tmp_path / "here"
    with uploads.kept(job, out) as uploader:
        assert uploader is not None
        uploader.interval_s = 0.1
        _make(out / "checkpoints", 1)
        until = time.monotonic() + 60
        while uploader.newest() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        server.kill()
        last = _make(out / "checkpoints", 2)
        time.sleep(0.5)
        server.start()
        (out / "progress.jsonl").write_text('{"step": 2}\n')
        (out / "model").mkdir()
        (out / "model" / "config.json").write_text("{}")
        (out / "model" / "model.safetensors").write_bytes(b"weights")
    assert uploader.newest() == {"step": 2, "uri": f"{uri}/checkpoints/global_step_2"}
    names = {e.name for e in open_store(uri).entries()}
    assert {"progress.jsonl", "model/config.json", "model/model.safetensors"} <= names
    there = tmp_path / "there"
    with uploads.kept(job, there):
        assert _same(last.path, there / "checkpoints" / "global_step_2")
        assert (there / "progress.jsonl").read_text() == '{"step": 2}\n'
    with uploads.kept(resolve(parse(JOB.replace("OUTPUT", "pvc://claim/x"))[0]), out) as nothing:
        assert nothing is None
