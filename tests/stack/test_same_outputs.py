"""`egm run` and the operator's pods run the same job file and write the same outputs to the same S3 server.

The pipeline is real and small: SFT, RL by verl, evaluation by a real server; models, rows and pictures also come from
S3 (the pictures as a tar in parts). The test compares keys and bytes; `DECLARED` lists the bytes that may differ, with
the reason.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pods
import pytest

from grounding.data.shapes import ShapeSet, generate
from grounding.storage import open_store, send

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: warm}
spec:
  preset: tiny-sft
  model: {source: "s3://BUCKET/in/model"}
  data: {train: ["s3://BUCKET/in/sft.json"], images: ["s3://BUCKET/in/images.tar"]}
  output: s3://BUCKET/SIDE/warm
  resources: {nodes: 1, gpusPerNode: 0}
  hyperparameters: {maxSteps: 4, saveEvery: 2, warmupSteps: 2, batchSize: 8, microBatchSize: 8, learningRate: 1.0e-4}
---
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {trainJob: warm}
  data:
    train: ["s3://BUCKET/in/rl.json"]
    validation: ["s3://BUCKET/in/eval_data/refcoco_val.jsonl", "s3://BUCKET/in/eval_data/refcoco_testA.jsonl"]
    images: ["s3://BUCKET/in/images.tar"]
  output: s3://BUCKET/SIDE/rl
  resources: {nodes: 1, gpusPerNode: 0}
  hyperparameters: {maxSteps: 2, saveEvery: 1, validateEvery: 2, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}
---
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: eval}
spec:
  model: {trainJob: rl}
  engine: transformers
  data: {root: "s3://BUCKET/in/eval_data", files: [refcoco_val, refcoco_testA], images: ["s3://BUCKET/in/images.tar"]}
  sampling: {maxTokens: 40}
  concurrency: 2
  output: s3://BUCKET/SIDE/eval
"""


def _put_inputs(bucket: str, model: Path, folder: Path) -> None:
    made = folder / "set"
    generate(made, ShapeSet(seed=7, train=64, per_file=10, size=224))
    inputs = open_store(f"s3://{bucket}/in")
    send(model, f"s3://{bucket}/in/model", last="config.json")
    for name in ("sft.json", "rl.json"):
        inputs.upload(made / "train_data" / name, name)
    for stem in ("refcoco_val", "refcoco_testA"):
        inputs.upload(made / "eval_data" / f"{stem}.jsonl", f"eval_data/{stem}.jsonl")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for picture in sorted((made / "images").rglob("*")):
            if picture.is_file():
                tar.add(picture, picture.relative_to(made / "images").as_posix())
    data = whole.getvalue()
    inputs.write("images.tar.part_aa", data[: len(data) // 2])
    inputs.write("images.tar.part_ab", data[len(data) // 2 :])


def _lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def _progress(data: bytes) -> Any:
    def steady(line: dict[str, Any]) -> dict[str, Any]:
        metrics = {k: v for k, v in line["metrics"].items() if not k.startswith("seconds") and k != "tokensPerSecond"}
        return {k: v for k, v in line.items() if k != "time"} | {"metrics": metrics}

    return [steady(line) for line in _lines(data)]


def _rows(data: bytes) -> Any:
    return sorted(
        ({k: v for k, v in row.items() if k != "latency_s"} for row in _lines(data)), key=lambda row: row["key"]
    )


def _summary(data: bytes) -> Any:
    clock = {"requests_per_second", "wall_seconds", "servers", "costs"}
    summary = {k: v for k, v in json.loads(data).items() if k not in clock and not k.startswith("latency")}
    summary["files"] = [{k: v for k, v in f.items() if not k.startswith("latency")} for f in summary["files"]]
    return summary


def _run_config(data: bytes) -> Any:
    config = json.loads(data)
    for name in ("files", "images"):  # their paths on this machine
        config[name] = [Path(p).name for p in config[name]]
    return {k: v for k, v in config.items() if k not in ("endpoints", "started", "versions")}


def _parquet(data: bytes) -> Any:
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    return sorted((r for r in table.drop_columns(["latency_s"]).to_pylist()), key=lambda row: row["key"])


def _complete(data: bytes) -> Any:
    """Return the sizes in a checkpoint's marker, without the files whose content may differ."""
    return {
        k: v
        for k, v in json.loads(data)["files"].items()
        if not re.search(r"training_args\.bin|trainer_state|extra_state|metrics\.json", k)
    }


def _shards(data: bytes) -> Any:
    """Return the tensors of verl's file; the pickle also has a hash of the device mesh, which differs between processes."""
    with zipfile.ZipFile(io.BytesIO(data)) as saved:
        pickled = [(n, len(saved.read(n))) for n in saved.namelist() if n.endswith("data.pkl")]
        return pickled, {n: saved.read(n) for n in saved.namelist() if "/data/" in n}


def _clockless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if not re.match(r"(actor/)?perf/|timing_", k)}


def _verl(data: bytes) -> Any:
    return [(line["step"], _clockless(line["data"])) for line in _lines(data)]


def _step(data: bytes) -> Any:
    """Return a checkpoint's metrics of its own step."""
    return _clockless(json.loads(data)["data"])


def _state(data: bytes) -> Any:
    state = json.loads(data)
    clock = {"train_runtime", "train_tokens_per_second"}
    state["log_history"] = [{k: v for k, v in line.items() if k not in clock} for line in state["log_history"]]
    return state


# Allowed differences: paths, times, durations, and random values of a Python process.
DECLARED: dict[str, Callable[[bytes], Any] | None] = {
    r"(warm|rl)/progress\.jsonl": _progress,
    r"warm/checkpoints/[^/]+/training_args\.bin": None,  # this pickle contains the path of the job's folder
    r"warm/checkpoints/[^/]+/trainer_state\.json": _state,
    r"rl/checkpoints/[^/]+/actor/(model|optim)_world_size_1_rank_0\.pt": _shards,
    r"rl/checkpoints/[^/]+/actor/extra_state_world_size_1_rank_0\.pt": None,  # random states that are never used
    r"rl/checkpoints/[^/]+/metrics\.json": _step,
    r"(warm|rl)/checkpoints/[^/]+/complete\.json": _complete,
    r"(warm|rl)/tensorboard/events": None,  # contains times, host and process id
    r"rl/verl/metrics\.jsonl": _verl,
    r"eval/results/part\.jsonl": _rows,
    r"eval/results\.parquet": _parquet,
    r"eval/summary\.json": _summary,
    r"eval/run_config\.json": _run_config,
}
# names with a time or a random word
_NAMES = {
    r"results/part-.*\.jsonl": "results/part.jsonl",
    r"tensorboard/events\..*": "tensorboard/events",
    r"verl/metrics-\d+T\d+-from-0\.jsonl": "verl/metrics.jsonl",
}


def _outputs(bucket: str, side: str) -> dict[str, bytes]:
    store = open_store(f"s3://{bucket}/{side}")
    found: dict[str, bytes] = {}
    for entry in store.entries():
        name = entry.name
        for pattern, plain in _NAMES.items():
            name = re.sub(pattern, plain, name)
        # files whose names differ only by a number are compared as one
        found[name] = found.get(name, b"") + store.read(entry.name)
    return found


def _compared(name: str, data: bytes) -> Any:
    for pattern, read in DECLARED.items():
        if re.fullmatch(pattern, name):
            return None if read is None else read(data)
    return data


@pytest.mark.timeout(2400)
def test_egm_run_and_the_operator_s_pods_write_the_same(
    s3: tuple[Any, str], tmp_path: Path, speaking_model: Path
) -> None:
    _, bucket = s3
    _put_inputs(bucket, speaking_model, tmp_path)

    def manifest(side: str) -> Path:
        path = tmp_path / f"{side}.yaml"
        path.write_text(MANIFEST.replace("BUCKET", bucket).replace("SIDE", side))
        return path

    secret = {n: v for n, v in os.environ.items() if n.startswith("AWS_")}
    plain = {n: os.environ[n] for n in ("PATH", "HOME") if n in os.environ}
    command = [
        sys.executable,
        "-m",
        "grounding.cli",
        "run",
        "-f",
        str(manifest("here")),
        "--runs",
        str(tmp_path / "runs"),
    ]
    env = plain | secret | {"EGM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(pods.REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    objects = pods.render(manifest("there"), EGM_OPERATOR_STORAGE_SECRET="storage")
    jobs: dict[str, list[dict[str, Any]]] = {}
    for obj in objects:
        jobs.setdefault(obj["metadata"]["labels"]["grounding.egm.dev/job"], []).append(obj)
    assert list(jobs) == ["warm", "rl", "eval"]
    for name, its in jobs.items():
        pods.run_job(its, tmp_path / "pods" / name, secret)

    here, there = _outputs(bucket, "here"), _outputs(bucket, "there")
    assert sorted(here) == sorted(there)
    different = [name for name in here if _compared(name, here[name]) != _compared(name, there[name])]
    assert different == []
    for name in (
        "warm/model/model.safetensors",
        "rl/model/model.safetensors",
        "eval/summary.json",
        "rl/progress.jsonl",
    ):
        assert name in here
    assert {"warm/checkpoints/checkpoint-4/complete.json", "rl/checkpoints/global_step_2/complete.json"} <= set(here)
    plainly = [n for n in here if not any(re.fullmatch(p, n) for p in DECLARED)]
    assert len(plainly) > 20, "expected more than 20 files that are equal byte by byte"
    summary = json.loads(here["eval/summary.json"])
    assert (summary["done"], summary["errors"]) == (20, 0)
