"""An evaluation: servers, and one client Job an attempt that asks them; servers go the moment the client has ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from egm_operator.build import batch, servers
from egm_operator.observe import (
    alive,
    created,
    death,
    deleting,
    disrupted,
    ended,
    job_condition,
    last_words,
    phase,
    ready,
    settled,
    started,
    waiting,
)
from egm_operator.plan import attempts, lifecycle
from egm_operator.plan.work import Work
from egm_operator.status import Condition, Phase, Reason
from egm_operator.store import Raw
from grounding.api import GroundingEvalJob
from grounding.exits import retryable


class Client:
    """The client Job of an attempt."""

    kind = "Job"

    def get(self, w: Work, attempt: int) -> Raw | None:
        """Its object."""
        return w.seen.child("Job", batch.client_name(w.place.prefix, attempt))

    def pods(self, w: Work, attempt: int) -> list[Raw]:
        """Its pods that may still be doing something."""
        return [p for p in w.seen.of("Pod", "evaluate", attempt) if alive(p)]

    def start(self, w: Work, attempt: int) -> None:
        """Make it, with the file it reads."""
        ctx = w.place
        urls = servers.endpoints(w.roles["server"], ctx) if "server" in w.roles else []
        w.create(batch.client(w.roles["evaluate"], w.roles["prepare"], ctx, attempt, urls))


CLIENT = Client()


def _remove_servers(w: Work) -> bool:
    """True when no server is left."""
    pods = w.seen.of("Pod", "server")
    for pod in pods:
        w.remove(pod)
    return not pods


def stop(w: Work) -> bool:
    """Stop client and servers. Answers so far are kept by the client; the next one asks the rest."""
    for job in w.seen.of("Job", "evaluate"):
        if not (job_condition(job, "Complete") or job_condition(job, "Failed") or _succeeded(w, job)):
            w.remove(job)
    gone = _remove_servers(w)
    return lifecycle.stop_prepare(w) and gone and not any(alive(p) for p in w.seen.of("Pod", "evaluate"))


def plan(w: Work) -> None:
    """Ask the policies in turn."""
    assert isinstance(w.job, GroundingEvalJob)
    for pod in w.seen.of("Pod", "server"):
        w.draft.used(w.job.spec.server_gpus, started(pod), ended(pod))
    if lifecycle.finished(w, stop) or _succeeded_already(w):
        return
    if lifecycle.deadline(w, stop) or lifecycle.suspend(w, stop) or lifecycle.model(w) or lifecycle.prepare(w):
        return
    _run(w)


def _succeeded(w: Work, job: Raw) -> list[Raw]:
    """Pods of a client that have ended well. They tell a second or two before their Job does, and servers hold GPUs until then."""
    n = attempts.number(job)
    return [p for p in w.seen.of("Pod", "evaluate", n) if phase(p) == "Succeeded"]


def _succeeded_already(w: Work) -> bool:
    for job in w.seen.of("Job", "evaluate"):
        done, end = _succeeded(w, job), job_condition(job, "Complete")
        if deleting(job) or not (done or end):
            continue
        if not done and end and not settled(end, done, w.now):
            w.look_again(w.now + 1)
            return True
        w.draft.attempt = max(w.draft.attempt, attempts.newest(w, CLIENT.kind))  # its start may not be written down
        for pod in done:
            _take_in(w, last_words(pod))
        _remove_servers(w)
        macro = (w.draft.new.get("accuracy") or {}).get("macro")
        result = f": macro accuracy {macro:.4f}" if isinstance(macro, float) else ""
        w.finish(True, Reason.COMPLETED, f"All questions are answered{result}.")
        return True
    return False


def _run(w: Work) -> None:
    assert isinstance(w.job, GroundingEvalJob)
    own_servers = "server" in w.roles
    up = _keep_servers(w) if own_servers else 1
    n = max(w.draft.attempt, attempts.newest(w, "Job"))
    client_there = n > 0 and CLIENT.get(w, n) is not None
    if own_servers and not client_there and up < min(w.job.spec.min_servers, w.roles["server"].replicas):
        _wait_for_servers(w, up)
        return
    under_way = attempts.current(w, CLIENT)
    if under_way is None:
        return
    n, job = under_way
    pods = w.seen.of("Pod", "evaluate", n)
    if end := job_condition(job, "Failed"):
        if not settled(end, pods, w.now):
            w.look_again(w.now + 1)
            return
        deaths = [(d, p) for p in pods if (d := death(p))]
        message = str(deaths[-1][0]) if deaths else str(end.get("message", ""))
        lost = bool(deaths) and disrupted(deaths[-1][1])
        wrong = bool(deaths) and not retryable(deaths[-1][0].code) and not lost
        reason = Reason.USER_ERROR if wrong else Reason.EVICTED if lost else Reason.POD_FAILED
        attempts.failed(w, CLIENT, n, reason, message, again=not wrong)
        if w.draft.new.get("completionTime"):
            _remove_servers(w)
        return
    if w.seen.report is not None:
        _take_in(w, w.seen.report.body)
    servers_text = f", {up} of {w.roles['server'].replicas} servers ready" if own_servers else ""
    if any(phase(p) == "Running" for p in pods):
        w.draft.condition(Condition.RUNNING, True, Reason.CLIENT_RUNNING, f"The client of attempt {n} runs.")
        w.draft.phase(
            Phase.RUNNING,
            Reason.CLIENT_RUNNING,
            f"Attempt {n} of {w.job.spec.max_attempts}: the client runs{servers_text}.",
        )
    else:
        attempts.pending(w, n, pods, 0, 1)


def _keep_servers(w: Work) -> int:
    """Make the servers that are missing, remove those that cannot come back; returns how many are ready.

    The kubelet restarts a server that dies; here only pods come that are gone for good (evicted, node lost).
    """
    role, ctx = w.roles["server"], w.place
    wanted = [servers.server_name(ctx.prefix, i) for i in range(role.replicas)]
    there = {p["metadata"]["name"]: p for p in w.seen.of("Pod", "server")}
    missing = [servers.server(role, ctx, i) for i, name in enumerate(wanted) if name not in there]
    for name, pod in there.items():
        if name not in wanted or not alive(pod):  # spec.servers has become smaller, or the pod cannot come back
            w.remove(pod)
    if missing:
        w.create(servers.service(ctx), *missing)
    up = sum(ready(p) for p in there.values())
    # for the scale subresource
    selector = ",".join(f"{k}={v}" for k, v in servers.selector(ctx).items())
    w.draft.new |= {"servers": len(there), "readyServers": up, "selector": selector}
    return up


def _wait_for_servers(w: Work, up: int) -> None:
    assert isinstance(w.job, GroundingEvalJob)
    role, pods = w.roles["server"], w.seen.of("Pod", "server")
    why, message = next(((a, b) for p in pods for a, b in [waiting(p)] if a or b), ("", ""))
    reason = Reason(why or Reason.SERVERS_STARTING)
    wanted = min(w.job.spec.min_servers, role.replicas)
    text = f"{up} of {role.replicas} servers are ready, {wanted} wanted to begin." + (f" {message}" if message else "")
    w.draft.phase(Phase.PENDING, reason, text)
    if not pods:
        return
    due = (
        min(created(p) for p in pods) + (role.probe.timeout_s if role.probe else 0.0) + w.settings.server_start_seconds
    )
    if w.now < due:
        w.look_again(due)
        return
    _remove_servers(w)
    w.plan.create.clear()
    w.finish(False, Reason.SERVERS_NOT_READY, f"Too few servers became ready in time: {text}")


_FILE_FIELDS = {
    "name": "name",
    "n": "n",
    "acc": "acc",
    "mean_iou": "meanIou",
    "errors": "errors",
    "unparsed": "unparsed",
}


def _take_in(w: Work, body: Mapping[str, Any]) -> None:
    """A client's report or final summary into the status; what is not of the agreed form is left out."""
    new = w.draft.new
    for source, target, kind in (
        ("done", "done", int),
        ("total", "total", int),
        ("etaSeconds", "etaSeconds", int),
        ("requestsPerSecond", "requestsPerSecond", float),
    ):
        value = body.get(source)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12:
            new[target] = round(kind(value), 3)
    if isinstance(body.get("report"), str):
        new["report"] = body["report"][:512]
    accuracy = body.get("accuracy")
    if isinstance(accuracy, Mapping):
        clean: dict[str, Any] = {
            k: accuracy[k] for k in ("macro", "micro") if isinstance(accuracy.get(k), (int, float))
        }
        interval = accuracy.get("ci95")
        if isinstance(interval, list) and len(interval) == 2 and all(isinstance(v, (int, float)) for v in interval):
            clean["ci95"] = interval
        files = [f for f in accuracy.get("files") or [] if isinstance(f, Mapping) and isinstance(f.get("name"), str)]
        if files:
            clean["files"] = [
                {b: f.get(a, f.get(b)) for a, b in _FILE_FIELDS.items() if f.get(a, f.get(b)) is not None}
                for f in files
            ]
        new["accuracy"] = clean
