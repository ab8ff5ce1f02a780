"""Deletion and changes of the spec in every phase of a job's life."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from egm_operator.manifests.gangs import BACKENDS

from tests.cluster.operator_kit import Api, Drive, Operator, fresh_name, kubeconfig, new_namespace, until
from tests.cluster.phases import EVAL, IN_QUEUE, TRAIN

KINDS = {"gtj": TRAIN, "gej": EVAL}
UNFINISHED = ("waiting", "preparing", "starting", "queued", "running", "restarting")


@pytest.fixture(scope="module", params=list(BACKENDS))
def drive(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Drive]:
    with new_namespace(Api(kubeconfig()), "phase") as namespace:
        log: Path = tmp_path_factory.mktemp("operator") / "log"
        settings = {"EGM_OPERATOR_BACKOFF_BASE_SECONDS": "3", "EGM_OPERATOR_BACKEND": request.param}
        operator = Operator(namespace, log, **settings).start()
        yield Drive(Api(kubeconfig()), namespace, request.param)
        assert operator.running() and operator.stop() == 0
        wrong = [line for line in operator.lines() if line["level"] == "error" or "exception" in line]
        assert not wrong, wrong


def _names(kind: str, phases: tuple[str, ...]) -> dict[str, str]:
    return {phase: fresh_name(phase) for phase in phases if phase in KINDS[kind]}


def _reach(drive: Drive, kind: str, phases: tuple[str, ...]) -> dict[str, str]:
    """Return one job in each phase, keyed by phase. An evaluation has no gang, so one back end is enough for it."""
    if kind == "gej" and drive.backend != "pytorchjob":
        pytest.skip("an evaluation has no gang")
    names = _names(kind, phases)
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda item: KINDS[kind][item[0]](drive, item[1]), names.items()))
    return names


def _change(drive: Drive, kind: str, name: str, **spec: Any) -> None:
    drive.api.patch(kind, drive.namespace, name, {"spec": spec})


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "backend"), [("gtj", "pytorchjob"), ("gtj", "job"), ("gej", "pytorchjob")])
def test_deletion_in_every_phase_leaves_nothing(tmp_path: Path, kind: str, backend: str) -> None:
    api = Api(kubeconfig())
    with new_namespace(api, "delete") as namespace:
        operator = Operator(
            namespace,
            tmp_path / "log",
            EGM_OPERATOR_LEADER_ELECT="false",
            EGM_OPERATOR_BACKOFF_BASE_SECONDS="30",
            EGM_OPERATOR_BACKEND=backend,
        ).start()
        names = _reach(Drive(api, namespace), kind, tuple(KINDS[kind]))
        for name in names.values():
            api.delete(kind, namespace, name)
        until("an empty namespace", lambda: not api.everything(namespace), 90)
        assert operator.stop() == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["gtj", "gej"])
def test_suspended_in_every_phase_and_resumed(drive: Drive, kind: str) -> None:
    short = "train" if kind == "gtj" else "eval"
    names = _reach(drive, kind, UNFINISHED)
    for name in names.values():
        _change(drive, kind, name, suspend=True)
    for phase, name in names.items():
        status = drive.phase(name, "Suspended", kind=kind)
        assert "startTime" not in status, phase
        alive = [p for p in drive.pods(name, kind=short) if p["status"].get("phase") in ("Running", "Pending")]
        assert not alive, phase
    for name in names.values():
        _change(drive, kind, name, suspend=False)
    for phase, name in names.items():
        wanted = {"waiting": "Pending", "preparing": "Preparing", "starting": "Pending", "queued": "Pending"}
        status = drive.phase(name, wanted.get(phase, "Running"), kind=kind)
        reason = {"waiting": "UpstreamNotFound", "starting": "Unschedulable", "queued": "Queued"}.get(phase)
        if kind == "gtj" and reason:
            wanted_now = IN_QUEUE if reason == "Queued" else (reason,)
            until(f"{name} as before", lambda n=name, r=wanted_now: drive.status(n)["reason"] in r)  # type: ignore[misc]
        if phase in ("running", "restarting"):
            assert status["attempt"] == (2 if phase == "restarting" else 1), phase


@pytest.mark.timeout(120)
def test_resumed_before_it_has_stopped_no_attempt_is_lost(drive: Drive) -> None:
    name = _reach(drive, "gtj", ("suspending",))["suspending"]
    old = {p["metadata"]["uid"] for p in drive.pods(name, "rl")}
    _change(drive, "gtj", name, suspend=False)

    def fresh() -> bool:
        pods = [p for p in drive.pods(name, "rl") if p["status"].get("phase") == "Running"]
        return bool(pods) and not old & {p["metadata"]["uid"] for p in pods}

    until("a fresh gang", fresh)
    drive.end(name, "rl", 0)
    assert drive.phase(name, "Succeeded")["attempt"] == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["gtj", "gej"])
def test_a_deadline_in_every_phase(drive: Drive, kind: str) -> None:
    short = "train" if kind == "gtj" else "eval"
    names = _reach(drive, kind, UNFINISHED)
    for name in names.values():
        _change(drive, kind, name, activeDeadlineSeconds=1)
    queued = names.pop("queued", None)
    for phase, name in names.items():
        status = drive.phase(name, "Failed", kind=kind)
        assert status["reason"] == "DeadlineExceeded", (phase, status)
    if queued is not None:  # time in a queue does not count towards a deadline
        assert drive.status(queued, kind)["reason"] in IN_QUEUE
    for name in names.values():
        until(
            "the deletion of its pods",
            lambda n=name: not [p for p in drive.pods(n, kind=short) if p["status"]["phase"] in ("Running", "Pending")],  # type: ignore[misc]
        )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["gtj", "gej"])
def test_the_time_to_live_of_what_has_ended(drive: Drive, kind: str) -> None:
    names = _reach(drive, kind, ("succeeded", "failed"))
    for name in names.values():
        _change(drive, kind, name, ttlSecondsAfterFinished=1)
    for name in names.values():
        until("it to go", lambda n=name: drive.api.get(kind, drive.namespace, n) is None)  # type: ignore[misc]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["gtj", "gej"])
def test_what_has_ended_is_not_begun_again(drive: Drive, kind: str) -> None:
    names = _reach(drive, kind, ("succeeded", "failed"))
    before = {name: drive.status(name, kind) for name in names.values()}
    for name in names.values():
        _change(drive, kind, name, suspend=True, maxAttempts=9, activeDeadlineSeconds=1)
        _change(drive, kind, name, suspend=False)
    for name, old in before.items():
        until("the operator's answer to the change", lambda n=name: _settled(drive, kind, n))  # type: ignore[misc]
        new = drive.status(name, kind)
        assert {**new, "observedGeneration": 0} == {**old, "observedGeneration": 0}


def _settled(drive: Drive, kind: str, name: str) -> bool:
    found = drive.api.get(kind, drive.namespace, name)
    return bool(found["status"]["observedGeneration"] == found["metadata"]["generation"])


@pytest.mark.timeout(120)
def test_a_changed_template_is_for_the_next_attempt(drive: Drive) -> None:
    names = _reach(drive, "gtj", ("preparing", "running", "restarting"))
    for name in names.values():
        _change(drive, "gtj", name, podTemplate={"metadata": {"labels": {"team": "blue"}}})
    drive.prepared(names["preparing"])
    for phase, attempt in (("preparing", 1), ("restarting", 2)):
        for pod in drive.running(names[phase], "rl", attempt=attempt):
            assert pod["metadata"]["labels"]["team"] == "blue", phase
    for pod in drive.running(names["running"], "rl", 2, attempt=1):
        assert "team" not in pod["metadata"]["labels"]
        drive.annotate(pod, exit_code="1")
    for pod in drive.running(names["running"], "rl", 2, attempt=2):
        assert pod["metadata"]["labels"]["team"] == "blue"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["gtj", "gej"])
def test_fewer_attempts_while_one_runs_or_has_failed(drive: Drive, kind: str) -> None:
    names = _reach(drive, kind, ("running", "restarting"))
    for name in names.values():
        _change(drive, kind, name, maxAttempts=1)
    role, short, pods = ("rl", "train", 2) if kind == "gtj" else ("evaluate", "eval", 1)
    drive.end(names["running"], role, 1, attempt=1, kind=short, count=pods)
    for name in names.values():
        status = drive.phase(name, "Failed", kind=kind)
        assert status["reason"] == "AttemptsExhausted" and status["attempt"] == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("drive", ["pytorchjob"], indirect=True)
def test_servers_more_and_fewer_while_the_client_runs(drive: Drive) -> None:
    name = _reach(drive, "gej", ("running",))["running"]
    client = drive.running(name, "evaluate", kind="eval")[0]["metadata"]["uid"]
    for count in (3, 1):
        _change(drive, "gej", name, servers=count)
        until("as many servers", lambda c=count: len(drive.running(name, "server", kind="eval")) == c)  # type: ignore[misc]
        until("the scale", lambda c=count: drive.status(name, "gej").get("readyServers") == c)  # type: ignore[misc]
    assert drive.running(name, "evaluate", kind="eval")[0]["metadata"]["uid"] == client


@pytest.mark.timeout(120)
def test_a_queue_that_takes_its_place_back_costs_no_attempt(drive: Drive) -> None:
    """Kueue preempts a gang by setting `suspend`; the attempt continues after it is cleared."""
    name = _reach(drive, "gtj", ("queued",))["queued"]

    def admit(yes: bool) -> None:
        drive.suspend_gang(name, not yes)

    for _ in range(2):
        admit(True)
        drive.phase(name, "Running")
        admit(False)
        until("the queue", lambda: drive.status(name)["reason"] in IN_QUEUE)
        until("no pod", lambda: drive.pods(name, "rl") == [])
    admit(True)
    drive.phase(name, "Running")
    drive.end(name, "rl", 0)
    assert drive.phase(name, "Succeeded")["attempt"] == 1
