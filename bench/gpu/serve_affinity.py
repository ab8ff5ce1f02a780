"""Measure the gain if one server gets all questions of an image, and the cost of a start: real servers on real GPUs, queried by our client.

    python bench/gpu/serve_affinity.py --engine sglang --gpus 2 --out bench/gpu/sglang.json

There is one server per GPU, started by the engine's own command line with the sizes of Qwen3-VL-4B and random weights (`model.py`), so nothing is
downloaded. Every answer has `--tokens` tokens. Pictures are JPEGs of 640 x 480 with the size of a photograph and six questions each. Arms:

    affinity   `egm eval` unchanged: one server gets all questions of an image, the first one before the others
    at-once    the same, but all questions at once (`--siblings-at-once`)
    spread     the same rows in the same order, distributed over the servers by a hash of the row, like a round robin of data-parallel replicas
    png        affinity, with pictures sent as PNG

The arms run alternately, `--repeats` times. No two runs share a picture, so every run begins with cold caches. The servers' own counters of
cached tokens are read before and after each run. All servers are started `--starts` times, first before the arms, to measure the time from
launch to `/health` and the time to stop."""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 640, 480
ARMS = ("affinity", "at-once", "spread", "png")
EXTRA = {
    "sglang": ["--load-format", "dummy", "--enable-cache-report"],
    "vllm": ["--load-format", "dummy", "--enable-prompt-tokens-details"],
}
COUNTERS = {
    "sglang": ("sglang:prompt_tokens_total", "sglang:cached_tokens_total", "sglang:generation_tokens_total"),
    "vllm": (
        "vllm:prompt_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:mm_cache_queries_total",
        "vllm:mm_cache_hits_total",
        "vllm:generation_tokens_total",
    ),
}


# ---- pictures and rows ----
def picture(seed: int) -> bytes:
    """Return a JPEG of 640 x 480 with noise of all sizes, like a photograph, and a shape."""
    import numpy as np
    from PIL import Image, ImageDraw

    chance = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for scale, strength in ((160, 60), (40, 32), (10, 18), (4, 12), (2, 12), (1, 9)):
        small = chance.normal(0, strength, (-(-HEIGHT // scale), -(-WIDTH // scale), 3)).astype(np.float32)
        small = 0.75 * small.mean(2, keepdims=True) * 1.7 + 0.25 * small  # photographs vary mostly in brightness
        layers = [
            Image.fromarray(np.ascontiguousarray(small[..., c])).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
            for c in range(3)
        ]
        total += np.stack([np.asarray(layer) for layer in layers], 2)
    image = Image.fromarray((total + chance.uniform(90, 160)).clip(0, 255).astype(np.uint8))
    x, y = (int(v) for v in chance.integers(20, 300, 2))
    ImageDraw.Draw(image).ellipse((x, y, x + 120, y + 90), fill=tuple(int(v) for v in chance.integers(0, 255, 3)))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def _write(task: tuple[Path, int]) -> int:
    path, seed = task
    data = picture(seed)
    path.write_bytes(data)
    return len(data)


def dataset(folder: Path, first: int, images: int, an_image: int, *, one_each: bool) -> tuple[Path, Path]:
    """Return (rows, image folder) over the pictures `first`.. of `folder`. `one_each`: every row has its own name for its picture."""
    here = folder / f"run-{first}"
    (here / "images").mkdir(parents=True)
    rows = here / "refcoco_val.jsonl"
    with rows.open("w") as f:
        for i in range(first, first + images):
            for k in range(an_image):
                name = f"{i}-{k}.jpg" if one_each else f"{i}.jpg"
                if one_each or not k:
                    os.link(folder / "pictures" / f"{i}.jpg", here / "images" / name)
                box = [10 + k, 10, 200, 200]
                row = {"image": name, "sent": f"the {k}th thing", "bbox": box, "width": WIDTH, "height": HEIGHT}
                f.write(json.dumps(row) + "\n")
    return rows, here / "images"


# ---- servers ----
def by_the_reference(model: Path, port: int) -> list[str]:
    """Return the arguments with which the reference starts SGLang, for one GPU instead of eight. The metrics count tokens only."""
    where = ["--host", "127.0.0.1", "--port", str(port), "--dp-size", "1", "--tp-size", "1"]
    served = ["--model-path", str(model), "--served-model-name", "m", "--mem-fraction-static", "0.8"]
    return ["python", "-m", "sglang.launch_server", *served, *where, "--enable-metrics"]


class Server:
    """A model server on one GPU, or on several (`gpus`)."""

    def __init__(
        self,
        engine: str,
        model: Path,
        gpu: int,
        python: str,
        log: Path,
        more: list[str],
        *,
        gpus: str = "",
        number: int | None = None,
        variables: dict[str, str] | None = None,
        tensor: int = 1,
        plain: bool = False,
    ) -> None:
        """Start the server. `number`: number of the server on this machine, which sets its port; by default its GPU. `tensor`: GPUs that
        share each copy of the model. `plain`: the server of the reference's script, without the product's environment.
        """
        from grounding.evaluate.engines import ServeOptions, get_engine

        chosen, port = get_engine(engine), 30_000 + 100 * (gpu if number is None else number)
        self.url, self.engine, self.log = f"http://127.0.0.1:{port}", engine, log
        options = ServeOptions(port=port, served_name="m", gpus=tensor, tensor_parallel=tensor)
        command = by_the_reference(model, port) if plain else chosen.command(str(model), options)
        command[0] = python if command[0] == "python" else command[0]
        if "--api-server-count" in more:  # only `vllm serve` starts several
            at = command.index("vllm.entrypoints.openai.api_server")
            command[at : at + 2] = ["vllm.entrypoints.cli.main", "serve"]
        ours = {} if plain else chosen.environment(os.environ, gpus=tensor)
        visible = {"CUDA_VISIBLE_DEVICES": gpus or str(gpu), "HF_HUB_OFFLINE": "1"}
        environment = os.environ | ours | visible | (variables or {})
        self.command, self.started = [*command, *EXTRA[engine], *more], time.monotonic()
        self.process = subprocess.Popen(
            self.command, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
        )
        self.readiness, self.seconds = self.url + chosen.readiness, 0.0

    def ready(self, deadline_s: float) -> None:
        """Wait until the server answers; `seconds` is then the time since the launch."""
        while not self.seconds:
            if self.process.poll() is not None or time.monotonic() - self.started > deadline_s:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
                raise SystemExit(f"{tail}\n{self.engine} did not start, see {self.log}")
            try:
                with urllib.request.urlopen(self.readiness, timeout=5) as reply:
                    if reply.status == 200:
                        self.seconds = time.monotonic() - self.started
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)

    def counters(self) -> dict[str, float]:
        """Return the server's counters of tokens and cache hits by name, summed over labels."""
        found = dict.fromkeys(COUNTERS[self.engine], 0.0)
        with urllib.request.urlopen(self.url + "/metrics", timeout=20) as reply:
            for line in reply.read().decode().splitlines():
                name = line.split("{")[0].split(" ")[0]
                if name in found:
                    found[name] += float(line.rsplit(" ", 1)[1])
        return found

    def stop(self) -> float:
        """Send SIGTERM, and SIGKILL after 20 s; return the seconds until the server ended."""
        start = time.monotonic()
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        return time.monotonic() - start


# ---- one run ----
def measure(
    arm: str, servers: list[Server], rows: Path, images: Path, out: Path, tokens: int, in_flight: int
) -> dict[str, Any]:
    """Run one evaluation by `egm eval`'s own code; return its results with the change of the servers' counters."""
    from grounding.evaluate.client.client import Options
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.engines import Sampling, get_engine
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.plan import plan
    from grounding.evaluate.run import run

    sampling = Sampling(max_tokens=tokens)
    extras = get_engine(servers[0].engine).request_extras(sampling) | {"ignore_eos": True}
    request = Request("m", "qwen3", extras, "png" if arm == "png" else "data")
    client = Options(
        tuple(s.url for s in servers), request, in_flight * len(servers), fixed=True, first_alone=arm != "at-once"
    )
    evaluation = Evaluation((rows,), (images,), out, "m", client, sampling)
    planned = plan(evaluation)
    before = [s.counters() for s in servers]
    start = time.monotonic()
    summary = run(evaluation, planned)
    wall = time.monotonic() - start
    f = summary.files[0]
    if summary.errors:
        raise SystemExit(f"{summary.errors} of {f.n} questions failed: {summary.reason}")
    counted = {
        name: round(sum(s.counters()[name] - b[name] for s, b in zip(servers, before, strict=True)))
        for name in COUNTERS[servers[0].engine]
    }
    latencies = {"latency_mean": f.latency_mean, "latency_p50": f.latency_p50, "latency_p90": f.latency_p90}
    result = {
        "arm": arm,
        "rows": f.n,
        "wall_s": round(wall, 3),
        "requests_per_second": round(f.n / wall, 2),
        **{key: round(value, 4) for key, value in latencies.items() if value is not None},
        "tokens_mean": f.tokens_mean,
        "counters": counted,
    }
    print(json.dumps(result), flush=True)
    return result


def machine() -> str:
    """Return a description of GPU, processor and interpreter."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    names = ", ".join(f"{gpus.count(n)} x {n}" for n in dict.fromkeys(gpus)) or "no GPU"
    return f"{names}; {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of each arm, and their ratios to `spread`, pair by pair."""
    by = {arm: [r for r in runs if r["arm"] == arm] for arm in ARMS}
    result: dict[str, Any] = {}
    for arm, those in by.items():
        if those:
            keys = ("requests_per_second", "latency_mean", "latency_p90")
            result[arm] = {k: round(statistics.median(r[k] for r in those), 4) for k in keys}
            pairs = [
                a["requests_per_second"] / b["requests_per_second"] for a, b in zip(those, by["spread"], strict=False)
            ]
            if pairs and arm != "spread":
                result[arm]["times_spread"] = [round(p, 3) for p in pairs]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(EXTRA), default="sglang")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument(
        "--model", type=Path, help="A folder made by model.py, or a real model (then set --server-args)."
    )
    parser.add_argument("--images", type=int, default=400, help="Pictures per run.")
    parser.add_argument("--an-image", type=int, default=6, help="Questions per picture.")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[100], help="Tokens per answer; each value is measured."
    )
    parser.add_argument("--in-flight", type=int, default=64, help="Requests in flight per server.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["affinity", "spread", "at-once"])
    parser.add_argument("--server-python", default=sys.executable, help="Python interpreter with the engine.")
    parser.add_argument("--server-args", default="", help="Further arguments for the server.")
    parser.add_argument("--deadline", type=float, default=600.0, help="Seconds that a start may take.")
    parser.add_argument("--budget", type=float, default=1e9, help="Seconds after which no further repeat starts.")
    parser.add_argument("--logs", type=Path, help="Folder for the servers' logs.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="egm-bench-"))
    logs = arguments.logs or folder
    logs.mkdir(parents=True, exist_ok=True)
    model = arguments.model
    if model is None:
        from model import build

        build(model := folder / "model")
    servers: list[Server] = []
    report: dict[str, Any] = {
        "what": "affinity of images on model servers, and what a start costs",
        "engine": arguments.engine,
        "machine": machine(),
        "model": "sizes of Qwen3-VL-4B, random weights",
        "images_a_run": arguments.images,
        "questions_an_image": arguments.an_image,
        "in_flight_a_server": arguments.in_flight,
        "starts": [],
        "results": [],
    }

    def save() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")

    def start() -> None:
        servers[:] = [
            Server(
                arguments.engine,
                model,
                gpu,
                arguments.server_python,
                logs / f"{arguments.engine}-{gpu}.log",
                arguments.server_args.split(),
            )
            for gpu in range(arguments.gpus)
        ]

    def wait() -> None:
        for server in servers:
            server.ready(arguments.deadline)
        report["starts"].append({"ready_s": [round(s.seconds, 2) for s in servers]})
        print(json.dumps(report["starts"][-1]), flush=True)
        save()

    try:
        start()
        # the first start continues while the pictures are drawn
        (folder / "pictures").mkdir()
        runs = 1 + len(arguments.arms) * arguments.repeats * len(arguments.tokens)
        warm = 16 * arguments.gpus
        tasks = [(folder / "pictures" / f"{i}.jpg", i) for i in range(warm + (runs - 1) * arguments.images)]
        with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
            report["image_bytes_mean"] = round(statistics.mean(pool.map(_write, tasks, chunksize=16)))
        wait()
        report["command"] = " ".join(servers[0].command[1:])
        rows, images = dataset(folder, 0, warm, arguments.an_image, one_each=False)
        report["warm_up"] = measure("affinity", servers, rows, images, folder / "out-warm", 32, arguments.in_flight)
        save()
        following = warm
        for turn in range(arguments.repeats):
            if turn and time.monotonic() - begun > arguments.budget:
                break
            for tokens in arguments.tokens:
                arms = list(arguments.arms)
                if turn % 2:
                    arms.reverse()
                for arm in arms:
                    rows, images = dataset(
                        folder, following, arguments.images, arguments.an_image, one_each=arm == "spread"
                    )
                    found = measure(
                        arm, servers, rows, images, folder / f"out-{following}", tokens, arguments.in_flight
                    )
                    following += arguments.images
                    report["results"].append({"tokens": tokens, **found})
                    report["summary"] = {
                        str(n): summed_up([r for r in report["results"] if r["tokens"] == n]) for n in arguments.tokens
                    }
                    save()
        print(json.dumps(report["summary"], indent=1), flush=True)
        for _ in range(1, arguments.starts):
            report["starts"][-1]["stop_s"] = [round(s.stop(), 2) for s in servers]
            start()
            wait()
    finally:
        stops = [round(server.stop(), 2) for server in servers]
        if report["starts"]:
            report["starts"][-1].setdefault("stop_s", stops)
        save()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    random.seed(0)
    main()
