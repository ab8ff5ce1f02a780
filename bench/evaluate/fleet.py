"""Measure one client with many endpoints: requests per second, requests per CPU second, memory. A part of `python bench/evaluate`.

One process answers for all endpoints, at once or after `delay` seconds, so that the results for 8, 64 and 256 endpoints only differ by the
client's own work. Client and server share the machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from client import cpu, dataset  # noqa: E402


def evaluate(folder: Path, urls: Sequence[str], each: int) -> dict[str, Any]:
    """Run one evaluation over all endpoints, with `each` requests in flight at each endpoint."""
    from grounding.evaluate.client.options import Options
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.engines import Sampling, get_engine
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.plan import plan
    from grounding.evaluate.run import run

    sampling = Sampling()
    request = Request("m", "qwen3", get_engine("sglang").request_extras(sampling))
    client = Options(tuple(urls), request, each * len(urls), fixed=True)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        e = Evaluation((folder / "refcoco_val.jsonl",), (folder / "images",), Path(out), "m", client, sampling)
        planned = plan(e)
        start, wall = cpu(), time.perf_counter()
        summary = run(e, planned)
        seconds, wall = cpu() - start, time.perf_counter() - wall
        errors = summary.errors
    rows = sum(1 for _ in (folder / "refcoco_val.jsonl").open())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "endpoints": len(urls),
        "in_flight": each * len(urls),
        "rows": rows,
        "errors": errors,
        "requests_per_second": round(rows / wall),
        "requests_per_cpu_second": round(rows / seconds),
        "peak_memory_mb": round(peak),
    }


def fleet_part(
    counts: Sequence[int],
    rows: int,
    delays: Sequence[float] = (0.0, 0.7),
    each: int = 64,
    before: Path | None = None,
    limit_s: float = 300.0,
) -> list[dict[str, Any]]:
    """Return the results for every number of endpoints and delay, each from a separate client process. `before`: another checkout that runs
    alternately."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset(folder, rows, 160, names=rows)
        for delay in delays:
            for count in counts:
                result = {"delay_s": delay, **one(folder, count, delay, each, HERE.parents[1], limit_s)}
                if before is not None:
                    result["before"] = one(folder, count, delay, each, before, limit_s)
                found.append(result)
                print(json.dumps(result), file=sys.stderr, flush=True)
    return found


def one(folder: Path, count: int, delay: float, each: int, tree: Path, limit_s: float) -> dict[str, Any]:
    """Return the results of one client process with the package of `tree` and its own server process."""
    command = [sys.executable, str(HERE / "server.py"), "--delay", str(delay), "--ports", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        urls = [f"http://127.0.0.1:{int(server.stdout.readline())}" for _ in range(count)]
        child = [sys.executable, str(Path(__file__).resolve()), str(folder), str(each), *urls]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        try:
            done = subprocess.run(
                child, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return {"endpoints": count, "not_finished_in_s": limit_s}
        finally:
            server.terminate()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(evaluate(Path(sys.argv[1]), sys.argv[3:], int(sys.argv[2]))))
