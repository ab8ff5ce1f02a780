"""Every job ends correctly despite network faults, a busy, broken or restarted API server, and concurrent writers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import proxy
from tests.cluster.lives import World, check, ended, make_jobs
from tests.cluster.operator_kit import ROOT, Api, Drive, Operator, kubeconfig, new_namespace, train_job, until

SETTINGS = {"EGM_OPERATOR_LEADER_ELECT": "false"}


@pytest.fixture(scope="module")
def api() -> Api:
    return Api(kubeconfig())


@pytest.fixture
def drive(api: Api) -> Iterator[Drive]:
    with new_namespace(api, "fault") as namespace:
        yield Drive(api, namespace)


def _live(drive: Drive, operator: Operator, seconds: float = 200) -> None:
    with World(drive) as world:
        jobs = make_jobs(drive, 2)
        operator.start()
        until("all ends", lambda: ended(drive, jobs), seconds)
        check(drive, world, jobs)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault",
    [
        proxy.CONFLICT,
        proxy.INVALID,
        proxy.BUSY,
        proxy.BROKEN,
        proxy.UNAVAILABLE,
        proxy.RESET,
        proxy.LOST_ANSWER,
    ],
    ids=str,
)
def test_every_third_request_fails(api: Api, drive: Drive, tmp_path: Path, fault: proxy.Fault) -> None:
    dice, row = random.Random(11), Counter[tuple[str, str]]()
    # a server gives these answers only to requests that write
    writes_only = fault in (proxy.CONFLICT, proxy.INVALID, proxy.LOST_ANSWER)

    def choose(method: str, path: str, watch: bool) -> proxy.Fault | None:
        spared = watch or "/namespaces/" not in path or (writes_only and method == "GET")
        # disturb the same request at most three times in a row, because the waits double with each failure
        if spared or row[method, path] == 3 or dice.random() >= 1 / 3:
            row[method, path] = 0
            return None
        row[method, path] += 1
        return fault

    with proxy.Proxy(api, choose) as between:
        config = between.kubeconfig(tmp_path / "kubeconfig")
        operator = Operator(drive.namespace, tmp_path / "log", KUBECONFIG=str(config), **SETTINGS)
        _live(drive, operator)
        assert operator.stop() == 0
        assert between.done[str(fault)] >= 10, between.done
    assert not [line for line in operator.lines() if "exception" in line]


@pytest.mark.timeout(300)
def test_watches_that_are_cut_or_expire(api: Api, drive: Drive, tmp_path: Path) -> None:
    count = itertools.count(1)

    def choose(method: str, path: str, watch: bool) -> proxy.Fault | None:
        if not watch:
            return None
        return proxy.CUT_WATCH if next(count) % 4 else proxy.EXPIRED_WATCH

    with proxy.Proxy(api, choose) as between:
        config = between.kubeconfig(tmp_path / "kubeconfig")
        operator = Operator(drive.namespace, tmp_path / "log", KUBECONFIG=str(config), **SETTINGS)
        _live(drive, operator)
        assert operator.stop() == 0
        assert between.done["cut"] >= 10 and between.done["expired"] >= 3, between.done


@pytest.mark.timeout(300)
def test_what_went_while_nobody_watched_is_missed(api: Api, drive: Drive, tmp_path: Path) -> None:
    """If the gang is deleted while the operator is disconnected and its watch cannot continue, the next listing shows it."""
    mode = {"blind": False, "expired": False}

    def choose(method: str, path: str, watch: bool) -> proxy.Fault | None:
        if mode["blind"]:
            return proxy.RESET
        if watch and mode["expired"]:
            mode["expired"] = path.endswith("/pytorchjobs") is False
            return proxy.EXPIRED_WATCH
        return None

    with proxy.Proxy(api, choose) as between:
        config = between.kubeconfig(tmp_path / "kubeconfig")
        operator = Operator(drive.namespace, tmp_path / "log", KUBECONFIG=str(config), **SETTINGS).start()
        api.create("gtj", drive.namespace, train_job("t"))
        drive.prepared("t")
        drive.phase("t", "Running")
        before = api.get("pytorchjob", drive.namespace, "t-a1")["metadata"]["uid"]
        mode["blind"] = True
        between.cut()
        api.delete("pytorchjob", drive.namespace, "t-a1")
        until("the deletion of the gang", lambda: api.get("pytorchjob", drive.namespace, "t-a1") is None)
        mode.update(blind=False, expired=True)

        def again() -> bool:
            found = api.get("pytorchjob", drive.namespace, "t-a1")
            return bool(found and found["metadata"]["uid"] != before)

        until("a new gang", again, 60)
        drive.running("t", "rl")
        drive.end("t", "rl", 0)
        assert drive.phase("t", "Succeeded")["attempt"] == 1
        assert operator.stop() == 0


@pytest.mark.timeout(420)
@pytest.mark.skipif(
    bool(os.environ.get("EGM_KUBECONFIG")), reason="the test kills the API server, which only the test cluster allows"
)
def test_the_api_server_is_killed_and_started_again(api: Api, drive: Drive, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "hack" / "cluster"))
    from processes import Processes  # type: ignore[import-not-found]

    processes = Processes(ROOT / ".cache" / "cluster")
    operator = Operator(drive.namespace, tmp_path / "log", **SETTINGS)
    with World(drive) as world:
        jobs = make_jobs(drive, 2)
        operator.start()
        until("the first attempts", lambda: all(drive.status(n, k).get("attempt") for k, n in jobs))
        saved = json.loads((processes.pids / "kube-apiserver.json").read_text())
        os.kill(saved["pid"], signal.SIGKILL)
        time.sleep(2)
        until("the end of kube-apiserver", lambda: not processes.alive("kube-apiserver"))
        processes.start("kube-apiserver", saved["argv"], saved["env"])

        def answers() -> bool:
            with contextlib.suppress(OSError, json.JSONDecodeError):
                return bool(drive.api.list("gtj", drive.namespace))
            return False

        until("it to answer", answers, 60)

        def over() -> bool:
            with contextlib.suppress(OSError):
                return ended(drive, jobs)
            return False

        until("all ends", over, 150)
        check(drive, world, jobs)
    assert operator.running() and operator.stop() == 0


class _Others(threading.Thread):
    """Another writer, which changes labels, harmless fields of the spec and the status of all objects all the time."""

    def __init__(self, drive: Drive) -> None:
        super().__init__(daemon=True)
        self.drive, self.over, self.writes = drive, threading.Event(), 0

    def __enter__(self) -> _Others:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join(30)

    def _patch(self, kind: str, name: str, body: Any, sub: str = "") -> None:
        path = self.drive.api.path(kind, self.drive.namespace, name) + sub
        with contextlib.suppress(OSError):
            self.drive.api.request("PATCH", path, body, "application/merge-patch+json")
            self.writes += 1

    def run(self) -> None:
        while not self.over.wait(0.05):
            count = str(self.writes)
            with contextlib.suppress(OSError):
                for kind in ("gtj", "gej", "pytorchjob", "job"):
                    for obj in self.drive.api.list(kind, self.drive.namespace):
                        name = obj["metadata"]["name"]
                        self._patch(kind, name, {"metadata": {"labels": {"others": count}}})
                        if kind in ("gtj", "gej"):
                            self._patch(kind, name, {"spec": {"ttlSecondsAfterFinished": 100_000 + self.writes}})
                            self._patch(kind, name, {"status": {"message": "nonsense", "phase": "Pending"}}, "/status")


@pytest.mark.timeout(300)
def test_others_write_at_the_same_time(drive: Drive, tmp_path: Path) -> None:
    operator = Operator(drive.namespace, tmp_path / "log", **SETTINGS).start()
    with World(drive) as world:
        jobs = make_jobs(drive, 2)
        with _Others(drive) as others:
            until("all ends", lambda: all(drive.status(n, k).get("completionTime") for k, n in jobs), 120)
            assert others.writes > 50
        until("the truth", lambda: ended(drive, jobs))
        check(drive, world, jobs)
    assert operator.stop() == 0
    assert not [line for line in operator.lines() if "exception" in line]


@pytest.mark.timeout(120)
def test_what_is_somebody_else_s_is_not_touched(drive: Drive, tmp_path: Path) -> None:
    operator = Operator(drive.namespace, tmp_path / "log", **SETTINGS).start()
    container = {"name": "c", "image": "localhost/none:1"}
    spec = {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "t-prepare"}, "spec": spec}
    theirs = drive.api.create("job", drive.namespace, job)
    drive.api.create("gtj", drive.namespace, train_job("t"))
    status = until("the refusal", lambda: s if (s := drive.status("t")).get("reason") == "Refused" else None)
    assert "Job t-prepare already exists" in status["message"]
    there = drive.api.get("job", drive.namespace, "t-prepare")
    assert there["metadata"]["uid"] == theirs["metadata"]["uid"] and "ownerReferences" not in there["metadata"]
    drive.api.delete("job", drive.namespace, "t-prepare")
    drive.phase("t", "Preparing", seconds=90)
    assert operator.stop() == 0


@pytest.mark.timeout(180)
def test_a_job_that_is_created_again_under_its_name_is_another_job(drive: Drive, tmp_path: Path) -> None:
    """The old job's pods have failed and terminate slowly; this does not affect the new job."""
    operator = Operator(drive.namespace, tmp_path / "log", **SETTINGS).start()
    for _ in range(3):
        drive.api.create("gtj", drive.namespace, train_job("t", {"egm.test/stop-delay": "3s"}, nodes=2, maxAttempts=1))
        drive.prepared("t")
        drive.phase("t", "Running")
        drive.end("t", "rl", 1, count=1)
        drive.phase("t", "Failed")
        drive.api.delete("gtj", drive.namespace, "t")
    again = train_job("t", {"egm.test/exit-code": "0"}, nodes=2, maxAttempts=1)
    uid = drive.api.create("gtj", drive.namespace, again)["metadata"]["uid"]
    status = drive.phase("t", "Succeeded", seconds=90)
    assert status["attempt"] == 1
    assert drive.api.get("gtj", drive.namespace, "t")["metadata"]["uid"] == uid
    assert operator.stop() == 0
