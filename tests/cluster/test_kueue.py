"""Jobs of both kinds in the queues of a real Kueue: with its default integrations, and with the one of PyTorchJob in addition."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kueue_kit import Kueue, gpus, installed, watch_for, writes
from tests.cluster.operator_kit import ROOT, Drive, Operator, eval_job, new_namespace, train_job, until
from tests.cluster.scene import MEASURED
from tests.unit.test_docs_commands import blocks

pytestmark = pytest.mark.timeout(300)  # the first test also starts the cluster
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


@pytest.fixture(scope="module")
def kueue(cluster: Any) -> Iterator[Kueue]:
    del cluster
    with installed() as found:
        yield found


@contextlib.contextmanager
def _operating(kueue: Kueue, backend: str, log: Path) -> Iterator[Drive]:
    """Run an operator for a new namespace, whose trainings use this back end."""
    with new_namespace(kueue.api, "queue") as namespace:
        operator = Operator(namespace, log, EGM_OPERATOR_BACKEND=backend).start()
        yield Drive(kueue.api, namespace, backend)
        assert operator.running(), operator.log.read_text()[-3000:]
        assert operator.stop() == 0
        wrong = [line for line in operator.lines() if line["level"] == "error" or "exception" in line]
        assert not wrong, wrong


@pytest.fixture
def drive(kueue: Kueue, tmp_path: Path) -> Iterator[Drive]:
    """Run an operator with the back end that Kueue manages by default."""
    kueue.integrate()
    with _operating(kueue, "job", tmp_path / "log") as found:
        yield found


@pytest.fixture(params=["job", "pytorchjob"])
def training(kueue: Kueue, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Drive]:
    """Run an operator with each back end in turn, and Kueue with the integrations that the back end needs."""
    kueue.integrate(*(["--pytorchjob"] if request.param == "pytorchjob" else []))
    with _operating(kueue, request.param, tmp_path / "log") as found:
        yield found


def _train(drive: Drive, name: str, labels: dict[str, str] | None = None, **spec: Any) -> None:
    """Create a job of one node with eight GPUs, whose data is prepared at once."""
    resources = {"nodes": 1, "gpusPerNode": 8}
    job = train_job(name, {"egm.test/prepare-exit-code": "0"}, queue="gpus", resources=resources, **spec)
    job["metadata"]["labels"] = labels or {}
    drive.api.create("gtj", drive.namespace, job)


def _queued(drive: Drive, name: str, kind: str = "gtj") -> dict[str, Any]:
    """Wait until a job is Queued; return its status."""

    def look() -> dict[str, Any] | None:
        status = drive.status(name, kind)
        return status if status.get("reason") == "Queued" else None

    return until(f"{name} to be queued", look)


def test_the_second_job_waits_for_the_quota_of_the_first(training: Drive, kueue: Kueue) -> None:
    kueue.queue(training.namespace, kueue.quota(8))
    _train(training, "first")
    training.phase("first", "Running")
    _train(training, "second")
    until("Kueue's words", lambda: "insufficient unused quota" in _queued(training, "second")["message"])
    assert gpus(training.pods("second")) == 0
    training.end("first", "rl")
    training.phase("first", "Succeeded")
    assert training.phase("second", "Running")["attempt"] == 1


def test_preemption_by_priority_costs_no_attempt(training: Drive, kueue: Kueue) -> None:
    quota = kueue.quota(8, preemption={"withinClusterQueue": "LowerPriority"})
    kueue.queue(training.namespace, quota)
    low, high = kueue.priority(10), kueue.priority(1000)
    _train(training, "low", labels={PRIORITY: low})
    training.phase("low", "Running")
    training.report("low", step=4)
    until("the step", lambda: (training.status("low").get("progress") or {}).get("step") == 4)
    _train(training, "high", labels={PRIORITY: high})
    training.phase("high", "Running")
    until("Kueue's words", lambda: "preempt" in _queued(training, "low")["message"].lower())
    assert training.status("low")["attempt"] == 1
    training.end("high", "rl")
    status = training.phase("low", "Running")
    # the attempt and the output, which contains the checkpoint, are the same, so the step is known
    assert (status["attempt"], status["progress"]["step"]) == (1, 4)
    training.end("low", "rl")
    training.phase("low", "Succeeded")


def test_a_queue_that_no_one_manages_has_a_reason_of_its_own(drive: Drive, kueue: Kueue) -> None:
    """Kueue does not manage a PyTorchJob unless that integration is enabled."""
    kueue.queue(drive.namespace, kueue.quota(8))
    _train(drive, "lost", backend="pytorchjob")
    until("the reason", lambda: drive.status("lost").get("reason") == "QueueUnmanaged")
    assert "kubeflow.org/pytorchjob" in drive.status("lost")["message"]


def test_a_default_queue_without_quota_costs_few_writes(drive: Drive, kueue: Kueue) -> None:
    kueue.queue(drive.namespace, kueue.quota(0, cpu=0), "default")
    drive.api.create("gtj", drive.namespace, train_job("trains"))
    drive.api.create("gej", drive.namespace, eval_job("measures"))
    _queued(drive, "trains")
    _queued(drive, "measures", "gej")
    begun = watch_for(40)
    found = writes(drive.namespace, begun)
    # if the two controllers undid each other's changes, there would be hundreds of writes
    assert len(found) < 20, found
    assert drive.pods("trains") == [] and gpus(drive.pods("measures", kind="eval")) == 0


def test_an_evaluation_of_eight_servers_is_admitted_whole_or_not_at_all(drive: Drive, kueue: Kueue) -> None:
    quota = kueue.quota(7)
    kueue.queue(drive.namespace, quota)
    _evaluate(drive, "whole", servers=8)
    _queued(drive, "whole", "gej")
    begun = watch_for(5)
    assert gpus(drive.pods("whole", kind="eval")) == 0, writes(drive.namespace, begun)
    kueue.grow(quota, 8)
    drive.running("whole", "server", 8, kind="eval")
    drive.phase("whole", "Succeeded", kind="gej")


def _evaluate(drive: Drive, name: str, servers: int, queue: str = "gpus", **spec: Any) -> None:
    """Create an evaluation whose data is prepared at once, and whose client ends by itself."""
    ends = {
        "egm.test/prepare-exit-code": "0",
        "egm.test/evaluate-exit-code": "0",
        "egm.test/message": json.dumps(MEASURED),
    }
    template = {"metadata": {"annotations": ends}}
    job = eval_job(name, servers, queue=queue, podTemplate=template, **spec)
    drive.api.create("gej", drive.namespace, job)


def _two_at_once(drive: Drive, seed: int, queue: str = "gpus") -> None:
    """Start two evaluations that each need the whole quota, in a random order with random delays (`seed`); both must end."""
    draw = random.Random(seed)
    names = [f"{letter}-{seed}" for letter in draw.sample("ab", 2)]
    for name in names:
        _evaluate(drive, name, servers=2, queue=queue)
        time.sleep(draw.choice((0, 0, 0.05, 0.3, 1)))
    for name in names:
        # a deadlock lasts for ever, so a long wait only delays a failure; in all lanes together, short pauses slow the API server
        drive.phase(name, "Succeeded", kind="gej", seconds=300, pause=1)
    for name in names:
        drive.api.delete("gej", drive.namespace, name)


def test_an_evaluation_begins_with_min_servers(drive: Drive, kueue: Kueue) -> None:
    quota = kueue.quota(3)
    kueue.queue(drive.namespace, quota)
    template = {"metadata": {"annotations": {"egm.test/prepare-exit-code": "0"}}}
    drive.api.create("gej", drive.namespace, eval_job("some", 4, queue="gpus", minServers=2, podTemplate=template))
    drive.phase("some", "Running", kind="gej")
    drive.running("some", "server", 3, kind="eval")
    assert gpus(drive.pods("some", kind="eval")) == 3
    kueue.grow(quota, 4)
    drive.running("some", "server", 4, kind="eval")
    drive.end("some", "evaluate", kind="eval", message=json.dumps(MEASURED))
    assert drive.phase("some", "Succeeded", kind="gej")["attempt"] == 1


def test_a_client_needs_no_quota_of_its_own_in_a_default_queue(drive: Drive, kueue: Kueue) -> None:
    """The quota suffices only for the servers. A client in the queue `default` would wait for servers that wait for their clients."""
    quota = kueue.quota(4, cpu=12)  # two evaluations of two servers, each with 3 CPUs
    for name in ("gpus", "default"):
        kueue.queue(drive.namespace, quota, name)
    names = ["a", "b", "c"]
    for name in names:
        _evaluate(drive, name, servers=2)
    for name in names:
        assert drive.phase(name, "Succeeded", kind="gej", seconds=90)["attempt"] == 1


def test_a_preempted_evaluation_asks_the_rest_in_the_same_attempt(drive: Drive, kueue: Kueue) -> None:
    kueue.queue(drive.namespace, kueue.quota(2, preemption={"withinClusterQueue": "LowerPriority"}))
    low, high = kueue.priority(10), kueue.priority(1000)
    kinds = {"low": low, "high": high}
    for name, kind in kinds.items():
        job = eval_job(name, 2, podTemplate={"metadata": {"annotations": {"egm.test/prepare-exit-code": "0"}}})
        job["metadata"]["labels"] = {QUEUE: "gpus", PRIORITY: kind}
        drive.api.create("gej", drive.namespace, job)
        drive.phase(name, "Running", kind="gej")
    _queued(drive, "low", "gej")
    assert drive.pods("low", "evaluate", kind="eval") == []
    for name in ("high", "low"):
        assert drive.phase(name, "Running", kind="gej")["attempt"] == 1
        drive.end(name, "evaluate", kind="eval", message=json.dumps(MEASURED))
        drive.phase(name, "Succeeded", kind="gej")


LANES = 8


# 200 by name: EGM_KUEUE_ORDERS=200, or in parts: EGM_KUEUE_ORDERS=100-200; in lanes that share nothing but the controllers
@pytest.mark.timeout(3600)
def test_two_evaluations_never_wait_for_each_other(drive: Drive, kueue: Kueue) -> None:
    first, _, end = os.environ.get("EGM_KUEUE_ORDERS", "3").rpartition("-")
    orders = range(int(first or 0), int(end))
    lanes = min(LANES, len(orders))
    queues = [kueue.queue(drive.namespace, kueue.quota(2), f"lane-{lane}") for lane in range(lanes)]

    def run(lane: int) -> None:
        for seed in orders[lane::lanes]:
            begun = time.monotonic()
            _two_at_once(drive, seed, queues[lane])
            print(f"order {seed}: {time.monotonic() - begun:.0f} s", flush=True)

    with ThreadPoolExecutor(lanes) as pool:
        _wait_for([pool.submit(run, lane) for lane in range(lanes)])


def _wait_for(lanes: Sequence[Future[None]]) -> None:
    """Wait for all lanes; raise the exception of the first one that fails."""
    for done in as_completed(lanes):
        done.result()


PAGE = ROOT / "docs" / "queues.md"


@pytest.fixture
def followed(cluster: Any, kueue: Kueue, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the environment for the page's commands, with an operator for the namespace that they create."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "kubectl").symlink_to(cluster.program)
    yield {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "KUBECONFIG": cluster.kubeconfig}
    kueue.api.request("DELETE", "/api/v1/namespaces/team-a")


def test_the_page_leads_from_the_install_to_the_first_job(
    followed: dict[str, str], kueue: Kueue, tmp_path: Path
) -> None:
    commands = [b.text for b in blocks(PAGE.read_text()) if b.language == "sh" and b.needs == "cluster"]
    assert len(commands) == 3
    operator = Operator("team-a", tmp_path / "log", EGM_OPERATOR_BACKEND="job")
    for number, text in enumerate(commands):
        if number == 2:
            operator.start()
        done = subprocess.run(["bash", "-euc", text], env=followed, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    team = Drive(kueue.api, "team-a", "job")
    until("Kueue's words", lambda: "insufficient unused quota" in team.status("second").get("message", ""))
    assert operator.stop() == 0
