"""Functions that bring a job into each phase, listed in `TRAIN` and `EVAL`. `restarting` needs a long back-off to be visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.cluster.operator_kit import ApiError, Drive, eval_job, train_job, until

Reach = Callable[[Drive, str], None]
IN_QUEUE = ("Queued", "QueueUnmanaged")
"""Bring a job into the phase in which it waits for its queue. Without Kueue, the next reason follows within seconds."""
UNREADY = {"metadata": {"annotations": {"egm.test/ready": "false"}}}


def _train(drive: Drive, name: str, **spec: Any) -> None:
    drive.api.create("gtj", drive.namespace, train_job(name, **spec))


def _reason(drive: Drive, name: str, reason: str, kind: str = "gtj") -> None:
    until(f"{name}: {reason}", lambda: drive.status(name, kind).get("reason") == reason)


def waiting(drive: Drive, name: str) -> None:
    """Bring a job to the phase in which it waits for its model: that training job does not exist."""
    _train(drive, name, model={"trainJob": f"{name}-before"})
    _reason(drive, name, "UpstreamNotFound")


def preparing(drive: Drive, name: str) -> None:
    _train(drive, name)
    drive.running(name, "prepare")


def starting(drive: Drive, name: str) -> None:
    """Bring a job to Starting: one of its two pods finds no node."""
    _train(drive, name, resources={"nodes": 1, "gpusPerNode": 16})
    drive.prepared(name)
    _reason(drive, name, "Unschedulable")


def queued(drive: Drive, name: str) -> None:
    _train(drive, name, queue="q")
    drive.prepared(name)
    until("the queue", lambda: drive.status(name).get("reason") in IN_QUEUE)


def running(drive: Drive, name: str) -> None:
    _train(drive, name, nodes=2)
    drive.prepared(name)
    drive.phase(name, "Running")


def restarting(drive: Drive, name: str) -> None:
    running(drive, name)
    drive.end(name, "rl", 1, count=2)
    drive.phase(name, "Restarting")


def suspending(drive: Drive, name: str) -> None:
    """Bring a job to the phase in which it is being suspended: its pods end slowly."""
    _train(drive, name, pods={"egm.test/stop-delay": "4s"})
    drive.prepared(name)
    drive.phase(name, "Running")
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": True}})
    _reason(drive, name, "Suspending")


def suspended(drive: Drive, name: str) -> None:
    running(drive, name)
    drive.api.patch("gtj", drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended")


def succeeded(drive: Drive, name: str) -> None:
    running(drive, name)
    drive.end(name, "rl", 0, count=2)
    drive.phase(name, "Succeeded")


def failed(drive: Drive, name: str) -> None:
    running(drive, name)
    drive.end(name, "rl", 2, count=2)
    drive.phase(name, "Failed")


def eval_waiting(drive: Drive, name: str) -> None:
    drive.api.create("gej", drive.namespace, eval_job(name, 1, model={"trainJob": f"{name}-before"}))
    _reason(drive, name, "UpstreamNotFound", "gej")


def eval_preparing(drive: Drive, name: str) -> None:
    drive.api.create("gej", drive.namespace, eval_job(name, 1))
    drive.running(name, "prepare", kind="eval")


def eval_starting(drive: Drive, name: str) -> None:
    """Bring an evaluation to Starting: no server is ready."""
    drive.api.create("gej", drive.namespace, eval_job(name, 1, podTemplate=UNREADY))
    drive.prepared(name, kind="eval")
    drive.running(name, "server", kind="eval")
    _reason(drive, name, "ServersStarting", "gej")


def pods_refused(drive: Drive, name: str) -> None:
    """Let a quota refuse a gang's pods, which the gang's controller can report only in an event."""
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": name},
        "spec": {"hard": {"requests.egm.test/rare": "0"}},  # only this job asks for the resource
    }
    drive.api.request("POST", f"/api/v1/namespaces/{drive.namespace}/resourcequotas", quota)
    rare = {"limits": {"egm.test/rare": "1"}}
    container = {"name": "main", "image": "localhost/none:1", "resources": rare}
    probe = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [container]}}

    def counts() -> bool:
        try:
            drive.api.request("POST", f"/api/v1/namespaces/{drive.namespace}/pods?dryRun=All", probe)
        except ApiError as error:
            return error.code == 403
        return False

    until("the quota to count", counts)  # the API server applies a quota a moment after accepting it
    drive.api.create(
        "gtj",
        drive.namespace,
        train_job(name, podTemplate={"spec": {"containers": [{"name": "main", "resources": rare}]}}),
    )


def eval_running(drive: Drive, name: str) -> None:
    drive.api.create("gej", drive.namespace, eval_job(name, 1))
    drive.prepared(name, kind="eval")
    drive.phase(name, "Running", kind="gej")


def eval_restarting(drive: Drive, name: str) -> None:
    eval_running(drive, name)
    drive.end(name, "evaluate", 1, kind="eval")
    drive.phase(name, "Restarting", kind="gej")


def eval_suspended(drive: Drive, name: str) -> None:
    eval_running(drive, name)
    drive.api.patch("gej", drive.namespace, name, {"spec": {"suspend": True}})
    drive.phase(name, "Suspended", kind="gej")


def eval_succeeded(drive: Drive, name: str) -> None:
    eval_running(drive, name)
    drive.end(name, "evaluate", 0, kind="eval")
    drive.phase(name, "Succeeded", kind="gej")


def eval_failed(drive: Drive, name: str) -> None:
    eval_running(drive, name)
    drive.end(name, "evaluate", 2, kind="eval")
    drive.phase(name, "Failed", kind="gej")


TRAIN: dict[str, Reach] = {
    f.__name__: f
    for f in (waiting, preparing, starting, queued, running, restarting, suspending, suspended, succeeded, failed)
}
EVAL: dict[str, Reach] = {
    f.__name__.removeprefix("eval_"): f
    for f in (
        eval_waiting,
        eval_preparing,
        eval_starting,
        eval_running,
        eval_restarting,
        eval_suspended,
        eval_succeeded,
        eval_failed,
    )
}
