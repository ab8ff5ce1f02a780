"""The operator under load: `python bench/operator/run.py --jobs 100`, on the cluster of `make cluster`. JSON on stdout.

N training jobs of one pod are created as fast as the API server takes them. Their simulated pods, the one that prepares data and the one that
trains, end `--pod-seconds` after their start. Times are of one process that watches the API server: from the answer to a job's creation until
its first object and its PyTorchJob are seen (between these lies a whole batch/v1 Job), from that Job's end to the PyTorchJob, from the PyTorchJob's
success to the job's. CPU and memory are the operator's own, from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from operator_kit import Api, Operator, kubeconfig, new_namespace, train_job, until  # noqa: E402


class Watch(threading.Thread):
    """Notes when something is first true of each object of a kind (monotonic seconds)."""

    def __init__(self, api: Api, kind: str, namespace: str) -> None:
        super().__init__(daemon=True)
        self.api, self.path = api, api.path(kind, namespace)
        self.seen: dict[str, dict[str, float]] = {}
        self.over = False

    def run(self) -> None:
        version = self.api.request("GET", self.path)["metadata"]["resourceVersion"]
        while not self.over:
            asked = urllib.request.Request(
                f"{self.api.server}{self.path}?watch=1&resourceVersion={version}&timeoutSeconds=300"
            )
            with contextlib.suppress(OSError), self.api._open(asked, timeout=310) as answer:
                for line in answer:
                    event, now = json.loads(line), time.monotonic()
                    obj = event["object"]
                    version = obj["metadata"]["resourceVersion"]
                    marks = self.seen.setdefault(obj["metadata"]["name"], {})
                    marks.setdefault("there", now)
                    status = obj.get("status") or {}
                    done = status.get("phase") == "Succeeded" or any(
                        c["type"] in ("Succeeded", "Complete") and c["status"] == "True"
                        for c in status.get("conditions") or []
                    )
                    if done:
                        marks.setdefault("succeeded", now)


def quantile(values: list[float], q: float) -> float | None:
    """The q-quantile, seconds."""
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))], 3) if values else None


def usage(pid: int) -> tuple[float, float]:
    """CPU seconds and resident MB of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = int(fields[11]) + int(fields[12])
    resident = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return ticks / os.sysconf("SC_CLK_TCK"), int(resident.split()[1]) / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--pod-seconds", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=540)
    options = parser.parse_args()
    api = Api(kubeconfig())
    for namespace in new_namespace(api, "bench"):
        log = Path(tempfile.mkdtemp()) / "operator.log"
        operator = Operator(namespace, log, EGM_LEADER_ELECT="false", EGM_PROGRESS_SECONDS="600").start()
        until("its start", lambda log=log: log.exists() and "started" in log.read_text())
        time.sleep(3)
        gangs, jobs, steps = (Watch(api, kind, namespace) for kind in ("pytorchjob", "gtj", "job"))
        for watch in (gangs, jobs, steps):
            watch.start()
        time.sleep(1)
        assert operator.process is not None
        pid = operator.process.pid
        cpu_before, memory_before = usage(pid)
        pods = {"egm.test/exit-code": "0", "egm.test/delay": f"{int(1000 * options.pod_seconds)}ms"}
        begun, made = time.monotonic(), {}
        for i in range(options.jobs):
            name = f"b{i}"
            api.create("gtj", namespace, train_job(name, pods))
            made[name] = time.monotonic()
        created = time.monotonic()

        def all_done(jobs: Watch = jobs) -> bool:
            return sum("succeeded" in m for m in jobs.seen.values()) >= options.jobs

        until("all jobs", all_done, options.timeout)
        ended = time.monotonic()
        cpu, memory = usage(pid)
        starts = [gangs.seen[f"{n}-a1"]["there"] - t for n, t in made.items()]
        firsts = [steps.seen[f"{n}-prepare"]["there"] - t for n, t in made.items()]
        between = [gangs.seen[f"{n}-a1"]["there"] - steps.seen[f"{n}-prepare"]["succeeded"] for n in made]
        ends = [jobs.seen[n]["succeeded"] - gangs.seen[f"{n}-a1"]["succeeded"] for n in made]
        last_gang = max(m["there"] for m in gangs.seen.values())
        code = operator.stop()
        requests = next((line["requests"] for line in reversed(operator.lines()) if "requests" in line), {})
        gangs.over = jobs.over = steps.over = True
    report: dict[str, Any] = {
        "jobs": options.jobs,
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "seconds": {
            "creating": round(created - begun, 2),
            "to_all_pytorchjobs": round(last_gang - begun, 2),
            "to_the_end": round(ended - begun, 2),
        },
        "jobs_per_second_to_pytorchjob": round(options.jobs / (last_gang - begun), 2),
        "jobs_per_second_to_the_end": round(options.jobs / (ended - begun), 2),
        "create_to_first_object_s": {"p50": quantile(firsts, 0.5), "p99": quantile(firsts, 0.99)},
        "prepared_to_pytorchjob_s": {"p50": quantile(between, 0.5), "p99": quantile(between, 0.99)},
        "create_to_pytorchjob_s": {"p50": quantile(starts, 0.5), "p99": quantile(starts, 0.99)},
        "finish_to_succeeded_s": {"p50": quantile(ends, 0.5), "p99": quantile(ends, 0.99)},
        "requests_per_job": {k: round(v / options.jobs, 2) for k, v in requests.items()},
        "cpu_seconds_per_job": round((cpu - cpu_before) / options.jobs, 4),
        "memory_mb": {"before": round(memory_before, 1), "at_the_end": round(memory, 1)},
        "exit_code": code,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
