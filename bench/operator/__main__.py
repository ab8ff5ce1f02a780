"""Measure the operator under load on the cluster of `make cluster`: `python bench/operator [--jobs 100 1000 5000] [--check]`. JSON on stdout.

For each number N, in a separate namespace with a separate operator:

1. burst    Create N training jobs of one pod as fast as the API server accepts them. The simulated pods keep training. Measures jobs per
            second until the last gang (the PyTorchJob, or with `--backend job` the Indexed Job) exists, and until the last job is Running.
2. idle     Do nothing for a while. Measures memory and CPU.
3. end      End the training pods as fast as the API server accepts it. Measures jobs per second until the last job is Succeeded, and
            the time from a gang's success to its job's.
4. steady   Create 100 more jobs, `--rate` per second. Measures the latency from a job's creation to its gang in a cluster that is not busy.

The jobs write to S3, like those in `jobs/`. With `--shared`, they write to a claim: the data is then prepared once by a batch/v1 Job, which is
scheduled, runs and ends (at once) between a job's creation and its gang.

Times are measured in this process, which watches the API server. CPU seconds are reported for every process, to show how the two cores are used.
Results are stored in `results.json`, and `--check` compares them with `ranges.json`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

import ranges  # noqa: E402
import usage  # noqa: E402
from egm_operator.manifests.gangs import BACKENDS  # noqa: E402
from operator_kit import Api, Operator, kubeconfig, new_namespace, train_job, until  # noqa: E402
from watches import Server, Watch, conditions, phase  # noqa: E402

RUN = ROOT / ".cache" / "cluster"
NODES, GPUS = 20, 1000
STEADY = 100
_MERGE = "application/merge-patch+json"


def quantiles(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum in seconds."""
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3) for name, q in at.items()}


def per_job(used: dict[str, float], jobs: int) -> dict[str, float]:
    """Return CPU seconds per job, without processes that used almost none."""
    return {name: round(s / jobs, 4) for name, s in sorted(used.items(), key=lambda x: -x[1]) if s / jobs >= 0.0005}


def nodes(api: Api) -> None:
    """Create simulated nodes with capacity for all jobs, separate from those of the tests."""
    capacity = {"cpu": "100000", "memory": "1000Ti", "pods": "5000", "nvidia.com/gpu": str(GPUS)}
    there = {n["metadata"]["name"] for n in api.request("GET", "/api/v1/nodes")["items"]}
    for name in {f"bench-{i}" for i in range(NODES)} - there:
        meta = {"name": name, "labels": {"type": "bench"}, "annotations": {"kwok.x-k8s.io/node": "fake"}}
        status = {"capacity": capacity, "allocatable": capacity}
        api.request("POST", "/api/v1/nodes", {"metadata": meta, "status": status})


def success(backend: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """Return what marks a gang of a back end whose controller has first reported success."""
    types = {kind.lower() for kind in BACKENDS[backend].form.succeeded}
    return lambda obj: ["succeeded"] if types & set(conditions(obj)) else []


def job(name: str, shared: bool) -> dict[str, Any]:
    """Return a training job whose data is prepared at once and whose pod runs until it is asked to end."""
    output = "pvc://egm/out" if shared else "s3://bucket/out"
    found = train_job(name, {"egm.test/prepare-exit-code": "0"}, output=output)
    found["spec"]["resources"]["nodeSelector"] = {"type": "bench"}
    return found


class Bench:
    """A benchmark with one namespace, one operator and N jobs."""

    def __init__(self, server: Server, namespace: str, pid: int, options: argparse.Namespace) -> None:
        self.server, self.namespace, self.options, self.pid = server, namespace, options, pid
        self.meter = usage.Meter({"operator": pid, "bench": os.getpid(), **usage.control_plane(RUN)})
        self.jobs = Watch(server, "gtj", namespace, phase)
        role = "&labelSelector=grounding.egm.dev%2Frole%3D"
        self.gangs = Watch(server, options.backend, namespace, success(options.backend), f"{role}rl")
        self.steps = Watch(server, "job", namespace, conditions, f"{role}prepare")
        self.preparing = Watch(server, "pod", namespace, phase, f"{role}prepare")
        self.made: dict[str, float] = {}

    async def create(self, names: list[str], rate: float) -> None:
        """Create jobs, `rate` per second, or (0) with sixteen requests in flight."""
        path, begun = self.server.api.path("gtj", self.namespace), time.monotonic()
        limit = asyncio.Semaphore(16)

        async def one(name: str, due: float) -> None:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            async with limit:
                await self.server.request("POST", path, job(name, self.options.shared))
                self.made[name] = time.monotonic()

        await asyncio.gather(*(one(n, begun + (i / rate if rate else 0)) for i, n in enumerate(names)))

    async def end(self, names: list[str]) -> None:
        """Make the training pods of the jobs succeed."""
        pods = self.server.api.path("pod", self.namespace)
        listed = await self.server.request("GET", f"{pods}?labelSelector=grounding.egm.dev%2Frole%3Drl")
        meta = [pod["metadata"] for pod in listed["items"]]
        pod_of = {each["labels"]["grounding.egm.dev/job"]: each["name"] for each in meta}
        limit = asyncio.Semaphore(16)
        wish = {"metadata": {"annotations": {"egm.test/exit-code": "0"}}}

        async def one(name: str) -> None:
            async with limit:
                path = self.server.api.path("pod", self.namespace, pod_of[name])
                await self.server.request("PATCH", path, wish, _MERGE)

        await asyncio.gather(*(one(n) for n in names))

    def latencies(self, names: list[str]) -> dict[str, Any]:
        """Return the times from a job's creation to its gang. If a Job prepares the data, also return those from the creation to that Job, and
        from the end of its pod to the gang."""
        gang = {n: self.gangs.seen[f"{n}-a1"]["there"] for n in names}
        found = {"create_to_gang_s": quantiles([gang[n] - self.made[n] for n in names])}
        if not self.options.shared:
            return found
        prepared = {
            n.rsplit("-prepare-", 1)[0]: m["succeeded"] for n, m in self.preparing.seen.items() if "succeeded" in m
        }
        return found | {
            "create_to_first_object_s": quantiles(
                [self.steps.seen[f"{n}-prepare"]["there"] - self.made[n] for n in names]
            ),
            "prepared_to_gang_s": quantiles([gang[n] - prepared[n] for n in names]),
        }

    def finishes(self, names: list[str]) -> dict[str, float]:
        """Return the times from a gang's success to its job's success."""
        return quantiles([self.jobs.seen[n]["succeeded"] - self.gangs.seen[f"{n}-a1"]["succeeded"] for n in names])

    async def run(self, count: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run all parts and return the report. `keep` gets the report after each part, because each takes minutes."""
        watching = [await w.begin() for w in (self.jobs, self.gangs, self.steps, self.preparing)]
        report: dict[str, Any] = {"jobs": count, "load_before": round(os.getloadavg()[0], 2)}
        try:
            report["memory_before"] = usage.memory(self.pid)
            for part in (self._burst, self._idle, self._end, *([self._steady] if self.options.rate else [])):
                await part(report, count)
                keep(report)
        finally:
            for task in watching:
                task.cancel()
        return report

    async def _burst(self, report: dict[str, Any], count: int) -> None:
        names, seconds = [f"b{i}" for i in range(count)], self.options.timeout
        self.meter.lap()
        begun = time.monotonic()
        await self.create(names, 0)
        created = time.monotonic()
        gangs = await self.gangs.until("there", count, seconds)
        used = self.meter.lap()
        running = await self.jobs.until("running", count, seconds)
        after = self.meter.lap()
        report["burst"] = {
            "seconds": {
                "creating": round(created - begun, 2),
                "to_all_gangs": round(gangs - begun, 2),
                "to_all_running": round(running - begun, 2),
            },
            "jobs_per_second_to_gang": round(count / (gangs - begun), 2),
            "jobs_per_second_to_running": round(count / (running - begun), 2),
            **self.latencies(names),
            "cpu_seconds_per_job_to_gang": per_job(used, count),
            "cpu_seconds_per_job_to_running": per_job({n: used[n] + after[n] for n in used}, count),
        }

    async def _idle(self, report: dict[str, Any], count: int) -> None:
        await asyncio.sleep(10)  # wait for the remaining events
        self.meter.lap()
        await asyncio.sleep(self.options.idle)
        used = self.meter.lap()["operator"]
        report["idle"] = {
            **usage.memory(self.pid),
            "operator_cpu_percent": round(100 * used / self.options.idle, 2) if self.options.idle else None,
        }

    async def _end(self, report: dict[str, Any], count: int) -> None:
        names = [f"b{i}" for i in range(count)]
        self.meter.lap()
        begun = time.monotonic()
        await self.end(names)
        ended = await self.jobs.until("succeeded", count, self.options.timeout)
        report["end"] = {
            "seconds": round(ended - begun, 2),
            "jobs_per_second": round(count / (ended - begun), 2),
            "finish_to_succeeded_s": self.finishes(names),
            "cpu_seconds_per_job": per_job(self.meter.lap(), count),
        }

    async def _steady(self, report: dict[str, Any], count: int) -> None:
        names = [f"s{i}" for i in range(STEADY)]
        await asyncio.sleep(5)
        self.meter.lap()
        await self.create(names, self.options.rate)
        await self.jobs.until("running", count + STEADY, self.options.timeout)
        used = self.meter.lap()
        await self.end(names)
        await self.jobs.until("succeeded", count + STEADY, self.options.timeout)
        report["steady"] = {
            "jobs": STEADY,
            "jobs_per_second": self.options.rate,
            **self.latencies(names),
            "finish_to_succeeded_s": self.finishes(names),
            "cpu_seconds_per_job_to_running": per_job(used, STEADY),
        }


@contextmanager
def operator(namespace: str, options: argparse.Namespace) -> Any:
    """Run an operator with its default settings as a process."""
    log = Path(tempfile.mkdtemp()) / "operator.log"
    more = {
        "EGM_OPERATOR_LEASE_SECONDS": "15",
        "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "10",
        "EGM_OPERATOR_PROGRESS_VIA": "pod",
        "EGM_OPERATOR_BACKEND": options.backend,
    }
    found = Operator(namespace, log, command=shlex.split(options.operator), **more).start()
    try:
        until("its start", lambda: log.exists() and '"leads"' in log.read_text())
        time.sleep(2)
        yield found
    finally:
        if found.running():
            found.stop()


async def measure(
    count: int,
    namespace: str,
    running: Operator,
    options: argparse.Namespace,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure one number of jobs."""
    assert running.process is not None
    async with aclosing(Server(Api(kubeconfig()))) as server:
        return await Bench(server, namespace, running.process.pid, options).run(count, keep)


def one(count: int, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure with `count` jobs, pass the report to `keep`, then wait until the jobs' objects have been deleted."""
    api = Api(kubeconfig())
    nodes(api)
    report: dict[str, Any] = {}
    with new_namespace(api, "bench") as namespace:
        with operator(namespace, options) as running:
            report = asyncio.run(measure(count, namespace, running, options, keep))
            running.stop()
        lines = [line for line in running.lines() if line["level"] in ("warning", "error")]
        report["warnings"] = len(lines)
        all_jobs = count + (STEADY if options.rate else 0)
        if counted := usage.audited(RUN / "logs", "egm-operator", namespace):
            report["requests_per_job"] = {k: round(v / all_jobs, 2) for k, v in counted.items() if v >= all_jobs / 50}
            writes = [v for k, v in counted.items() if k.split()[0] in ("create", "patch", "update", "delete")]
            report["writes_per_job"] = round(sum(writes) / all_jobs, 2)
            report["patches_per_job"] = round(
                sum(v for k, v in counted.items() if k.startswith("patch ")) / all_jobs, 2
            )
    keep(report)  # keep it now, because the deletion below takes minutes
    until("the namespace to go", lambda: _gone(api, namespace), 900)


def _gone(api: Api, namespace: str) -> bool:
    return namespace not in {n["metadata"]["name"] for n in api.request("GET", "/api/v1/namespaces")["items"]}


def main() -> int:
    """Measure, print, store and compare the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rate", type=float, default=4.0, help="jobs per second in the steady part; 0 skips it")
    parser.add_argument(
        "--shared", action="store_true", help="let jobs write to a claim, so that each has a preparing Job"
    )
    parser.add_argument("--backend", choices=list(BACKENDS), default="pytorchjob", help="what runs a training")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds of the idle part")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument(
        "--check", action="store_true", help="exit with code 1 if a result is outside its range in ranges.json"
    )
    parser.add_argument(
        "--operator",
        default=f"{sys.executable} -m egm_operator",
        help="command that starts the operator, for example under a profiler",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the operator that was started is also stopped
    if not kubeconfig().exists():
        parser.error(f"{kubeconfig()} does not exist; start a cluster by `make cluster`, or set EGM_KUBECONFIG")
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Linux, Python {platform.python_version()}"

    def key(count: int) -> str:
        words = [str(count), *(["shared"] if options.shared else []), *(["job"] if options.backend == "job" else [])]
        return " ".join(words)

    for count in options.jobs:

        def keep(report: dict[str, Any], count: int = count) -> None:
            found[key(count)] = report
            options.out.write_text(json.dumps(found, indent=1) + "\n")

        one(count, options, keep)
    shown = {"machine": found["machine"], **{key(c): found[key(c)] for c in options.jobs}}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    return ranges.check(shown, HERE / "ranges.json") if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
