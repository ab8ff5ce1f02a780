"""Measure whole steps of reinforcement learning at real size: `egm role rl` and verl started by hand, with random weights of real shapes.

    python bench/gpu/rl_step.py --size 4b --out DIR

Arms:
  product  `egm role prepare` and `egm role rl` with the preset; only the batch is scaled to one GPU
  hand     `python -m verl.trainer.main_ppo` with the same overrides and without our code around it. `hand_plugin.py` only adds our
           replacements for FlashAttention 2, which no lock contains (attention of packed rows, log-probabilities in chunks), the frozen
           vision tower, and our fix for steps whose answers all have the same length, which would end the run
If there is a GPU for each arm, they run side by side, otherwise one after the other. Random weights never end an answer, so each answer has
`--response` tokens. Both runs are killed after `--steps` steps, so that no checkpoint of 50 GB is written. The first step compiles and is left
out of the medians. Writes DIR/rl.json: seconds by phase, tokens/s, memory, and GPU utilisation between the ends of the first and the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from rl import machine, measured, metric_files, versions
from train import CUDA, JOB, SIZES, build, draw_picture, folder_of, save

from grounding.api import RlJob, load_job
from grounding.data import jobdata
from grounding.files import complete_lines
from grounding.local.process import TOKEN
from grounding.models import PACKED_ROWS, attention
from grounding.runtime import flashinfer, processes
from grounding.train.rl import reward
from grounding.train.rl.overrides import overrides

ARMS = ("product", "hand")


def rows_of(folder: Path, number: int) -> None:
    """Draw RL rows, with one picture for every four rows and boxes in 0..1000."""
    (folder / "img").mkdir(parents=True)
    rows, name = [], ""
    for i in range(number):
        if i % 4 == 0:
            name = f"img/{i}.jpg"
            draw_picture(folder / name)
        ask = f"<image>\nPlease provide the bounding box coordinate of the region this sentence describes: <ref>thing {i}</ref>"
        turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": "<box>[78, 125, 468, 416]</box>"}]
        rows.append({"id": i, "image": name, "width": 640, "height": 480, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps(rows[:8]))


@dataclass
class Arm:
    """A running arm."""

    name: str
    gpus: list[int]
    out: Path
    child: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    steps: list[float] = field(default_factory=list)
    """Times at which each step was logged, in seconds since 1970"""
    ended: str = ""

    def look(self, wanted: int, deadline: float) -> None:
        """Record the steps that have finished. Kill the run once it has logged `wanted` steps, or at `deadline`."""
        logged = sum(1 for file in metric_files(self.out) for line in complete_lines(file) if line["step"] > 0)
        self.steps += [time.time()] * (logged - len(self.steps))
        code = self.child.poll()
        if code is not None:
            self.ended = f"exit code {code}"
        elif len(self.steps) >= wanted:
            self.ended = "killed, as planned"
        elif time.monotonic() - self.began > deadline:
            self.ended = "deadline"
        if self.ended:
            processes.kill(lambda: processes.marked(TOKEN, self.name))
            self.child.wait()


def start(name: str, job_file: Path, data: Path, model: Path, work: Path, gpus: list[int]) -> Arm:
    """Start an arm on some GPUs."""
    out = work / f"out-{name}"
    (out / "verl").mkdir(parents=True)
    environment = os.environ | {
        TOKEN: name,
        # these machines report only the memory in use, which Ray would mistake for the limit
        "RAY_memory_monitor_refresh_ms": "0",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)) if CUDA else "-1",
    }
    if name == "product":
        where = ["--job", str(job_file), "--data", str(data), "--model", str(model), "--out", str(out)]
        command = [sys.executable, "-m", "grounding.cli", "role", "rl", *where]
    else:
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *by_hand(job_file, data, model, out)]
        environment |= {
            "VERL_FILE_LOGGER_PATH": str(out / "verl" / "metrics-1-from-0.jsonl"),
            "VERL_USE_EXTERNAL_MODULES": "hand_plugin",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "HYDRA_FULL_ERROR": "1",
            **flashinfer.OFF,
        }
    with (work / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    return Arm(name, gpus, out, child)


def by_hand(job_file: Path, data: Path, model: Path, out: Path) -> list[str]:
    """Return the command of someone who follows the reference: the same overrides, without those that call our code."""
    job = load_job(job_file)
    assert isinstance(job, RlJob)
    ready = jobdata.locate(job, data)
    assert ready.train_parquet and ready.val_parquet
    words = overrides(
        job,
        train_file=ready.train_parquet,
        validation_file=ready.val_parquet,
        model=str(model),
        out=out,
        reward_file=Path(reward.__file__),
        cpu=not CUDA,
        attention=PACKED_ROWS if CUDA else "sdpa",
    )
    ours = ("trainer.checkpoint_callback_class", "ray_kwargs.ray_init.num_cpus")
    return [word for word in words if not word.startswith(ours)]


def sample(gpus: int, into: Path, every_ms: int = 500) -> subprocess.Popen[bytes]:
    """Start nvidia-smi, which records the state of each GPU, by default twice per second."""
    asked = "--query-gpu=timestamp,index,utilization.gpu,memory.used"
    with into.open("wb") as file:
        return subprocess.Popen(
            ["nvidia-smi", asked, "--format=csv,noheader,nounits", "-lms", str(every_ms)], stdout=file
        )


def busy(samples: Path, gpus: list[int], since: float, until: float) -> dict[str, float]:
    """Return the share of samples between two times in which the GPUs computed, their mean utilisation in percent, and their peak memory."""
    found, peak = [], 0.0
    for line in samples.read_text().splitlines():
        parts = [p.strip() for p in line.split(",")]
        if len(parts) != 4 or int(parts[1]) not in gpus:
            continue
        day = time.strptime(parts[0].split(".")[0], "%Y/%m/%d %H:%M:%S")
        if since <= time.mktime(day) <= until:
            peak = max(peak, float(parts[3]))
            found.append(float(parts[2]))
    if not found:
        return {}
    return {
        "samples": len(found),
        "busy_share": round(sum(v > 0 for v in found) / len(found), 3),
        "use_mean_percent": round(statistics.mean(found), 1),
        "memory_peak_mib": peak,
    }


def told(arm: Arm, samples: Path, log: Path) -> dict[str, Any]:
    """Return the results of one arm."""
    steps = measured(arm.out)
    warm = [s for s in steps[1:] if "seconds" in s]
    names = sorted({n for s in warm for n in s["seconds"]})
    result: dict[str, Any] = {
        "gpus": len(arm.gpus),
        "ended": arm.ended,
        "first_step_s": round(arm.steps[0] - time.time() + time.monotonic() - arm.began, 1) if arm.steps else None,
        "seconds_median": {n: round(statistics.median(s["seconds"].get(n, 0.0) for s in warm), 2) for n in names},
        "steps": steps,
    }
    if CUDA and len(arm.steps) > 1:
        result["gpu"] = busy(samples, arm.gpus, arm.steps[0], arm.steps[-1])
    if arm.ended != "killed, as planned":
        result["log"] = log.read_text(errors="replace")[-4000:]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each arm.")
    parser.add_argument("--batch", type=int, default=64, help="Prompts per step.")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--response", type=int, default=400, help="Tokens per answer.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", default="{}", help="JSON: further hyperparameters.")
    parser.add_argument(
        "--product-set", default="{}", help="JSON: further hyperparameters, only for the arm `product`."
    )
    parser.add_argument("--deadline", type=float, default=480.0, help="Seconds that an arm may take.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-train"))
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    work = a.work / f"rl-{time.time():.0f}"
    for folder in (work, a.out):
        folder.mkdir(parents=True, exist_ok=True)
    model = folder_of(a.size, a.work / f"model-{a.size}")
    if not list(model.glob("model*.safetensors")):
        attention.use()
        save(build(model), model)
        torch.cuda.empty_cache() if CUDA else None
    rows_of(work / "rows", a.batch * 2)
    hyperparameters = {
        "batchSize": a.batch,
        "miniBatchSize": a.batch,
        "rollouts": a.rollouts,
        "responseLength": a.response,
        "promptLength": 1024,
        "maxSteps": 100,
        "saveEvery": 1000,
        "validateEvery": 1000,
        "validateBeforeTrain": False,
        **({} if CUDA else {"dtype": "float32"}),
        **json.loads(a.set),
    }
    data = {"train": [str(work / "rows/train.json")], "validation": [str(work / "rows/val.json")]}
    spec = {
        "preset": "egm-4b-rl" if a.size != "8b" else "egm-8b-rl",
        "model": {"source": str(model)},
        "data": {**data, "images": [str(work / "rows")]},
        "resources": {"nodes": 1, "gpusPerNode": a.gpus},
        "hyperparameters": hyperparameters,
    }
    (work / "job.json").write_text(json.dumps({**JOB, "spec": spec}))
    own = json.loads(a.product_set)
    product = {**spec, "hyperparameters": {**hyperparameters, **own}}
    (work / "product.json").write_text(json.dumps({**JOB, "spec": product}))
    none = {} if CUDA else {"CUDA_VISIBLE_DEVICES": "-1"}
    prepare = [sys.executable, "-m", "grounding.cli", "role", "prepare"]
    where = ["--job", str(work / "job.json"), "--data", str(work / "data")]
    subprocess.run([*prepare, *where], check=True, env=os.environ | none)
    many = torch.cuda.device_count() if CUDA else 1
    together = CUDA and many >= a.gpus * len(a.arms)
    report: dict[str, Any] = {
        "what": "whole steps of RL with random weights: egm role rl, and verl started by hand",
        "machine": machine(),
        "versions": versions(),
        "size": a.size,
        "side_by_side": together,
        "hyperparameters": hyperparameters,
        "product_only": own,
    }
    turns = [a.arms] if together else [[name] for name in a.arms]
    for turn in turns:
        samples = a.out / f"gpu-{turn[0]}.csv"
        sampler = sample(many, samples) if CUDA else None
        arms = []
        for i, name in enumerate(turn):
            gpus = list(range(i * a.gpus, (i + 1) * a.gpus))
            file = work / ("product.json" if name == "product" else "job.json")
            arms.append(start(name, file, work / "data", model, work, gpus))
        while not all(arm.ended for arm in arms):
            time.sleep(0.5)
            for arm in arms:
                if not arm.ended:
                    arm.look(a.steps, a.deadline)
        if sampler:
            sampler.kill()
        for arm in arms:
            report[arm.name] = told(arm, samples, work / f"{arm.name}.log")
            (a.out / "rl.json").write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps({k: v for k, v in report[arm.name].items() if k != "steps"}), flush=True)
    return 0 if all(report[n]["ended"] == "killed, as planned" for n in a.arms) else 1


if __name__ == "__main__":
    sys.exit(main())
