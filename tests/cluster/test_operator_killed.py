"""The operator is killed after each of its writes and at random moments: no object is created twice, lost or left over, and the
status is right.

EGM_KILLS is the number of random moments (default 10; a full run has 100).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.lives import World, check, ended, make_jobs
from tests.cluster.operator_kit import Api, Drive, Operator, kubeconfig, new_namespace, until

KILLS = int(os.environ.get("EGM_KILLS", "10"))


@pytest.fixture
def drive() -> Iterator[Drive]:
    api = Api(kubeconfig())
    with new_namespace(api, "kill") as namespace:
        yield Drive(api, namespace)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("most", [1, 3])
def test_after_each_write(drive: Drive, tmp_path: Path, most: int) -> None:
    """Trainings and evaluations in which the operator dies between two writes: after each write, or after one, two and three in turn."""
    deaths, end = 0, time.monotonic() + 400
    settings: dict[str, Any] = {"EGM_OPERATOR_LEADER_ELECT": "false", "EGM_OPERATOR_WORKERS": "1"}
    with World(drive) as world:
        jobs = make_jobs(drive, 2)
        while not ended(drive, jobs) and time.monotonic() < end:
            operator = Operator(drive.namespace, tmp_path / "log", die_after=1 + deaths % most, **settings).start()
            while operator.running() and not ended(drive, jobs):
                time.sleep(0.05)
            if operator.running():
                operator.stop()
            else:
                deaths += 1
        last = Operator(drive.namespace, tmp_path / "last", **settings).start()
        # before this line in its log, SIGTERM would end the operator, but not in an orderly way
        until("its start", lambda: "started" in (tmp_path / "last").read_text())
        until("all ends", lambda: ended(drive, jobs))
        check(drive, world, jobs)
        assert last.stop() == 0
    assert deaths >= 20 // most, deaths


@pytest.mark.timeout(60 + 12 * KILLS + 120)
def test_at_random_moments(drive: Drive, tmp_path: Path) -> None:
    dice = random.Random(os.environ.get("EGM_SEED", "7"))
    settings = {"EGM_OPERATOR_LEASE_SECONDS": "1", "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "2"}
    number, kills = 0, 0
    while kills < KILLS:
        number += 1
        with World(drive) as world:
            jobs, first = make_jobs(drive, 2), kills
            while kills < min(KILLS, first + 5) and not ended(drive, jobs):
                before = drive.writes()
                operator = Operator(drive.namespace, tmp_path / "log", **settings).start()
                # wait, because killing an operator that has written nothing would test nothing
                until("its first write", lambda b=before, j=jobs: drive.writes() != b or ended(drive, j))  # type: ignore[misc]
                time.sleep(dice.random() * 1.5)
                operator.kill()
                kills += 1
            log = tmp_path / f"last-{number}"
            last = Operator(drive.namespace, log, **settings).start()
            until("its start", lambda log=log: "started" in log.read_text())  # type: ignore[misc]
            until("all ends", lambda jobs=jobs: ended(drive, jobs), 120)  # type: ignore[misc]
            check(drive, world, jobs)
            assert last.stop() == 0
            assert kills > first, "expected at least one kill before the jobs ended"


@pytest.mark.timeout(300)
def test_of_two_replicas_one_works_and_the_other_takes_over(drive: Drive, tmp_path: Path) -> None:
    first = Operator(drive.namespace, tmp_path / "first", EGM_OPERATOR_IDENTITY="first").start()
    until("a leader", lambda: "leads" in (tmp_path / "first").read_text())
    second = Operator(drive.namespace, tmp_path / "second", EGM_OPERATOR_IDENTITY="second").start()
    with World(drive) as world:
        jobs = make_jobs(drive, 1)
        until("some progress", lambda: drive.status("t0").get("attempt"))
        assert "created" not in (tmp_path / "second").read_text()
        first.kill()
        until("all ends", lambda: ended(drive, jobs), 120)
        assert "leads" in (tmp_path / "second").read_text()
        third = Operator(drive.namespace, tmp_path / "third", EGM_OPERATOR_IDENTITY="third").start()
        until("its start", lambda: "started" in (tmp_path / "third").read_text())
        assert second.stop() == 0  # a stopped operator releases the Lease, so the next one leads at once
        until("the third operator to lead", lambda: "leads" in (tmp_path / "third").read_text(), 20)
        check(drive, world, jobs)
        assert third.stop() == 0
