"""Many endpoints, one client: requests a second, requests a CPU second of the client, and its memory. A part of `python bench/evaluate`.

One process answers for all endpoints, at once or after `delay` seconds, so that the figures of 8, 64 and 256 endpoints differ only by the
client's own work for that many endpoints. Client and server share the machine.
"""

from __future__ import annotations

import json
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
    """One evaluation over all endpoints, `each` requests in flight at each."""
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
        run(e, planned)
        seconds, wall = cpu() - start, time.perf_counter() - wall
    rows = sum(1 for _ in (folder / "refcoco_val.jsonl").open())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "endpoints": len(urls),
        "in_flight": each * len(urls),
        "rows": rows,
        "requests_per_second": round(rows / wall),
        "requests_per_cpu_second": round(rows / seconds),
        "peak_memory_mb": round(peak),
    }


def fleet_part(
    counts: Sequence[int], rows: int, delays: Sequence[float] = (0.0, 0.7), each: int = 64
) -> list[dict[str, Any]]:
    """Return every number of endpoints and delay, each in a client process of its own."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset(folder, rows, 160)
        for delay in delays:
            for count in counts:
                command = [sys.executable, str(HERE / "server.py"), "--delay", str(delay), "--ports", str(count)]
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                    assert server.stdout is not None
                    urls = [f"http://127.0.0.1:{int(server.stdout.readline())}" for _ in range(count)]
                    child = [sys.executable, str(Path(__file__).resolve()), str(folder), str(each), *urls]
                    result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
                    server.terminate()
                found.append({"delay_s": delay, **result})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(evaluate(Path(sys.argv[1]), sys.argv[3:], int(sys.argv[2]))))
