"""The files of a training job on a real S3 server, and a node with an empty disk that continues from them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grounding.api import parse, resolve
from grounding.api.report import ReportedCheckpoint
from grounding.files import publish
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from grounding.train.checkpoints.local import Checkpoint


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
    """The server is stopped and started during the uploads; afterwards a node with an empty disk continues from all files of the job."""
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
        with publish(out / "model") as folder:  # a folder without a manifest is not a finished model
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(b"weights")
    assert uploader.newest() == ReportedCheckpoint(step=2, uri=f"{uri}/checkpoints/global_step_2")
    names = {e.name for e in open_store(uri).entries()}
    assert {"progress.jsonl", "model/config.json", "model/model.safetensors"} <= names
    there = tmp_path / "there"
    with uploads.kept(job, there):
        assert _same(last.path, there / "checkpoints" / "global_step_2")
        assert (there / "progress.jsonl").read_text() == '{"step": 2}\n'
    with uploads.kept(resolve(parse(JOB.replace("OUTPUT", "pvc://claim/x"))[0]), out) as nothing:
        assert nothing is None


UPLOAD = """
import sys
from pathlib import Path
from grounding.storage import open_store
from grounding.train.checkpoints import upload
from grounding.train.checkpoints.local import Checkpoint
upload.push(open_store(sys.argv[1]), Checkpoint(20, Path(sys.argv[2])))
"""


@pytest.mark.parametrize("place", [*(f"upload.file@{n}" for n in (1, 4, 6)), "upload.marker", "upload.marked"])
def test_kill_9_of_an_upload_then_another_attempt_elsewhere(
    tmp_path: Path, s3, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The restored checkpoint is that of one attempt by its digests, although both have files of equal sizes."""
    from grounding.storage import open_store

    _, bucket = s3
    uri, made = f"s3://{bucket}/runs/{place.replace('@', '-')}", []
    for number, shift in ((1, 0), (2, 7)):
        monkeypatch.setenv("EGM_ATTEMPT", str(number))
        folder = _make(tmp_path / str(number), 20).path
        (folder / "complete.json").unlink()
        for file in folder.rglob("*.pt"):
            file.write_bytes(bytes([file.read_bytes()[0] + shift]) * 100_000)
        checkpoints.mark_complete(folder)
        made.append(folder)
    command = [sys.executable, "-c", UPLOAD, uri]
    killed = subprocess.run(
        [*command, str(made[0])], env={**os.environ, "EGM_FAILPOINTS": f"{place}=kill"}, check=False
    )
    assert killed.returncode == -9
    found = uploads.restore(open_store(uri), tmp_path / "c")
    assert found is None if place != "upload.marked" else found is not None and _same(made[0], found.path)
    subprocess.run([*command, str(made[1])], check=True)
    last = uploads.restore(open_store(uri), tmp_path / "d")
    assert last is not None and _same(made[1], last.path)
    # the first attempt continues to upload although the second one has begun
    subprocess.run([*command, str(made[0])], check=True)
    after = uploads.restore(open_store(uri), tmp_path / "e")
    assert after is not None and _same(made[1], after.path)


BOTH = """
import sys
from pathlib import Path
from grounding.storage import open_store
from grounding.train.checkpoints import upload
from grounding.train.checkpoints.local import Checkpoint
store = open_store(sys.argv[1])
uploader = upload.Uploader(Path(sys.argv[2]).parent, store, 2, claim=upload.claim(store))
print("claimed", flush=True)
sys.stdin.readline()
sys.exit(0 if upload.push(store, Checkpoint(20, Path(sys.argv[2])), mine=uploader.mine) else 7)
"""


def test_two_attempts_on_two_machines_at_once(tmp_path: Path, s3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt seems dead but continues in the middle of its upload, and none of its files count."""
    from grounding.storage import open_store

    _, bucket = s3
    uri, made, alive = f"s3://{bucket}/runs/both", [], []
    for number, shift in ((1, 0), (2, 7)):
        monkeypatch.setenv("EGM_ATTEMPT", str(number))
        folder = _make(tmp_path / str(number), 20).path
        (folder / "complete.json").unlink()
        for file in folder.rglob("*.pt"):
            file.write_bytes(bytes([file.read_bytes()[0] + shift]) * 100_000)
        checkpoints.mark_complete(folder)
        made.append(folder)
        command = [sys.executable, "-c", BOTH, uri, str(folder)]
        alive.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert alive[-1].stdout is not None and alive[-1].stdout.readline() == "claimed\n"
    for process in reversed(alive):  # both must finish their uploads; the second attempt began later
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(120) for process in alive] == [7, 0]
    last = uploads.restore(open_store(uri), tmp_path / "c")
    assert last is not None and _same(made[1], last.path)
