"""Compare the requests per second and core of the evaluation client with those of the HTTP library without our code.

A part of `python bench/evaluate`.

For each number of requests in flight and each server delay, our whole client (reading, encoding, asking, scoring, writing rows) and a bare
aiohttp loop that posts the same bytes run alternately, in separate processes against the same server process. "Per core" means per second of
the client process's CPU time. The latency that the client reports is compared with the server's own measurement. Both leave out the first two
rounds, in which all requests start at the same moment; latency mode leaves them out, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def dataset(folder: Path, rows: int, kib: int, an_image: int = 6, names: int = 200) -> None:
    """Write a file of `rows` expressions with `an_image` rows per image of `kib` KiB. Each image is the header and the end
    of a JPEG with noise in between, because nothing here decodes it.

    There are at most `names` image names and 200 contents; other files are links to these.
    """
    from PIL import Image

    chance = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 480), (90, 120, 30)).save(folder / "head.jpg")
    head = (folder / "head.jpg").read_bytes()[:-2]
    count = min(names, -(-rows // an_image))
    for i in range(count):
        if i >= 200:
            os.link(folder / "images" / f"{i % 200}.jpg", folder / "images" / f"{i}.jpg")
            continue
        noise = chance.randbytes(max(0, kib * 1024 - len(head) - 2))
        (folder / "images" / f"{i}.jpg").write_bytes(head + noise + b"\xff\xd9")
    with (folder / "refcoco_val.jsonl").open("w") as f:
        for row in range(rows):
            box = [10, 10, 100 + row % 300, 200]
            image = f"{(row // an_image) % count}.jpg"
            f.write(
                json.dumps({"image": image, "sent": f"thing {row}", "bbox": box, "width": 640, "height": 480}) + "\n"
            )


def ours(folder: Path, url: str, in_flight: int) -> dict[str, Any]:
    """Run the whole evaluation, and return its figures; CPU time is counted from the first request on."""
    from grounding.evaluate.client.options import Options
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.engines import Sampling, get_engine
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.plan import plan
    from grounding.evaluate.run import run

    sampling = Sampling()
    request = Request("m", "qwen3", get_engine("sglang").request_extras(sampling))
    client = Options((url,), request, in_flight, fixed=True, warm_up=2 * in_flight)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        e = Evaluation((folder / "refcoco_val.jsonl",), (folder / "images",), Path(out), "m", client, sampling)
        planned = plan(e)
        start, wall = cpu(), time.perf_counter()
        summary = run(e, planned)
        seconds, wall = cpu() - start, time.perf_counter() - wall
    f = summary.files[0]
    assert summary.errors == 0, summary.reason
    return {
        "n": f.n,
        "cpu": seconds,
        "wall": wall,
        "latency_mean": f.latency_mean,
        "latency_p50": f.latency_p50,
    }


def bare(folder: Path, url: str, in_flight: int) -> dict[str, Any]:
    """Post the same number of requests with the same bytes by aiohttp, and discard the answers."""
    import aiohttp

    data = json.dumps({"messages": "x" * (len((folder / "images/0.jpg").read_bytes()) * 4 // 3 + 300)}).encode()
    left = sum(1 for _ in (folder / "refcoco_val.jsonl").open())
    total = left

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with session.post(url + "/v1/chat/completions", data=data) as response:
                await response.read()

    async def go() -> tuple[float, float]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            start, wall = cpu(), time.perf_counter()
            await asyncio.gather(*(work(session) for _ in range(in_flight)))
            return cpu() - start, time.perf_counter() - wall

    seconds, wall = asyncio.run(go())
    return {"n": total, "cpu": seconds, "wall": wall}


def measured(kind: str, folder: Path, url: str, in_flight: int, tree: Path | None = None) -> dict[str, Any]:
    """Run one client in a new process. `tree`: another checkout, whose package and copy of this file are used."""
    script = Path(__file__).resolve() if tree is None else tree / "bench" / "evaluate" / "client.py"
    command = [sys.executable, str(script), "--child", kind, str(folder), url, str(in_flight)]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(
    tree: Path, requests: int, rounds: int, in_flights: Sequence[int] = (64, 512), kib: int = 160
) -> list[dict[str, Any]]:
    """Compare this checkout and another one alternately against one server that answers at once. The order changes with each round."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset(folder, requests, kib)
        command = [sys.executable, str(HERE / "server.py"), "--delay", "0", "--skip", "0"]
        for in_flight in in_flights:
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                url = f"http://127.0.0.1:{int(server.stdout.readline())}"
                pace: dict[bool, list[float]] = {True: [], False: []}
                for number in range(rounds):
                    for before in (True, False) if number % 2 else (False, True):
                        run = measured("ours", folder, url, in_flight, tree if before else None)
                        pace[before].append(run["n"] / run["cpu"])
                server.terminate()
            ratios = [now / then for now, then in zip(pace[False], pace[True], strict=True)]
            result = {
                "in_flight": in_flight,
                "rounds": rounds,
                "requests": requests,
                "before_requests_per_core_second": round(statistics.median(pace[True])),
                "requests_per_core_second": round(statistics.median(pace[False])),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(r, 3) for r in ratios],
            }
            results.append(result)
            print(json.dumps(result), flush=True)
    return results


def measure_all(
    requests: int = 60_000,
    rounds: int = 3,
    in_flights: Sequence[int] = (64, 512, 1024),
    delays: Sequence[float] = (0.0, 0.7),
    kib: int = 160,
) -> list[dict[str, Any]]:
    """Return the results of every combination; print each as one line of JSON when it is known."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for delay in delays:
            for in_flight in in_flights:
                rows = requests if not delay else min(requests, int(in_flight / delay * 12))
                folder = Path(temporary) / f"{rows}"
                if not folder.exists():
                    dataset(folder, rows, kib)
                server = subprocess.Popen(
                    [sys.executable, str(HERE / "server.py"), "--delay", str(delay), "--skip", str(2 * in_flight)],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                assert server.stdout is not None
                url = f"http://127.0.0.1:{int(server.stdout.readline())}"
                pairs = []
                for _ in range(rounds):
                    us = measured("ours", folder, url, in_flight)
                    with urllib.request.urlopen(url + "/stats") as reply:
                        us["server"] = json.load(reply)
                    pairs.append((us, measured("bare", folder, url, in_flight)))
                    urllib.request.urlopen(url + "/stats").close()
                server.terminate()
                server.wait()
                best = max((us for us, _ in pairs), key=lambda u: u["n"] / u["cpu"])
                result = {
                    "delay_s": delay,
                    "in_flight": in_flight,
                    "requests_per_core_second": round(statistics.median(u["n"] / u["cpu"] for u, _ in pairs)),
                    "bare_requests_per_core_second": round(statistics.median(b["n"] / b["cpu"] for _, b in pairs)),
                    "ratio": round(statistics.median((u["n"] / u["cpu"]) / (b["n"] / b["cpu"]) for u, b in pairs), 3),
                    "requests_per_second": round(best["n"] / best["wall"]),
                }
                if delay:
                    errors = [u["latency_mean"] / u["server"]["latency_mean"] - 1 for u, _ in pairs]
                    result["latency_error"] = round(statistics.median(errors), 4)
                    result["latency_p50"] = round(statistics.median(u["latency_p50"] for u, _ in pairs), 4)
                    result["server_latency_p50"] = round(
                        statistics.median(u["server"]["latency_p50"] for u, _ in pairs), 4
                    )
                results.append(result)
                print(json.dumps(result), flush=True)
    return results


if __name__ == "__main__":
    kind, folder, url, in_flight = sys.argv[2:]
    print(json.dumps({"ours": ours, "bare": bare}[kind](Path(folder), url, int(in_flight))))
