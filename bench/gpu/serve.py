"""Measure how fast a server answers grounding questions on one GPU, and what limits it.

    python bench/gpu/serve.py --size 8b --out DIR [--reference CHECKOUT] [--variant '--api-server-count 4']

There is one server per GPU, started by the product's own command line with the shapes of Qwen3-VL and random weights, so nothing is downloaded.
Every answer has `--tokens` tokens. Pictures are JPEGs of 640 x 480 with the size of a photograph and six questions each; no two runs share one.
Runs:

    product    our client at each number of requests in flight (`--in-flight`)
    variant    the same on the second GPU, whose server has further flags (`--variant`); without flags: the scaling to two servers
    reference  the client of a checkout of github.com/zgq1879/EGM (`verl/scripts/sglang_infer.py`), 64 in flight as in its script

For each run it reports requests/s, output tokens/s, latencies, GPU utilisation (nvidia-smi, twice per second, without the first and last tenth),
and CPU seconds of the server's processes and of the client. `limit` is computed: the seconds of a request if decoding reads all weights once per
step for all rows in flight, and the prompt costs 2 FLOP per parameter and token, at the bandwidth and rate given below.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import psutil
from rl_step import busy, sample
from serve_affinity import Server, _write, dataset, machine, measure
from train import SIZES, folder_of

BANDWIDTH = 4.3e12
"""Bytes/s of an H200's memory, measured by a copy (reads and writes)"""
RATE = 788e12
"""FLOP/s of an H200 in bfloat16, for the fastest measured matrix product"""
PROMPT_TOKENS = 330
"""Tokens of a picture of 640 x 480 and its question"""


def limit(parameters: float, tokens: int, in_flight: int) -> dict[str, float]:
    """Return the computed limit of requests/s. The prompt counts once per question, its picture's part once per picture (six questions)."""
    decode = tokens * max(2 * parameters / BANDWIDTH / in_flight, 2 * parameters / RATE)
    prefill = 2 * parameters * (300 / 6 + PROMPT_TOKENS - 300) / RATE
    return {
        "requests_per_second": round(1 / (decode + prefill), 1),
        "decode_s": round(decode, 5),
        "prefill_s": round(prefill, 5),
    }


def limits(size: str, tokens: int, in_flight: Iterable[int]) -> dict[str, dict[str, float]]:
    """Return the computed limits of a size by the number of requests in flight."""
    parameters = {"2b": 2.0e9, "4b": 4.4e9, "8b": 8.8e9}.get(size, 1e6)
    return {str(n): limit(parameters, tokens, n) for n in in_flight}


def arguments(doc: str | None, *, budget: float) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all benchmarks of servers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--deadline", type=float, default=240.0, help="Seconds that a start may take.")
    parser.add_argument("--budget", type=float, default=budget, help="Seconds after which no further run begins.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-train"))
    parser.add_argument("--out", type=Path, required=True)
    return parser


class Runs:
    """The runs of a benchmark. No two share a picture; `report` is written to `file` after each of them."""

    def __init__(self, file: Path, what: str, size: str, tokens: int, **facts: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.folder = file, Path(tempfile.mkdtemp(prefix="egm-serve-"))
        self.used = 0
        """Number of pictures that runs have used"""
        self.report: dict[str, Any] = {
            "what": what,
            "machine": machine(),
            "model": f"shapes of Qwen3-VL-{size.upper()}, random weights",
            "tokens": tokens,
            "questions_a_picture": 6,
            **facts,
            "results": [],
        }

    def save(self, **row: Any) -> None:
        """Write the report, with a further result if one is given."""
        if row:
            self.report["results"].append(row)
            print(json.dumps(row), flush=True)
        self.file.write_text(json.dumps(self.report, indent=1) + "\n")

    def drawn(self, images: int, *, one_each: bool = False) -> tuple[Path, Path]:
        """Return (rows, image folder) over the next pictures."""
        self.used += images
        return dataset(self.folder, self.used - images, images, 6, one_each=one_each)

    @property
    def out(self) -> Path:
        """Return the folder for the results of the last drawn run."""
        return self.folder / f"out-{self.used}"


def processes(root: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    top = psutil.Process(root)
    return [top, *top.children(recursive=True)]


def cpu_seconds(found: list[psutil.Process]) -> dict[str, float]:
    """Return CPU seconds, keyed by the names of the processes."""
    seconds: dict[str, float] = {}
    for process in found:
        try:
            times, words = process.cpu_times(), process.cmdline()
        except psutil.NoSuchProcess:
            continue
        name = next((w for w in words if w.startswith("VLLM::") or w.startswith("sglang::")), "") or process.name()
        seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def watched(servers: list[Server], gpus: list[int], samples: Path, call: Any) -> dict[str, Any]:
    """Call `call`, and return its result with the use of GPUs and processors during the call."""
    trees = [p for s in servers for p in processes(s.process.pid)]
    before, own, began = cpu_seconds(trees), time.process_time(), time.time()
    result: dict[str, Any] = call()
    took = time.time() - began
    after = cpu_seconds(trees)
    middle = busy(samples, gpus, began + 0.1 * took, began + 0.9 * took)
    used = {name: round(after[name] - before.get(name, 0.0), 2) for name in after}
    return {
        **result,
        "gpu": middle,
        "server_cpu_s": {n: v for n, v in used.items() if v > 0.1},
        "client_cpu_s": round(time.process_time() - own, 2),
    }


def by_reference(checkout: Path, server: Server, rows: Path, images: Path, tokens: int, work: Path) -> dict[str, Any]:
    """Run the reference's client unchanged, with the arguments of its script, and return its own results."""
    lines = work / "reference.json"
    lines.write_text(rows.read_text())
    command = [
        sys.executable,
        str(checkout / "verl/scripts/sglang_infer.py"),
        "--model",
        "m",
        "--data_json",
        str(lines),
    ]
    command += ["--output_dir", str(work / "reference"), "--endpoint", server.url, "--max_tokens", str(tokens)]
    command += ["--concurrency", "64", "--prompt_template", "qwen3", "--box_remap", "scale"]
    environment = os.environ | {"BASE_IMG_DIR": str(images), "HF_HOME": str(work / "hf")}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.monotonic() - began
    figures = {
        k: float(v)
        for k, v in re.findall(r"^(case_num|whole_time|mean_tokens|total_time) ([\d.]+)$", done.stdout, re.M)
    }
    if "whole_time" not in figures:
        return {"arm": "reference", "failed": (done.stdout + done.stderr)[-2000:]}
    return {
        "arm": "reference",
        "rows": int(figures["case_num"]),
        "wall_s": round(figures["whole_time"], 3),
        "with_start_s": round(wall, 1),
        "requests_per_second": round(figures["case_num"] / figures["whole_time"], 2),
        "tokens_mean": figures["mean_tokens"],
        "latency_mean": round(figures["total_time"] / figures["case_num"], 4),
    }


def draw_pictures(folder: Path, number: int) -> int:
    """Draw pictures into `folder/pictures` while servers start; return the mean of their sizes in bytes."""
    (folder / "pictures").mkdir()
    tasks = [(folder / "pictures" / f"{i}.jpg", i) for i in range(number)]
    with get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 6)) as pool:
        return round(statistics.mean(pool.map(_write, tasks, chunksize=16)))


def end(servers: Iterable[Server], sampler: subprocess.Popen[bytes] | None, folder: Path) -> None:
    """Stop the servers and the sampler, and remove the folder of the runs."""
    for server in servers:
        server.stop()
    if sampler:
        sampler.kill()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = arguments(__doc__, budget=400.0)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument(
        "--gpus", type=int, default=2, help="GPUs with one server each; the second server has the variant's flags."
    )
    parser.add_argument("--in-flight", type=int, nargs="*", default=[16, 64, 256, 512])
    parser.add_argument("--variant-in-flight", type=int, nargs="*", default=[64, 256, 512])
    parser.add_argument("--images", type=int, default=200, help="Pictures per run at 64 in flight or more.")
    parser.add_argument("--variant", default="", help="Further arguments for the second server.")
    parser.add_argument("--server-args", default="--load-format dummy", help="Further arguments for both servers.")
    parser.add_argument("--reference", type=Path)
    a = parser.parse_args()
    begun = time.monotonic()
    runs = Runs(
        a.out / "serve.json",
        "requests/s of a server on one GPU, by requests in flight",
        a.size,
        a.tokens,
        engine=a.engine,
        variant=a.variant,
        limit=limits(a.size, a.tokens, a.in_flight),
    )
    model = folder_of(a.size, a.work / f"served-{a.size}")
    both = a.server_args.split()
    flags = [both, [*both, *a.variant.split()]]
    servers = [
        Server(a.engine, model, gpu, sys.executable, a.out / f"server-{gpu}.log", flags[min(gpu, 1)])
        for gpu in range(a.gpus)
    ]
    runs.report["commands"] = [" ".join(s.command) for s in servers]
    samples = a.out / "gpu.csv"
    sampler = sample(a.gpus, samples) if shutil.which("nvidia-smi") else None
    samples.touch()

    def ask(arm: str, of: list[Server], gpus: list[int], in_flight: int, images: int) -> None:
        if time.monotonic() - begun > a.budget:
            return
        rows, pictures = runs.drawn(images)
        call = partial(measure, "affinity", of, rows, pictures, runs.out, a.tokens, in_flight)
        found = watched(of, gpus, samples, call)
        runs.save(
            **found
            | {
                "arm": arm,
                "in_flight": in_flight,
                "output_tokens_per_second": round(found["requests_per_second"] * a.tokens, 1),
            }
        )

    try:
        count = len(a.in_flight) + len(a.variant_in_flight) + 1
        runs.report["image_bytes_mean"] = draw_pictures(runs.folder, 32 + count * 2 * a.images)
        for server in servers:
            server.ready(a.deadline)
        runs.report["ready_s"] = [round(s.seconds, 1) for s in servers]
        rows, pictures = runs.drawn(16)
        measure("affinity", servers, rows, pictures, runs.folder / "out-warm", 32, 64)
        runs.save()
        for n in a.in_flight:
            ask("product", servers[:1], [0], n, a.images if n >= 64 else max(1, a.images // 4))
        if a.reference and time.monotonic() - begun < a.budget:
            rows, pictures = runs.drawn(a.images)
            runs.save(
                **watched(
                    servers[:1],
                    [0],
                    samples,
                    lambda: by_reference(a.reference, servers[0], rows, pictures, a.tokens, runs.folder),
                )
            )
        if a.gpus > 1 and a.variant:
            for n in a.variant_in_flight:
                ask("variant", servers[1:2], [1], n, a.images)
        elif a.gpus > 1:
            for n in a.variant_in_flight:
                ask("two-servers", servers, list(range(a.gpus)), n, 2 * a.images)
    finally:
        end(servers, sampler, runs.folder)
        runs.save()
    return 0


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
