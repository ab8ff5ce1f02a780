"""RL in verl with unreadable pictures: prompts without an answer are counted, never scored as wrong, and too many end the run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest

from grounding.progress import read_progress
from tests.helpers.roles import role_command

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  data: {shapes: {train: 8, perFile: 40}}
  hyperparameters: {maxSteps: 4, epochs: 2, saveEvery: 4, validateEvery: 4, validateBeforeTrain: false, batchSize: 4,
                    miniBatchSize: 4, rollouts: 2, responseLength: 16}
"""


def _pictures(parquet: Path) -> list[Path]:
    """Return the picture of each row."""
    return [Path(row[0]) for row in pq.read_table(parquet).column("images").to_pylist()]


def _spoil(picture: Path) -> None:
    picture.write_bytes(b"no picture" * (picture.stat().st_size // 10))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Path, Path]:
    """Prepare the data of a job; return the job, its data, and the folder of its rows."""
    folder = tmp_path_factory.mktemp("failing")
    job, data = folder / "job.yaml", folder / "data"
    job.write_text(MANIFEST.replace("MODEL", str(tiny_model)))
    subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
    return job, data, next(data.glob("prepared-*"))


def test_a_few_are_counted_and_many_end_the_run(
    prepared: tuple[Path, Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    job, data, rows = prepared
    seen, held = _pictures(rows / "train.parquet"), _pictures(rows / "val.parquet")
    total, few = len(held), held.count(held[0])
    assert 0 < few <= total // 10, "expected that the first spoiled picture belongs to at most a tenth of the prompts"
    for picture in (seen[0], held[0]):
        _spoil(picture)

    def run(out: Path) -> subprocess.CompletedProcess[str]:
        out.mkdir()
        command = role_command("rl", "--job", job, "--data", data, "--model", tiny_model, "--out", out)
        return subprocess.run(command, capture_output=True, text=True, timeout=1200)

    done = run(tmp_path / "few")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = read_progress(tmp_path / "few" / "progress.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["metrics"]["rollouts"] == 8 for line in lines)
    assert sum(line["metrics"]["rolloutsFailed"] for line in lines) == 4 * seen.count(seen[0]), (
        "expected four failed rollouts for each row with the first picture: two rollouts in two epochs"
    )
    last = lines[-1]["metrics"]
    assert (last["valPrompts"], last["valFailed"]) == (total, few)
    dump = [orjson.loads(line) for line in (tmp_path / "few/validation/4.jsonl").read_text().splitlines()]
    assert len(dump) == total - few
    assert last["valAccuracy"] == pytest.approx(sum(row["acc"] for row in dump) / len(dump))

    for picture in set(held[: total // 4]):
        _spoil(picture)
    many = sum(picture in held[: total // 4] for picture in held)
    ended = run(tmp_path / "many")
    assert ended.returncode == 1
    assert f"{many} of {total} validation prompts got no answer" in ended.stderr
    last = read_progress(tmp_path / "many" / "progress.jsonl")[-1]["metrics"]
    assert last["valFailed"] == many and "valAccuracy" not in last
