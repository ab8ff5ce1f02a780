"""Run sweeps of thinking budgets on GPUs, and check that budgets are obeyed, the second request's prompt is cached, and costs add up.

    python bench/gpu/sweep.py --sizes 4b 8b --trained runs/sweep --out DIR

Parts:
  trained  the tiny models of `egm run -f jobs/sweep.yaml` (`--trained` is its run folder), served by the real engine: tokens of
           thought of every answer against its budget, the share of answers with a box, accuracy by setting
  real     random weights of real shapes, one size on each GPU at the same time (`--sizes`), pictures of 640 x 480, six questions each:
           GPU-seconds of all settings against the wall time between the first and the last change of the server's own counters of tokens
  cache    the same models, a single setting, and one question for each picture: tokens of the second request's prompt that were cached

Random weights never end a thought or an answer, so each has as many tokens as it may. Writes DIR/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from rl_step import sample
from serve_affinity import _write, dataset, machine
from train import SIZES, build, folder_of
from train import save as write

from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.summary_model import Summary, read_summary
from grounding.evaluate.sweep import read_sweep
from grounding.models import attention

STARTED = re.compile(rb"Application startup complete|ready to roll")  # vLLM, SGLang
ADDRESS = re.compile(rb"http://127\.0\.0\.1:\d+")
TOKENS = re.compile(r"(vllm|sglang):(prompt|generation)_tokens_total")
HEAD = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingEvalJob"}


def job(name: str, engine: str, gpus: int, model: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """Return an evaluation job with one server."""
    where = {"engine": engine, "servers": 1, **({"gpusPerServer": 1} if gpus else {})}
    return {**HEAD, "metadata": {"name": name}, "spec": {**where, **model, **spec}}


class Watched(threading.Thread):
    """Watches the servers of a run from outside: when each has started, and when its own counters of tokens change.

    `started` has the times (seconds since 1970) at which the servers logged that they had started, `counted` the times of the first and
    the last change of a counter after that, by the server's address.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.started, self.over = folder, dict[str, float](), threading.Event()
        self.counted: dict[str, tuple[float, float]] = {}
        self.start()

    def run(self) -> None:
        seen: dict[Path, str] = {}
        last: dict[str, list[str]] = {}
        while not self.over.wait(0.05):
            for log in set(self.folder.glob("*/logs/*.log")) - seen.keys():
                text = log.read_bytes()
                if STARTED.search(text) and (found := ADDRESS.search(text)):
                    seen[log] = found[0].decode()
                    self.started[seen[log]] = time.time()
            for address in seen.values():
                try:
                    with urllib.request.urlopen(address + "/metrics", timeout=5) as page:
                        lines = [x for x in page.read().decode().splitlines() if TOKENS.match(x)]
                except (urllib.error.URLError, OSError):
                    continue
                if lines != last.setdefault(address, lines):
                    now = time.time()
                    last[address], self.counted[address] = lines, (self.counted.get(address, (now, now))[0], now)


def run(jobs: Sequence[dict[str, Any]], work: Path, name: str, limit_s: float) -> dict[str, Any]:
    """Run the jobs in `work/NAME` by `egm run`; return its exit code, and the end of its log if it failed."""
    file, log = work / f"{name}.yaml", work / f"{name}.log"
    file.write_text("\n---\n".join(json.dumps(j, indent=1) for j in jobs) + "\n")
    command = [sys.executable, "-m", "grounding.cli", "run", "-f", str(file), "--runs", str(work)]
    began = time.monotonic()
    with log.open("wb") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            code: int | str = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            child.terminate()  # `egm run` gives its roles a minute to stop, and then kills them
            child.wait(120)
            code = "stopped at the limit"
    tails = {p.name: p.read_text(errors="replace")[-1500:] for p in work.glob(f"{name}/*/logs/*.log")} if code else {}
    ended = {"exit_code": code, "seconds": round(time.monotonic() - began, 1)}
    return ended | ({"log": log.read_text(errors="replace")[-2000:], "logs": tails} if code else {})


def settings(folder: Path) -> list[dict[str, Any]]:
    """Return the results of each setting of a finished sweep."""
    found = []
    for setting in read_sweep(folder):
        rows, budget = list(read_rows(setting.folder)), setting.method.thinking_budget
        answers = [a for row in rows for a in (row.get("samples") or [row])]
        thoughts = [a.get("reasoning_tokens") or 0 for a in answers]
        summary = read_summary(setting.folder) or Summary()
        costs = summary.costs
        found.append(
            {
                "model": setting.model,
                "setting": setting.name,
                "questions": len(rows),
                "answers": len(answers),
                "accuracy": summary.macro,
                "budget": budget,
                "thought_tokens_max": max(thoughts, default=None),
                "over_budget": sum(t > budget for t in thoughts) if budget is not None else None,
                "with_a_box": sum(a.get("scaled_bbox") is not None for a in answers),
                "costs": asdict(costs) if costs else None,
            }
        )
    return found


def stretches(samples: Path, gpu: int, gap_s: float) -> list[tuple[float, float]]:
    """Return the periods (seconds since 1970) in which a GPU computed without a pause longer than `gap_s`."""
    found: list[tuple[float, float]] = []
    for line in samples.read_text().splitlines():
        parts = [p.strip() for p in line.split(",")]
        if len(parts) != 4 or int(parts[1]) != gpu or float(parts[2]) <= 0:
            continue
        day, fraction = parts[0].split(".")
        at = time.mktime(time.strptime(day, "%Y/%m/%d %H:%M:%S")) + float("0." + fraction)
        if found and at - found[-1][1] <= gap_s:
            found[-1] = (found[-1][0], at)
        else:
            found.append((at, at))
    return found


def weights(size: str, folder: Path) -> None:
    """Write a model of this size with random weights, unless it exists."""
    folder_of(size, folder)
    if not list(folder.glob("model*.safetensors")):
        attention.use()
        write(build(folder), folder)


def served(folder: Path) -> dict[str, float]:
    """Return the number of prompt tokens at the endpoints of a sweep, and how many of them were cached."""
    totals = {"prompt_tokens": 0.0, "cached_tokens": 0.0}
    for file in folder.rglob("summary.json"):
        for endpoint in (read_summary(file.parent) or Summary()).servers or ():
            totals["prompt_tokens"] += endpoint.prompt_tokens
            totals["cached_tokens"] += endpoint.cached_tokens
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--gpus", type=int, default=2, help="Number of GPUs; 0: a rehearsal on the CPU.")
    parser.add_argument("--parts", default="trained,real,cache")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["4b", "8b"])
    parser.add_argument(
        "--trained", type=Path, help="Run folder of jobs/sweep.yaml; every NAME/model in it is a model of the sweep."
    )
    parser.add_argument("--budgets", type=int, nargs="*", default=[0, 64, 256])
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--images", type=int, default=40, help="Pictures of the real sizes, with six questions each.")
    parser.add_argument("--tokens", type=int, default=100, help="Tokens of an answer without its thought.")
    parser.add_argument("--limit", type=float, default=220.0, help="Maximum seconds for each part.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-train"))
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    work, parts = a.work / f"sweep-{time.time():.0f}", a.parts.split(",")
    for folder in (work / "pictures", a.out):
        folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"what": "sweeps of thinking budgets", "engine": a.engine, "machine": machine()}

    def save(**more: Any) -> None:
        report.update(more)
        (a.out / "sweep.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(more)[:4000], flush=True)

    if a.trained and "trained" in parts:
        sampling = {"maxTokens": 64, "temperature": 0.7, "seed": 1}
        shapes = {"shapes": {"seed": 7, "perFile": 5, "reasoning": True}}
        models = [{"source": str(folder.resolve())} for folder in sorted(a.trained.glob("*/model"))]
        axes = {"models": models, "thinkingBudgets": [0, 8, 16, 32], "samples": [1, 3]}
        done = run(
            [job("tiny", a.engine, a.gpus, {}, data=shapes, sampling=sampling, sweep=axes)], work, "trained", a.limit
        )
        tiny = work / "trained/tiny"
        ended = {"settings": settings(tiny), "tokens": served(tiny)} if done["exit_code"] == 0 else {}
        save(trained={**done, **ended})
    if not {"real", "cache"} & set(parts):
        return 0
    with get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        drawn = pool.map_async(_write, [(work / "pictures" / f"{i}.jpg", i) for i in range(3 * a.images)], chunksize=8)
        for size in a.sizes:  # each in a separate process, whose end frees the GPU's memory
            pool.apply(weights, (size, a.work / f"model-{size}"))
        drawn.get()
    six, pictures = dataset(work, 0, a.images, 6, one_each=False)
    single, others = dataset(work, a.images, 2 * a.images, 1, one_each=False)
    real, cache = [], []
    for size in a.sizes:
        source = {"model": {"source": str(a.work / f"model-{size}")}}
        common = {"sampling": {"maxTokens": a.tokens, "temperature": 0.7, "seed": 1}, "concurrency": 64}
        axes = {"thinkingBudgets": a.budgets, "samples": a.samples}
        files = {"root": str(six.parent), "files": [six.name], "images": [str(pictures)]}
        real.append(job(f"real-{size}", a.engine, a.gpus, source, data=files, sweep=axes, **common))
        files = {"root": str(single.parent), "files": [single.name], "images": [str(others)]}
        axes = {"thinkingBudgets": [max(a.budgets)], "samples": [1]}
        cache.append(job(f"cache-{size}", a.engine, a.gpus, source, data=files, sweep=axes, **common))
    if "real" in parts:
        samples = a.out / "gpu.csv"
        sampler = sample(a.gpus, samples, every_ms=100) if shutil.which("nvidia-smi") else None
        samples.touch()
        watched = Watched(work / "real")
        done = run(real, work, "real", a.limit)
        watched.over.set()
        if sampler:
            sampler.kill()
        ended = a.sizes if done["exit_code"] == 0 else []
        by_size = {size: settings(work / f"real/real-{size}") for size in ended}
        rows = [{**s, "model": size} for size, found in by_size.items() for s in found]
        times = {
            size: {
                "serving_s": round(sum(s["costs"]["serving_seconds"] for s in found), 2),
                "gpu_seconds": round(sum(s["costs"]["gpu_seconds"] or 0 for s in found), 2),
            }
            for size, found in by_size.items()
        }
        # the scheduler assigns jobs to GPUs, so list the busy periods of all GPUs
        numbers = [int(n) for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n] or range(a.gpus)
        computed = {
            str(g): [(round(x, 1), round(y, 1)) for x, y in stretches(samples, g, 1.5) if y - x > 5] for g in numbers
        }
        asked = {address: round(last - first, 2) for address, (first, last) in watched.counted.items()}
        facts = {"settings": rows, "times": times, "nvidia_smi_stretches": computed, "servers_started": watched.started}
        save(real={**done, **facts, "asked_s": asked, "tokens_counted": watched.counted})
    if "cache" in parts:
        done = run(cache, work, "cache", a.limit)
        found = {
            size: {**served(work / f"cache/cache-{size}"), "settings": settings(work / f"cache/cache-{size}")}
            for size in a.sizes
            if done["exit_code"] == 0
        }
        save(cache={**done, "models": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
