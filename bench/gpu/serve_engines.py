"""Compare both engines with the reference's client and server on one GPU, in turn.

    python bench/gpu/serve_engines.py --size 8b --reference CHECKOUT --sglang-path FOLDERS --out DIR

Three servers with random weights run at the same time, each with a small KV cache (`--cache-tokens`), and one of them is asked at a time:

    reference  SGLang as the reference's script starts it; asked by the reference's client, 64 in flight as in its script
    sglang     SGLang as the product starts it; asked by our client
    vllm       vLLM as the product starts it, with `--threads` threads per process; asked by our client

Pictures are JPEGs of 640 x 480 with six questions each; no two runs share one, and every answer has `--tokens` tokens. The reference is asked
first and last. Writes DIR/serve-engines.json after every run: requests/s, latencies, use of the GPU, CPU seconds of server and client, and
at the end the ratios to the reference's faster run.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rl_step import sample
from serve import Runs, arguments, by_reference, draw_pictures, end, limits, watched
from serve_affinity import Server, measure
from train import folder_of


def main() -> int:
    parser = arguments(__doc__, budget=400.0)
    parser.add_argument("--images", type=int, default=90, help="Pictures per run and 64 requests in flight.")
    parser.add_argument("--threads", type=int, default=4, help="OMP_NUM_THREADS of vLLM.")
    parser.add_argument("--cache-tokens", type=int, default=90_000, help="KV cache of each server in tokens.")
    parser.add_argument("--in-flight", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument(
        "--sglang-path", default="", help="PYTHONPATH of SGLang's servers, if it is not installed beside vLLM."
    )
    a = parser.parse_args()
    begun = time.monotonic()
    runs = Runs(
        a.out / "serve-engines.json",
        "both engines and the reference on one GPU, in turn",
        a.size,
        a.tokens,
        vllm_threads=a.threads,
        limit=limits(a.size, a.tokens, a.in_flight),
        ready_s={},
    )
    model = folder_of(a.size, a.work / f"served-{a.size}")
    shape = json.loads((model / "config.json").read_text())["text_config"]
    # keys and values in two bytes each
    of_a_token = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    path = {"PYTHONPATH": a.sglang_path} if a.sglang_path else {}
    small = ["--load-format", "dummy", "--mem-fraction-static", "0.95", "--max-total-tokens", str(a.cache_tokens)]
    bounded = ["--load-format", "dummy", "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes"]

    def begin(
        name: str, number: int, engine: str, flags: list[str], variables: dict[str, str], *, plain: bool = False
    ) -> Server:
        log = a.out / f"server-{name}.log"
        return Server(engine, model, 0, sys.executable, log, flags, number=number, variables=variables, plain=plain)

    samples = a.out / "gpu.csv"
    sampler = sample(1, samples) if shutil.which("nvidia-smi") else None
    samples.touch()
    servers = {
        "vllm": begin(
            "vllm", 0, "vllm", [*bounded, str(a.cache_tokens * of_a_token)], {"OMP_NUM_THREADS": str(a.threads)}
        ),
        "sglang": begin("sglang", 1, "sglang", small, path),
        "reference": begin("reference", 2, "sglang", small, path, plain=True),
    }
    runs.report["commands"] = {name: " ".join(s.command) for name, s in servers.items()}

    def reference() -> None:
        if "reference" in servers:
            rows, pictures = runs.drawn(a.images)
            call = partial(by_reference, a.reference, servers["reference"], rows, pictures, a.tokens, runs.folder)
            found = watched([servers["reference"]], [0], samples, call)
            shutil.rmtree(runs.folder / "reference", ignore_errors=True)
            runs.save(**found | {"run": "reference", "in_flight": 64})

    try:
        count = 2 + len(servers) + 4 * len(a.in_flight)
        runs.report["image_bytes_mean"] = draw_pictures(runs.folder, 16 * len(servers) + count * 2 * a.images)
        for name in list(servers):
            try:
                servers[name].ready(a.deadline)
            except SystemExit as error:  # the others are worth measuring all the same
                runs.save(run=name, failed=str(error)[-3000:])
                servers.pop(name).stop()
                continue
            runs.report["ready_s"][name] = round(servers[name].seconds, 1)
            measure("affinity", [servers[name]], *runs.drawn(16), runs.folder / f"out-warm-{name}", 32, 64)
        runs.save()
        reference()
        for n in a.in_flight:
            for name in ("vllm", "sglang"):
                if name in servers and time.monotonic() - begun < a.budget:
                    rows, pictures = runs.drawn(a.images * (2 if n > 64 else 1))
                    call = partial(measure, "affinity", [servers[name]], rows, pictures, runs.out, a.tokens, n)
                    runs.save(**watched([servers[name]], [0], samples, call) | {"run": f"{name}-{n}", "in_flight": n})
        if time.monotonic() - begun < a.budget:
            reference()
        rates = {r["run"]: r["requests_per_second"] for r in runs.report["results"] if "requests_per_second" in r}
        best = max(
            (r["requests_per_second"] for r in runs.report["results"] if r["run"] == "reference" and "failed" not in r),
            default=None,
        )
        runs.report["times_the_reference"] = (
            {run: round(rate / best, 2) for run, rate in rates.items()} if best else None
        )
    finally:
        end(servers.values(), sampler, runs.folder)
        runs.save()
    return 0


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
