"""The servers of an evaluation: create missing ones, and start the client when enough are ready.

The kubelet restarts a server that ends. This policy only replaces pods that are permanently lost (evicted, or with their node).
"""

from __future__ import annotations

from collections import Counter

from egm_operator.kube.objects import BatchJob, Pod
from egm_operator.manifests import servers as manifests
from egm_operator.plan.attempts import waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.earlier import remains
from egm_operator.plan.evaluate.client import CLIENT, lasting, remove_servers, standing
from egm_operator.plan.queued import waits_for_queue
from egm_operator.plan.snapshot import PlacedEval
from egm_operator.status import ConditionType, Reason
from grounding.api.handed_down import queue_of
from grounding.api.status import EvalStatus, Phase


def servers(snapshot: PlacedEval) -> Decision[EvalStatus] | None:
    """Create and delete servers, and wait until enough are ready before the client starts."""
    if "server" not in snapshot.roles:
        return None
    decision = snapshot.decision()
    fields, pods = decision.status.fields, snapshot.of_model(snapshot.pods_of("server"))
    fields.servers, fields.ready_servers = len(pods), servers_ready(snapshot)
    # the scale subresource reads this field
    fields.selector = ",".join(f"{k}={v}" for k, v in manifests.selector(snapshot.context).items())
    n = CLIENT.current(snapshot)
    client = CLIENT.get(snapshot, n) if n > 0 else None
    client_there = client is not None
    enough = servers_ready(snapshot) >= _wanted(snapshot)
    if client is not None and in_queue(snapshot) and _lost_its_servers(snapshot, client):
        return _taken_back(snapshot, decision)
    if not client_there and not enough and _too_late(snapshot, decision):
        return decision
    _keep(snapshot, decision, begun=client_there or enough)
    return decision.passing() if client_there or enough else decision


def servers_ready(snapshot: PlacedEval) -> int:
    """Return the number of servers that answer."""
    return sum(pod.ready for pod in snapshot.of_model(snapshot.pods_of("server")))


def _wanted(snapshot: PlacedEval) -> int:
    """Return the number of servers that must be ready before the client starts."""
    return min(snapshot.job.spec.min_servers, snapshot.roles["server"].replicas)


def _keep(snapshot: PlacedEval, decision: Decision[EvalStatus], *, begun: bool) -> None:
    """Create missing servers. Delete surplus ones and those that cannot recover. `begun`: the client does not wait for further servers."""
    role, context = snapshot.roles["server"], snapshot.context
    if in_queue(snapshot):
        _keep_groups(snapshot, decision, begun=begun)
        return
    wanted = [manifests.server_name(context, i) for i in range(role.replicas)]
    pods, taken = {pod.name: pod for pod in snapshot.pods_of("server")}, {pod.name for pod in _earlier(snapshot)}
    absent = [i for i, name in enumerate(wanted) if name not in pods]
    missing = [manifests.server(role, context, i) for i in absent if wanted[i] not in taken]
    needed = 0 if begun else max(0, _wanted(snapshot) - (role.replicas - len(absent)))
    decision.remove(*(pod for name, pod in pods.items() if name not in wanted or not pod.alive))
    # their names are needed again, and they have nothing to save
    decision.force(*filter(snapshot.lost, (*pods.values(), *_earlier(snapshot))))
    waits_for(snapshot, decision, [*pods.values(), *_earlier(snapshot)])
    if needed:
        decision.create(*manifests.shared(context), *missing[:needed])
    elif missing:
        decision.create_further(*manifests.shared(context))
    decision.create_further(*missing[needed:])


def _earlier(snapshot: PlacedEval) -> list[Pod]:
    """Return the servers that remain of an earlier job of the same name. They have the names of this job's servers."""
    return snapshot.earlier_pods_of("server")


def in_queue(snapshot: PlacedEval) -> bool:
    """Return whether a queue admits the servers: the queue of the job, or one that manages its preparing Job although the job names none."""
    return bool(queue_of(snapshot.job)) or any(job.queue for job in snapshot.batch_jobs_of("prepare"))


def _lost_its_servers(snapshot: PlacedEval, client: BatchJob) -> bool:
    """Return whether a queue has preempted the servers of a client. Kueue then also suspends the client, and never resumes it."""
    admitted = [pod.group for pod in standing(snapshot).values() if not pod.gated]
    stopped = client.held_back and not client.queue
    return not admitted or (stopped and client.group not in admitted)


def _keep_groups(snapshot: PlacedEval, decision: Decision[EvalStatus], *, begun: bool) -> None:
    """Create missing servers of a job in a queue as groups (manifests.new_groups). A queue admits a group as a whole or not at all.

    A lost server is replaced in its group. Its pod exists until then, so the new pod gets another name.
    """
    role, context = snapshot.roles["server"], snapshot.context
    there, pods = _staying(snapshot), snapshot.pods_of("server")
    kept = {pod.name for pod in there.values()}
    decision.remove(*(pod for pod in pods if pod.name not in kept))
    decision.force(*filter(snapshot.lost, (*pods, *_earlier(snapshot))))
    missing = [index for index in range(role.replicas) if index not in there]
    places = _places(list(there.values()))[: len(missing)]
    least, known = _wanted(snapshot), len(there) + len(places)
    further = sum(not pod.gated for pod in there.values()) >= least
    places += manifests.new_groups(least, context, snapshot.now, role.replicas - known, known, further=further)
    if not places:
        return
    taken = {pod.name for pod in (*pods, *_earlier(snapshot))}
    create = decision.create_further if begun else decision.create
    create(
        *manifests.shared(context),
        *(
            manifests.server(role, context, index, group, manifests.spare_name(context, index, taken))
            for index, group in zip(missing, places, strict=False)
        ),
    )


def _staying(snapshot: PlacedEval) -> dict[int, Pod]:
    """Return the servers that are neither ending nor surplus, by their numbers.

    While a job waits for the group with which it begins, its further servers would only hold GPUs that this group or another job needs.
    """
    least, replicas = _wanted(snapshot), snapshot.roles["server"].replicas
    there = {index: pod for index, pod in standing(snapshot).items() if index < replicas}
    first = {index: pod for index, pod in there.items() if pod.group_size == least}
    admitted = [pod for pod in there.values() if not pod.gated]
    waits = least > 1 and len(admitted) < least and all(pod.gated for pod in first.values())
    return first if waits else there


def _places(pods: list[Pod]) -> list[manifests.Group]:
    """Return the groups of the servers that are missing in the groups of others, one entry per server."""
    have = Counter(pod.group for pod in pods if pod.group)
    sizes = {pod.group: pod.group_size for pod in pods if pod.group}
    return [
        manifests.Group(name, size) for name, size in sorted(sizes.items()) for _ in range(max(0, size - have[name]))
    ]


def _taken_back(snapshot: PlacedEval, decision: Decision[EvalStatus]) -> Decision[EvalStatus]:
    """Stop the client if the queue has preempted the servers. This does not count as an attempt: the same attempt starts again with new servers."""
    status, text = decision.status, "The queue has preempted the servers; they wait for admission again."
    decision.remove(*(job for job in CLIENT.all(snapshot) if not job.complete))
    _keep(snapshot, decision, begun=False)
    if status.is_true(ConditionType.RUNNING):
        status.condition(ConditionType.RUNNING, False, Reason.QUEUED, text)
        decision.event(Reason.QUEUED, text)
    status.phase(Phase.PENDING, Reason.QUEUED, text)
    status.fields.start_time = None
    return decision


def _too_late(snapshot: PlacedEval, decision: Decision[EvalStatus]) -> bool:
    """Report why servers are not ready, and end the job if they have taken too long."""
    role, pods = snapshot.roles["server"], lasting(snapshot)
    ready, wanted = servers_ready(snapshot), _wanted(snapshot)
    if enough_admitted := len(admitted := [pod for pod in pods if not pod.gated]) >= wanted:
        pods = admitted  # the client does not wait for the others
    held = snapshot.held(pods) or next((w for pod in pods if (w := pod.waiting) is not None), None)
    text = f"{ready} of {role.replicas} servers are ready, {wanted} wanted to begin."
    reason = Reason.SERVERS_STARTING if held is None or held.reason is None else held.reason
    gated = [pod for pod in pods if pod.gated and pod.queue]
    if gated and reason is Reason.QUEUED:
        known = (snapshot.admissions.get(pod.uid) for pod in gated)
        reason, words = waits_for_queue(gated[0], gated[0].queue, next((one for one in known if one), None))
        text += f" {words}"
    elif held is not None and held.message:
        text += f" {held.message}"
    if snapshot.refused:
        text += f" {snapshot.refused}"
    if (old := _earlier(snapshot)) and not in_queue(snapshot):
        text += f" Waiting until {remains(snapshot, decision, old)}."
        reason = Reason.STOPPING if reason is Reason.SERVERS_STARTING else reason
    decision.status.phase(Phase.PENDING, reason, text)
    if not enough_admitted and any(pod.gated for pod in pods):
        decision.status.fields.start_time = None  # time in a queue does not count towards any deadline
        return False
    due = _due(snapshot, pods, wanted - ready)
    if due is None:
        return False
    if snapshot.now < due:
        decision.look_again(due)
        return False
    remove_servers(snapshot, decision)
    decision.finish(False, Reason.SERVERS_NOT_READY, f"Too few servers became ready in time: {text}")
    return True


def _due(snapshot: PlacedEval, pods: list[Pod], missing: int) -> float | None:
    """Return when `missing` of the pods must have become ready; None until a node has taken one of these. Only activeDeadlineSeconds limits
    the wait for a node.
    """
    probe, since = snapshot.roles["server"].probe, sorted(pod.unready_since for pod in pods if pod.unready_since)
    if not since:
        return None
    # those that a node took last still have the most time
    engine = probe.timeout_s if probe is not None else 0.0
    return since[-min(missing, len(since))] + engine + snapshot.settings.server_start_seconds
