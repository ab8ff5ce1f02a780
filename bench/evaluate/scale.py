"""Measure time and memory of a large evaluation over several servers. Parts of `python bench/evaluate`.

The mock servers model a GPU server: they process `slots` requests at a time, take `delay` seconds for each, and `encode` seconds more for an
image that is not in their cache. All are separate processes; client and servers share the machine.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILES = {  # numbers of rows of the eight published files
    "refcoco_val": 10834,
    "refcoco_testA": 5657,
    "refcoco_testB": 5095,
    "refcoco+_val": 10758,
    "refcoco+_testA": 5726,
    "refcoco+_testB": 4889,
    "refcocog_val": 4896,
    "refcocog_test": 9602,
}
IMAGES = 9900
MODEL = {"delay": 0.05, "encode": 0.25, "slots": 16, "cache": 1000}
"""An imaginary server, five times as fast as a small real one so that the benchmark is short: 320 cached or 53 uncached answers per second"""


class Servers:
    """Mock servers that run while the block runs."""

    def __init__(self, count: int, **model: float) -> None:
        options = [word for name, value in model.items() for word in (f"--{name}", str(value))]
        self.children = [
            subprocess.Popen([sys.executable, str(HERE / "server.py"), *options], stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        self.urls = [f"http://127.0.0.1:{int(c.stdout.readline())}" for c in self.children]  # type: ignore[union-attr]

    def stats(self) -> list[dict[str, float]]:
        found = []
        for child, url in zip(self.children, self.urls, strict=True):
            if child.poll() is None:
                with urllib.request.urlopen(url + "/stats") as reply:
                    found.append(json.load(reply))
        return found

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()


def pictures(folder: Path, count: int) -> int:
    """Write `count` distinct, decodable JPEGs of 640 x 480 and about 160 KB: coarse and fine noise. Return their mean size in bytes."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    fine = draw.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    size = 0
    for i in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
        picture = Image.blend(coarse, Image.fromarray(np.roll(fine, i * 37, axis=1)), 0.35)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=87)
        (folder / f"{i}.jpg").write_bytes(out.getvalue())
        size += len(out.getvalue())
    return size // count


def eight_files(folder: Path, images: int = IMAGES, scale: float = 1.0) -> int:
    """Write the eight files with their true numbers of rows over `images` images, which the RefCOCO sets share. Return the number of rows."""
    chance, rows = random.Random(1), 0
    pools = {
        "refcoco_": range(0, images // 3),
        "refcoco+": range(0, images // 3),
        "refcocog": range(images // 3, images),
    }
    for name, count in FILES.items():
        pool, count = pools[name[:8]], max(1, int(count * scale))
        with (folder / f"{name}.jsonl").open("w") as f:
            for i in range(count):
                row = {"image": f"{pool[i * len(pool) // count]}.jpg", "sent": f"the {i % 97}th thing from the left"}
                f.write(
                    json.dumps(row | {"bbox": [10, 10, 100 + chance.randrange(300), 200], "width": 640, "height": 480})
                    + "\n"
                )
        rows += count
    return rows


def million(folder: Path, rows: int) -> None:
    """Write one file of `rows` rows, six per image; the images are links to 40 pictures."""
    (folder / "images").mkdir(parents=True)
    from PIL import Image

    for i in range(40):
        Image.new("RGB", (64, 48), (i, 2 * i, 3 * i)).save(folder / f"{i}.jpg")
    for i in range(-(-rows // 6)):
        os.link(folder / f"{i % 40}.jpg", folder / "images" / f"{i}.jpg")
    with (folder / "refcoco_val.jsonl").open("w") as f:
        for i in range(rows):
            row = {"image": f"{i // 6}.jpg", "sent": f"thing {i} of many", "bbox": [5, 5, 30 + i % 30, 40]}
            f.write(json.dumps(row | {"width": 64, "height": 48}) + "\n")


def child(arguments: list[str]) -> dict[str, Any]:
    """Run one evaluation in a new process: `folder out concurrency affinity fixed URL…`. Affinity 0 distributes rows as if each had its own image."""
    from grounding.evaluate.client import client as module
    from grounding.evaluate.client.options import Options
    from grounding.evaluate.client.request import Request
    from grounding.evaluate.engines import Sampling, get_engine
    from grounding.evaluate.evaluation import Evaluation
    from grounding.evaluate.plan import plan
    from grounding.evaluate.run import run

    folder, out, concurrency, affinity, fixed, *urls = arguments
    request = Request("m", "qwen3", get_engine("sglang").request_extras(Sampling()))
    if affinity == "0":
        module.Dispatcher = by_row(module.Dispatcher)  # type: ignore[misc]
    files = tuple(sorted(Path(folder).glob("*.jsonl")))
    options = Options(tuple(urls), request, int(concurrency), fixed=fixed == "1")
    e = Evaluation(files, (Path(folder) / "images",), Path(out), "m", options)
    start = time.perf_counter()
    planned = plan(e)
    read, start = time.perf_counter() - start, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    summary = run(e, planned)
    used = resource.getrusage(resource.RUSAGE_SELF)
    assert summary.errors == 0 and summary.done == summary.total, summary.reason
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    wall = time.perf_counter() - start
    return {"rows": summary.done, "read_s": read, "wall_s": wall, "cpu_s": cpu, "peak_mb": used.ru_maxrss / 1024}


def by_row(kind: Any) -> Any:
    """Return a dispatcher that ignores images, as the baseline: rows in the order of the files, each to any endpoint with a free slot."""
    import numpy as np

    class ByRow(kind):
        def __init__(self, rows: Any, images: Any, names: Any, endpoints: Any, **more: Any) -> None:
            self.real = images
            alone = np.arange(len(images), dtype=np.uint32)
            super().__init__(rows, alone, [str(n) for n in range(len(images))], endpoints, **more)

        def take(self, endpoint: int) -> Any:
            job = super().take(endpoint)
            if job is not None:
                job.group.image = int(self.real[job.row])
            return job

    return ByRow


def measure(
    folder: Path, concurrency: int, urls: list[str], affinity: bool = True, fixed: bool = False
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            str(HERE / "scale.py"),
            str(folder),
            out,
            str(concurrency),
            str(int(affinity)),
            str(int(fixed)),
        ]
        reply = subprocess.run([*command, *urls], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(reply.stdout)
    return found


def servers_part(folder: Path, counts: list[int], rows: int, images: int) -> list[dict[str, Any]]:
    """Return wall time and cache hits for each number of servers, with and without affinity."""
    results = []
    for count in counts:
        for affinity in (True, False):
            with Servers(count, **MODEL) as servers:
                found = measure(folder, 2 * int(MODEL["slots"]) * count, servers.urls, affinity)
                seen = servers.stats()
            asked, hits = sum(s["requests"] for s in seen), sum(s["hits"] for s in seen)
            result = {
                "servers": count,
                "affinity": affinity,
                "rows": found["rows"],
                "wall_s": round(found["wall_s"], 1),
            }
            result |= {
                "requests": int(asked),
                "cache_hits": round(hits / asked, 4),
                "client_cpu_s": round(found["cpu_s"], 1),
            }
            result["ideal_s"] = round(ideal(rows, images, count), 1)
            results.append(result)
            print(json.dumps(result), flush=True)
    return results


def ideal(rows: float, misses: float, servers: int) -> float:
    """Return the seconds that are needed if all slots are always busy and each image is encoded once, at one server."""
    return (rows * MODEL["delay"] + misses * MODEL["encode"]) / (MODEL["slots"] * servers)


def death_part(folder: Path) -> dict[str, Any]:
    """Kill one of four servers half-way. The loss is the time beyond what three servers need for the second half."""
    walls = {}
    for dies in (False, True):
        with ExitStack() as stack:
            servers = stack.enter_context(Servers(4, **MODEL))
            expected = walls.get(False, 0.0)
            if dies:
                # includes one second for the start of the child
                timer = threading.Timer(expected / 2 + 1.0, servers.children[0].kill)
                stack.callback(timer.cancel)
                timer.start()
            found = measure(folder, 128, servers.urls)
            walls[dies] = found["wall_s"]
            asked = sum(s["requests"] for s in servers.stats())
    whole = walls[False]
    result = {
        "servers": 4,
        "undisturbed_s": round(whole, 1),
        "one_dies_s": round(walls[True], 1),
        "least_possible_s": round(whole / 2 + whole / 2 * 4 / 3, 1),
    }
    result["lost_s"] = round(result["one_dies_s"] - result["least_possible_s"], 1)
    result["asked_of_the_three"] = int(asked)
    print(json.dumps(result), flush=True)
    return result


def memory_part(rows: int) -> dict[str, Any]:
    """Return the peak RSS of the whole evaluation, from reading to summary, at 512 in flight (memory.py)."""
    with tempfile.TemporaryDirectory() as temporary, Servers(1) as servers:
        folder = Path(temporary) / "set"
        million(folder, rows)
        command = [sys.executable, str(HERE / "memory.py"), str(folder), servers.urls[0], str(rows // 50)]
        reply = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(reply.stdout)
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1:])))
