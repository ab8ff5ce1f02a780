"""Complete lives of jobs, in which the first attempt fails and the second succeeds, and checks that must hold at the end."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict

from egm_operator.manifests.gangs import BACKENDS

from tests.cluster.operator_kit import Drive, eval_job, train_job, until

ENDS = ("Succeeded", "Failed")
Jobs = list[tuple[str, str]]
"""Kind (gtj, gej) and name."""


class World(threading.Thread):
    """Ends pods (first attempts fail, second ones succeed) and records every object that it sees."""

    def __init__(self, drive: Drive) -> None:
        super().__init__(daemon=True)
        self.drive, self.over = drive, threading.Event()
        self.uids: dict[str, set[str]] = defaultdict(set)
        self.told: set[str] = set()
        self.phases: dict[str, list[str]] = defaultdict(list)

    def __enter__(self) -> World:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(30)

    def run(self) -> None:
        while not self.over.wait(0.1):
            with contextlib.suppress(OSError):
                self._look()

    def _look(self) -> None:
        pods = self.drive.api.list("pod", self.drive.namespace)
        # list owners after the pods and before ending them, because a pod's owner exists as long as the pod runs
        for kind in ("pytorchjob", "job"):
            for obj in self.drive.api.list(kind, self.drive.namespace):
                self.uids[f"{kind}/{obj['metadata']['name']}"].add(obj["metadata"]["uid"])
        for kind in ("gtj", "gej"):
            for obj in self.drive.api.list(kind, self.drive.namespace):
                phase = obj.get("status", {}).get("phase", "")
                seen = self.phases[obj["metadata"]["name"]]
                if not seen or seen[-1] != phase:
                    seen.append(phase)
        for pod in pods:
            labels, uid = pod["metadata"]["labels"], pod["metadata"]["uid"]
            if (
                pod["status"].get("phase") != "Running"
                or labels["grounding.egm.dev/role"] == "server"
                or uid in self.told
            ):
                continue
            first = labels.get("grounding.egm.dev/attempt") == "1"
            self.drive.annotate(pod, exit_code="1" if first else "0")
            self.told.add(uid)


def make_jobs(drive: Drive, count: int) -> Jobs:
    """Create `count` trainings of two nodes, by each back end in turn, and as many evaluations."""
    made: Jobs = []
    for i in range(count):
        drive.api.create("gtj", drive.namespace, train_job(f"t{i}", nodes=2, backend=_backend(i)))
        drive.api.create("gej", drive.namespace, eval_job(f"e{i}", 1))
        made += [("gtj", f"t{i}"), ("gej", f"e{i}")]
    return made


def _backend(number: int) -> str:
    return list(BACKENDS)[number % len(BACKENDS)]


def check(drive: Drive, world: World, jobs: Jobs) -> None:
    """Check the state after all jobs have ended."""
    for kind, name in jobs:
        status = drive.status(name, kind)
        assert status["phase"] == "Succeeded" and status["attempt"] == 2, (name, status, world.phases[name])
        assert status["reason"] == "Completed", status
        conditions = {c["type"]: c["status"] for c in status["conditions"]}
        true = {t for t, s in conditions.items() if s == "True"}
        assert true - {"ProgressAvailable"} == {"ModelReady", "DataReady", "Succeeded", "Complete", "Ready"}, (
            name,
            conditions,
        )
    double = {n: u for n, u in world.uids.items() if len(u) != 1}
    assert not double, double
    for kind, name in jobs:
        wanted = {f"job/{name}-prepare"}
        if kind == "gtj":
            wanted |= {f"{_backend(int(name[1:]))}/{name}-a{attempt}" for attempt in (1, 2)}
        else:
            wanted = {f"job/{name}-eval-client-1", f"job/{name}-eval-client-2", f"job/{name}-eval-prepare"}
        seen = {n for n in world.uids if n.split("/")[1].startswith(f"{name}-")}
        assert seen == wanted, (seen, wanted)
    until(
        "the deletion of the servers",
        lambda: not [p for p in drive.api.list("pod", drive.namespace) if "-server-" in p["metadata"]["name"]],
    )
    for kind, name in jobs:
        drive.api.delete(kind, drive.namespace, name)
    _until_collected(drive)


def _until_collected(drive: Drive, seconds: float = 150) -> None:
    """Wait for Kubernetes' garbage collector.

    It pauses when the list of resources changes, as it does while an API server starts, and looks again every 30 s.
    """
    left: list[str] = []

    def gone() -> bool:
        left[:] = [n for n in drive.api.everything(drive.namespace) if not n.startswith("leases")]
        return not left

    try:
        until("an empty namespace", gone, seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}; left: {', '.join(left)}") from None


def ended(drive: Drive, jobs: Jobs) -> bool:
    """Return whether all jobs have ended."""
    return all(drive.status(n, k).get("phase") in ENDS for k, n in jobs)
