"""Measure evaluation over two GPUs: scaling, engines that share a GPU, tensor and data parallelism, and a server that is killed half-way.

    python bench/gpu/serve_two.py --size 8b --out DIR [--reference CHECKOUT]

Servers of vLLM with random weights and `--threads` threads per process, each with a fixed KV cache (`--cache-gib`), so that several fit on one
GPU. The first four are started at the same time, the others once `two` and `shared` have ended (`copies` also at the start, if
`shared` is not needed because of `--skip`):

    one      on GPU 0
    two      on GPU 1
    shared   on GPU 1 beside `two`
    tensor   over both GPUs (`--tensor-parallel-size 2`)
    copies   two data-parallel copies behind one port, one on each GPU
    doubled  two data-parallel copies behind one port, both on GPU 1

Pictures are JPEGs of 640 x 480 with six questions each; no two runs share one. A run asks some of the servers while the others are idle. Runs:

    one-64, one-256          the server `one`, 64 and 256 requests in flight
    reference                the reference's client against `one`, 64 in flight
    sharing-256, -512        `two` and `shared`: two engines on one GPU
    both-128, both-512       `one` and `two`: scaling to two GPUs, 64 and 256 in flight for each
    spread-512               the same, but the server of a question is chosen by a hash, so no server gets all questions of an image
    killed                   `one` and `shared`; `shared` gets SIGKILL after a third of the questions
    tensor-64, tensor-256    the server over both GPUs
    copies-128, copies-512   the copies on two GPUs
    doubled-256, -512        the copies on one GPU

Writes DIR/serve-two.json after every run: requests/s, latencies, use of the GPUs, CPU seconds of servers and client.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from rl_step import sample
from serve import Runs, arguments, by_reference, draw_pictures, end, limits, watched
from serve_affinity import Server, measure
from train import folder_of

from grounding.files import complete_lines


def kill_after(server: Server, out: Path, rows: int, done: threading.Event) -> None:
    """Kill a server and its processes once `rows` answers are on the disk."""
    while not done.wait(0.1):
        found = sum(sum(1 for _ in complete_lines(file)) for file in out.rglob("*.jsonl"))
        if found >= rows:
            os.killpg(server.process.pid, signal.SIGKILL)
            return


def main() -> int:
    parser = arguments(__doc__, budget=420.0)
    parser.add_argument(
        "--images",
        type=int,
        default=120,
        help="Pictures per run and 64 requests in flight, at most three times as many.",
    )
    parser.add_argument("--threads", type=int, default=4, help="OMP_NUM_THREADS of all servers.")
    parser.add_argument("--cache-gib", type=int, default=16, help="KV cache of each server in GiB.")
    parser.add_argument("--server-args", default="--load-format dummy", help="Further arguments for all servers.")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help="Runs to leave out, without the number of requests.")
    a = parser.parse_args()
    begun = time.monotonic()
    runs = Runs(
        a.out / "serve-two.json",
        "evaluation over two GPUs, by servers and requests in flight",
        a.size,
        a.tokens,
        engine="vllm",
        threads=a.threads,
        limit_of_one_gpu=limits(a.size, a.tokens, (64, 256)),
        ready_s={},
        commands={},
    )
    model = folder_of(a.size, a.work / f"served-{a.size}")
    servers: dict[str, Server] = {}

    def begin(name: str, gpus: str, more: tuple[str, ...] = (), tensor: int = 1) -> None:
        cache = str(a.cache_gib * 2**30)
        flags = [*a.server_args.split(), "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", cache, *more]
        log = a.out / f"server-{name}.log"
        first, number, threads = int(gpus[0]), len(servers), {"OMP_NUM_THREADS": str(a.threads)}
        servers[name] = Server(
            "vllm",
            model,
            first,
            sys.executable,
            log,
            flags,
            gpus=gpus,
            number=number,
            variables=threads,
            tensor=tensor,
        )
        runs.report["commands"][name] = " ".join(servers[name].command)

    def ready(name: str) -> None:
        servers[name].ready(a.deadline)
        runs.report["ready_s"][name] = round(servers[name].seconds, 1)
        rows, pictures = runs.drawn(16)
        measure("affinity", [servers[name]], rows, pictures, runs.folder / f"out-warm-{name}", 32, 64)
        runs.save()

    def ask(run: str, names: list[str], gpus: list[int], in_flight: int, arm: str = "affinity") -> None:
        """Ask servers with `in_flight` requests for each."""
        if run in a.skip or time.monotonic() - begun > a.budget:
            return
        of = [servers[name] for name in names]
        rows, pictures = runs.drawn(a.images * min(3, max(1, in_flight * len(of) // 64)), one_each=arm == "spread")
        call = partial(measure, arm, of, rows, pictures, runs.out, a.tokens, in_flight)
        found = watched(of, gpus, samples, call)
        runs.save(**found | {"run": f"{run}-{in_flight * len(of)}", "servers": names, "in_flight": in_flight * len(of)})

    def killed() -> None:
        if "killed" in a.skip or time.monotonic() - begun > a.budget:
            return
        of = [servers["one"], servers["shared"]]
        rows, pictures = runs.drawn(2 * a.images)
        out, done = runs.out, threading.Event()
        killer = threading.Thread(target=kill_after, args=(of[1], out, 4 * a.images, done))
        killer.start()
        counted, last = Server.counters, of[1].counters()  # a killed server cannot be asked again
        Server.counters = lambda server: last if server is of[1] else counted(server)  # type: ignore[method-assign]
        try:
            found = measure("affinity", of, rows, pictures, out, a.tokens, 128)
            runs.save(
                **found
                | {"run": "killed", "servers": ["one", "shared"], "in_flight": 256, "dead": of[1].process.poll()}
            )
        except SystemExit as error:
            runs.save(run="killed", failed=str(error))
        finally:
            Server.counters = counted  # type: ignore[method-assign]
            done.set()
            killer.join()

    samples = a.out / "gpu.csv"
    sampler = sample(2, samples) if shutil.which("nvidia-smi") else None
    samples.touch()
    try:
        copies, sharing = ("--data-parallel-size", "2"), not {"sharing", "killed"} <= set(a.skip)
        begin("one", "0")
        begin("two", "1")
        if sharing:
            begin("shared", "1")
        if "tensor" not in a.skip:
            begin("tensor", "0,1", tensor=2)
        if not sharing and "copies" not in a.skip:
            begin("copies", "0,1", copies)
        runs.report["image_bytes_mean"] = draw_pictures(runs.folder, 6 * 16 + 36 * a.images)
        for name in ("one", "two", "shared"):
            if name in servers:
                ready(name)
        ask("one", ["one"], [0], 64)
        if a.reference and "reference" not in a.skip:
            rows, pictures = runs.drawn(a.images)
            call = partial(by_reference, a.reference, servers["one"], rows, pictures, a.tokens, runs.folder)
            runs.save(**watched([servers["one"]], [0], samples, call) | {"run": "reference", "in_flight": 64})
        ask("one", ["one"], [0], 256)
        ask("sharing", ["two", "shared"], [1], 128)
        ask("sharing", ["two", "shared"], [1], 256)
        ask("both", ["one", "two"], [0, 1], 64)
        ask("both", ["one", "two"], [0, 1], 256)
        ask("spread", ["one", "two"], [0, 1], 256, "spread")
        killed()
        for name in ("two", "shared"):
            if name in servers:
                servers[name].stop()
        if "copies" not in {*a.skip, *servers}:
            begin("copies", "0,1", copies)
        if "doubled" not in a.skip:
            begin("doubled", "1,1", copies)
        later: dict[str, tuple[list[int], tuple[int, ...]]] = {
            "tensor": ([0, 1], (64, 256)),
            "copies": ([0, 1], (128, 512)),
            "doubled": ([1], (256, 512)),
        }
        for name, (gpus, in_flight) in later.items():
            if name not in servers or time.monotonic() - begun > a.budget:
                continue
            try:
                ready(name)
                for n in in_flight:
                    ask(name, [name], gpus, n)
            except SystemExit as error:  # the others are worth measuring all the same
                runs.save(run=name, failed=str(error))
    finally:
        end(servers.values(), sampler, runs.folder)
        runs.save()
    return 0


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
