"""Measure the cost of a scrape of `/metrics` for the operator: `python bench/operator/scrape.py --jobs 5000`. JSON on stdout, no cluster.

The cache has N jobs with their pods: half of them are running trainings, half finished evaluations of eight files. Times are CPU seconds of this
process, for the view, which is taken in the event loop, and for the text, which a thread formats; the first scrape parses all specs.
`lag` is the maximum delay of a task in the same event loop during the scrapes.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import platform
import resource
import sys
import time
from typing import Any

from aiohttp.test_utils import make_mocked_request
from egm_operator.controller.work_queue import WorkQueue
from egm_operator.kube.cache import Key, Store
from egm_operator.metrics.exposition import Exposition
from egm_operator.metrics.meters import Meters
from egm_operator.status import stamp

NOW = 1_800_000_000.0
FILES = (
    "refcoco_val",
    "refcoco_testA",
    "refcoco_testB",
    "refcoco+_val",
    "refcoco+_testA",
    "refcoco+_testB",
    "refcocog_val",
    "refcocog_test",
)


def jobs(count: int) -> list[dict[str, Any]]:
    """Return jobs and their pods as the watches would report them."""
    found: list[dict[str, Any]] = []
    for i in range(count):
        meta = {"name": f"job-{i}", "namespace": f"team-{i % 20}", "uid": f"u{i}", "generation": 1, "resourceVersion": "1",
                "creationTimestamp": stamp(NOW)}  # fmt: skip
        conditions = [
            {"type": t, "status": "True", "reason": "R", "message": "m" * 60, "lastTransitionTime": stamp(NOW)}
            for t in ("ModelReady", "DataReady", "Running", "ProgressAvailable")
        ]
        common = {"conditions": conditions, "attempt": 1, "gpuSeconds": 3600.0 + i}
        if i % 2:
            spec = {
                "preset": "egm-8b-rl",
                "data": {"train": ["/a"], "validation": ["/b"], "images": ["/c"]},
                "output": "s3://b/o",
            }
            status = {
                "phase": "Running", "reason": "AllPodsRunning", "checkpoint": {"step": 10, "uri": "s3://b/c"},
                "progress": {"step": 12, "totalSteps": 300, "percent": 4.0, "etaSeconds": 4000, "time": stamp(NOW)},
                "metrics": {"score": 0.7, "valAccuracy": 0.8},
            }  # fmt: skip
            labels = {
                "grounding.egm.dev/job": f"job-{i}",
                "grounding.egm.dev/kind": "train",
                "grounding.egm.dev/role": "rl",
            }
            pod = {
                "name": f"job-{i}-a1-master-0",
                "namespace": meta["namespace"],
                "uid": f"p{i}",
                "resourceVersion": "1",
                "labels": labels,
            }
            found.append({"kind": "Pod", "metadata": pod, "status": {"phase": "Running", "startTime": stamp(NOW)}})
            kind = "GroundingTrainJob"
        else:
            spec = {"model": {"source": "hf://x/y"}, "data": {"root": "/d", "images": ["/i"]}, "output": "s3://b/o"}
            rows = [{"name": f, "n": 1000, "acc": 0.9, "meanIou": 0.8, "errors": 0, "unparsed": 1} for f in FILES]
            status = {
                "phase": "Succeeded", "reason": "Completed", "done": 8000, "total": 8000, "requestsPerSecond": 60.0,
                "completionTime": stamp(NOW), "accuracy": {"macro": 0.9, "micro": 0.9, "ci95": [0.89, 0.91], "files": rows},
            }  # fmt: skip
            kind = "GroundingEvalJob"
        found.append(
            {
                "apiVersion": "grounding.egm.dev/v1alpha1",
                "kind": kind,
                "metadata": meta,
                "spec": spec,
                "status": {**common, **status},
            }
        )
    return found


async def measure(count: int, rounds: int) -> dict[str, Any]:
    """Scrape `rounds` times and return the measurements."""
    store, queue = Store(), WorkQueue[Key]()
    for obj in jobs(count):
        store.put(obj)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    one = Exposition(store, queue, Meters(), lambda: True, lambda: True, 100_000)

    def cpu() -> float:
        return time.process_time()

    begun = cpu()
    _, packed = one.render(one.view(), zipped=True)
    first = cpu() - begun
    views, texts = [], []
    for _ in range(rounds):
        begun = cpu()
        view = one.view()
        views.append(cpu() - begun)
        begun = cpu()
        _, packed = one.render(view, zipped=True)
        texts.append(cpu() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    body = gzip.decompress(packed)
    lag, over = 0.0, False

    async def ticker() -> None:
        nonlocal lag
        while not over:
            due = time.perf_counter() + 0.005
            await asyncio.sleep(0.005)
            lag = max(lag, time.perf_counter() - due)

    ticking = asyncio.create_task(ticker())
    for _ in range(rounds):
        await one.handle(make_mocked_request("GET", "/metrics", headers={"Accept-Encoding": "gzip"}))
    over = True
    await ticking
    return {
        "jobs": count,
        "machine": {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "python": platform.python_version()},
        "series": sum(1 for line in body.splitlines() if line and not line.startswith(b"#")),
        "bytes": len(body),
        "bytes_compressed": len(packed),
        "first_scrape_cpu_s": round(first, 3),
        "view_cpu_s": round(sorted(views)[len(views) // 2], 4),
        "text_cpu_s": round(sorted(texts)[len(texts) // 2], 3),
        "event_loop_lag_max_s": round(lag, 3),
        "memory_mb": {"before": round(before, 1), "peak": round(peak, 1)},
    }


def main() -> None:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.stdout.write(json.dumps(asyncio.run(measure(options.jobs, options.rounds)), indent=1) + "\n")


if __name__ == "__main__":
    main()
