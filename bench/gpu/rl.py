"""Run reinforcement learning with vLLM's rollouts on a real GPU, kill it half-way, and resume: score, progress, and costs of a step.

    python bench/gpu/rl.py --out bench/gpu/rl.json

It draws the shapes set, trains the tiny model by SFT (unless `--model` is a folder), then by `egm role rl`: verl's main_ppo, FSDP and vLLM on the
GPU, without the CPU path. After step `--kill-at`, every process of the run gets SIGKILL, and the same command continues from the newest
checkpoint. Needs one GPU and the packages of verl's `vllm` extra. The exit code is 1 if a step is missing or the score has not risen.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from grounding.files import complete_lines
from grounding.local.process import TOKEN
from grounding.progress import read_progress
from grounding.runtime import processes
from grounding.train.checkpoints import local as checkpoints

JOB = """apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {{name: {name}}}
spec:
  preset: {preset}
  model: {{source: "{model}"}}
  data: {{shapes: {{seed: 7, train: {rows}, perFile: {per_file}}}}}
  resources: {{nodes: 1, gpusPerNode: 1}}
  hyperparameters: {hyperparameters}
"""
# the tiny model's sizes with the recipe of the real models: bfloat16, a KL loss with its reference model, offloading, recomputed activations
RECIPE = {
    "dtype": "bfloat16",
    "klCoefficient": 0.005,
    "gradientCheckpointing": True,
    "offloadParameters": True,
    "offloadOptimizer": True,
    "gpuMemoryUtilization": 0.6,
    "tokensPerGpu": 8192,
    "saveEvery": 5,
    "validateEvery": 10,
}


def role(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "grounding.cli", "role", name, *map(str, arguments)]


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# ---- the run ----
def attempt(command: list[str], out: Path, log: Path, kill_at: int, deadline_s: float) -> dict[str, Any]:
    """Start the role once. Kill it after step `kill_at`; 0 lets it run to its end."""
    found = checkpoints.peek(out / "checkpoints")
    told: dict[str, Any] = {"after_step": found.step if found else 0}
    mark, begun, before = uuid.uuid4().hex, time.monotonic(), set(metric_files(out))
    with log.open("ab") as file:
        child = subprocess.Popen(
            command, env=os.environ | {TOKEN: mark}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while child.poll() is None and time.monotonic() - begun < deadline_s:
            files = [file for file in metric_files(out) if file not in before]
            step = max((line["step"] for file in files for line in complete_lines(file)), default=0)
            if step and "first_step_s" not in told:
                told["first_step_s"] = round(time.monotonic() - begun, 1)
                say(step=step, seconds=told["first_step_s"])
            if kill_at and step >= kill_at:
                told |= {"ended": "killed", "at_step": step}
                break
            time.sleep(0.1)
        else:
            told["ended"] = f"exit code {child.returncode}" if child.poll() is not None else "deadline"
    finally:
        told["seconds"] = round(time.monotonic() - begun, 1)
        told["processes_killed"] = processes.kill(lambda: processes.marked(TOKEN, mark))
        child.wait()
    say(**told)
    return told


# ---- files of the run ----
def metric_files(out: Path) -> list[Path]:
    """Return verl's own files, one per attempt, oldest first."""
    return sorted((out / "verl").glob("metrics-*-from-*.jsonl"))


def measured(out: Path) -> list[dict[str, Any]]:
    """Return one line per step in its final version, from verl's own files: scores, validation, seconds by stage."""
    steps: dict[int, dict[str, Any]] = {}
    for number, file in enumerate(metric_files(out), 1):
        origin = int(file.stem.rpartition("-")[2])
        steps = {step: line for step, line in steps.items() if step <= origin}
        for line in complete_lines(file):
            steps[line["step"]] = {"step": line["step"], "attempt": number, **chosen(line["data"])}
    return [steps[n] for n in sorted(steps)]


def chosen(data: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of verl that are reported."""
    names = {
        "critic/score/mean": "score",
        "val-core/grounding/acc/mean@1": "val_accuracy",
        "val-aux/grounding/iou/mean@1": "val_iou",
        "val-aux/grounding/parsed/mean@1": "val_parsed",
        "actor/kl_loss": "kl_loss",
        "actor/ppo_kl": "kl",
        "actor/grad_norm": "grad_norm",
        "actor/lr": "learning_rate",
        "response_length/mean": "response_tokens",
        "response_length/clip_ratio": "response_clipped",
        "perf/throughput": "tokens_per_second",
        "perf/total_num_tokens": "tokens",
        "training/rollout_actor_probs_pearson_corr": "rollout_actor_correlation",
        "actor/perf/max_memory_allocated_gb": "gpu_memory_gb",
    }
    line = {ours: round(float(data[theirs]), 6) for theirs, ours in names.items() if theirs in data}
    seconds = {k.removeprefix("timing_s/"): round(float(v), 3) for k, v in data.items() if k.startswith("timing_s/")}
    return line | ({"seconds": seconds} if seconds else {})


def summed_up(steps: list[dict[str, Any]], tries: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the first and last scores, and return a step's seconds by stage: medians over the steps that have the stage, without each attempt's
    first step, which compiles."""
    trained = [s for s in steps if s["step"] > 0 and "score" in s]
    some = max(1, len(trained) // 5)
    warm = [s for i, s in enumerate(trained) if i and s["attempt"] == trained[i - 1]["attempt"] and "seconds" in s]
    stages = sorted({name for s in warm for name in s["seconds"]})
    accuracy = [(s["step"], s["val_accuracy"]) for s in steps if "val_accuracy" in s]
    return {
        "steps": len(trained),
        f"score_first_{some}": round(statistics.mean(s["score"] for s in trained[:some]), 4),
        f"score_last_{some}": round(statistics.mean(s["score"] for s in trained[-some:]), 4),
        "val_accuracy": accuracy,
        "first_step_s": [t.get("first_step_s") for t in tries],
        "steps_repeated": sum(a.get("at_step", 0) - b["after_step"] for a, b in itertools.pairwise(tries)),
        "seconds_median": {
            n: round(statistics.median(s["seconds"][n] for s in warm if n in s["seconds"]), 3) for n in stages
        },
        "tokens_per_second_median": round(statistics.median(s["tokens_per_second"] for s in warm), 1) if warm else 0.0,
    }


def failed(steps: list[dict[str, Any]], summary: dict[str, Any], wanted: int, model: Path) -> str:
    """Return a description of the failure; empty if there is none."""
    if [s["step"] for s in steps if s["step"] > 0] != list(range(1, wanted + 1)):
        return f"the steps are not 1 to {wanted}"
    first, last = (v for k, v in summary.items() if k.startswith("score_"))
    if last <= first:
        return f"the score did not rise: {first} to {last}"
    return "" if (model / "config.json").exists() else "no model was written"


def machine() -> str:
    """Return a description of GPU, processor and interpreter."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", ", ")
    except (OSError, subprocess.CalledProcessError):
        gpus = "no GPU"
    return f"{gpus}; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "verl", "vllm", "ray", "flash-attn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="A model trained by SFT; by default, the tiny model is trained first."
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kill-at", type=int, default=17, help="Kill the run after this step; 0 means never.")
    parser.add_argument("--batch", type=int, default=32, help="Prompts per step.")
    parser.add_argument("--rollouts", type=int, default=8, help="Answers per prompt.")
    parser.add_argument("--rows", type=int, default=6000, help="Training rows of the shapes set.")
    parser.add_argument("--sft-steps", type=int, default=700)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="Further hyperparameters of RL.")
    parser.add_argument("--override", nargs="*", default=[], help="Overrides of verl, applied last (engineOverrides).")
    parser.add_argument("--deadline", type=float, default=1800.0, help="Seconds that one start may take.")
    parser.add_argument("--work", type=Path, help="Folder to work in, which is kept; default: a temporary folder.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="egm-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "what": "verl with vLLM's rollouts on the tiny model, killed once and resumed",
        "machine": machine(),
        "versions": versions(),
        "attempts": [],
    }

    def save() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    def job(name: str, preset: str, model: str, hyperparameters: dict[str, Any]) -> Path:
        text = JOB.format(
            name=name,
            preset=preset,
            model=model,
            rows=arguments.rows,
            per_file=200,
            hyperparameters=json.dumps(hyperparameters),
        )
        (folder / f"{name}.yaml").write_text(text)
        return folder / f"{name}.yaml"

    model = arguments.model
    data = folder / "data"
    if model is None:
        sft, begun = job("sft", "tiny-sft", "tiny://", {"maxSteps": arguments.sft_steps}), time.monotonic()
        subprocess.run(role("prepare", "--job", sft, "--data", data), check=True)
        subprocess.run(
            role("sft", "--job", sft, "--data", data, "--model", "tiny://", "--out", folder / "sft"), check=True
        )
        model = folder / "sft" / "model"
        lines = [line for line in read_progress(folder / "sft" / "progress.jsonl") if line["step"] > 0]
        report["sft"] = {
            "steps": lines[-1]["step"],
            "loss": lines[-1]["metrics"]["loss"],
            "seconds": round(time.monotonic() - begun, 1),
            "seconds_step_median": round(statistics.median(line["metrics"]["secondsStep"] for line in lines[1:]), 4),
        }
        say(**report["sft"])
    hyperparameters = RECIPE | {
        "maxSteps": arguments.steps,
        "batchSize": arguments.batch,
        "miniBatchSize": arguments.batch,
        "rollouts": arguments.rollouts,
        "engineOverrides": arguments.override,
    }
    for text in arguments.set:
        name, _, value = text.partition("=")
        hyperparameters[name] = json.loads(value) if value[:1] not in "abcdefghijklmnopqrsuvwxyz" else value
    rl, out = job("rl", "tiny-rl", str(model), hyperparameters), folder / "rl"
    out.mkdir(exist_ok=True)
    report["hyperparameters"] = {k: v for k, v in hyperparameters.items() if v != []}
    subprocess.run(role("prepare", "--job", rl, "--data", data), check=True)
    command = role("rl", "--job", rl, "--data", data, "--model", model, "--out", out)
    log = folder / "rl.log"
    for kill_at in [arguments.kill_at] * bool(arguments.kill_at) + [0]:
        told = attempt(command, out, log, kill_at, arguments.deadline)
        report["attempts"].append(told)
        save()
        if told["ended"] not in ("killed", "exit code 0"):
            print("\n".join(log.read_text(errors="replace").splitlines()[-80:]))
            print(f"ended with {told['ended']}, see {log}")
            return 1
    steps = measured(out)
    report["summary"] = summary = summed_up(steps, report["attempts"])
    report["steps"] = steps
    report["seconds"] = round(sum(t["seconds"] for t in report["attempts"]), 1)
    why = failed(steps, summary, arguments.steps, out / "model")
    report["result"] = why or "as expected"
    save()
    print(json.dumps(summary, indent=1))
    if arguments.work is None and not why:
        shutil.rmtree(folder, ignore_errors=True)
    print(why or f"{arguments.steps} steps, the score rose", flush=True)
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
