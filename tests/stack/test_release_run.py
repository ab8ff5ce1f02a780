"""The published jobs with a miniature of the release on a local hub with the published names: SFT, RL, the eight files,
report.

Only the output of each job and the sizes below are changed, so that the jobs run on two cores. Runs by name; two minutes.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hub import Hub
from release import COUNT, is_flipped, write_release
from ruamel.yaml import YAML

from grounding.models.tiny import build, demo_corpus
from grounding.progress import read_progress

ROOT = Path(__file__).parents[2]
MODELS = {
    "Qwen/Qwen3-VL-8B-Thinking": "qwen3-vl",
    "JamesZGQ/EGM-8B-SFT": "qwen3-vl",
    "JamesZGQ/EGM-8B": "qwen3-vl",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
}
CPU: dict[str, dict[str, Any]] = {
    "sft": {"batchSize": 4, "maxSteps": 2, "saveEvery": 2, "dtype": "float32"},
    "rl": {
        "batchSize": 2, "rollouts": 2, "maxSteps": 1, "warmupSteps": 0, "saveEvery": 1, "validateEvery": 1, "validateBeforeTrain": False,
        "promptLength": 512, "responseLength": 16, "tokensPerGpu": 2048, "klCoefficient": 0.0, "dtype": "float32",
    },
}  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment of a machine with a hub that has the release and tiny models under the published names."""
    folder = tmp_path_factory.mktemp("release")
    corpus = [*demo_corpus(), "It is on the left.\n</think>\n\n```json\n[\n\t{}\n]\n```"]
    files = {"datasets/JamesZGQ/EGM_Datasets": _files(write_release(folder / "EGM_Datasets"))}
    for number, (name, kind) in enumerate(MODELS.items()):
        build(folder / name, corpus, seed=number, kind=kind)
        files[name] = _files(folder / name)
    hub = Hub(files)
    named = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "EGM_"))}
    yield named | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "EGM_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    hub.stop()


def _job(name: str, out: Path) -> Path:
    """Write a published job with another output and sizes for this machine."""
    yaml = YAML()
    documents = list(yaml.load_all((ROOT / "jobs" / f"{name}.yaml").read_text()))
    for job in documents:
        spec = job["spec"]
        spec["output"] = str(out / "kept" / job["metadata"]["name"])
        if job["kind"] == "GroundingTrainJob":
            method = "sft" if spec["preset"].endswith("sft") else "rl"
            spec["resources"] = {"nodes": 1, "gpusPerNode": 0}
            spec["hyperparameters"] = CPU[method]
        else:
            spec["engine"], spec["sampling"], spec["concurrency"] = "transformers", {"maxTokens": 16}, 8
            spec.pop("gpusPerServer")
    path = out / f"{name}.yaml"
    with path.open("w") as f:
        yaml.dump_all(documents, f)
    return path


def _egm(world: dict[str, str], *words: str | Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "grounding.cli", *map(str, words)]
    done = subprocess.run(command, env=world, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_sft_then_rl_then_the_eight_files_and_the_report(world: dict[str, str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    _egm(world, "run", "-f", _job("egm8b-pipeline", tmp_path), "--runs", runs)
    run = runs / "egm8b-pipeline"
    sft, rl, evaluation = (run / f"egm8b-pipeline-{name}" for name in ("sft", "rl", "eval"))
    assert [line["step"] for line in read_progress(sft / "progress.jsonl")] == [1, 2]
    assert [line["step"] for line in read_progress(rl / "progress.jsonl") if line["step"]] == [1]
    summary = json.loads((evaluation / "summary.json").read_text())
    assert (summary["done"], summary["errors"], summary["left_out"]) == (8 * COUNT, 0, 0)
    assert [f["name"] for f in summary["files"]][:3] == ["refcoco_val", "refcoco_testA", "refcoco_testB"]
    report = _egm(world, "report", run)
    assert (run / "report/index.html").is_file(), report


@pytest.mark.parametrize("name", ["egm8b-sft", "egm8b-rl", "egm8b-eval"])
def test_each_job_by_itself(world: dict[str, str], tmp_path: Path, name: str) -> None:
    _egm(world, "run", "-f", _job(name, tmp_path), "--runs", tmp_path / "runs")
    folder = tmp_path / "runs" / name / name
    state = json.loads((folder / "state.json").read_text())
    assert state["phase"] == "Succeeded"
    if name == "egm8b-eval":
        compared = _egm(world, "compare", folder, "--paper", "EGM-8B", code=1)
        assert "8 of 8 files are incomplete" in compared


def test_raw_rows_are_prepared_for_rl(world: dict[str, str], tmp_path: Path) -> None:
    job = _job("internvl-rl", tmp_path)
    _egm(world, "role", "prepare", "--job", job, "--data", tmp_path / "data")
    [train] = (tmp_path / "data").rglob("train.parquet")
    rows = pq.read_table(train).to_pylist()
    assert len(rows) == COUNT
    for number, row in enumerate(rows):
        assert "<ref>dog" in row["prompt"][0]["content"]
        assert is_flipped(io.BytesIO(Path(row["images"][0]).read_bytes()).getvalue()) == bool(number % 2)
