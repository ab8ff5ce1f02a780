"""The servers of an evaluation: create missing ones, and let the client wait until enough are ready.

The kubelet restarts a server that dies; this policy only replaces pods that are permanently gone (evicted, node lost).
"""

from __future__ import annotations

from egm_operator.manifests import servers as manifests
from egm_operator.plan.attempts import waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.evaluate.client import CLIENT, remove_servers
from egm_operator.plan.snapshot import PlacedEval
from egm_operator.status import Reason
from grounding.api.status import EvalStatus, Phase


def servers(snapshot: PlacedEval) -> Decision[EvalStatus] | None:
    """Keep the servers, and wait for them before the client starts."""
    if "server" not in snapshot.roles:
        return None
    decision = snapshot.decision()
    fields, pods = decision.status.fields, snapshot.of_model(snapshot.pods_of("server"))
    fields.servers, fields.ready_servers = len(pods), servers_ready(snapshot)
    # for the scale subresource
    fields.selector = ",".join(f"{k}={v}" for k, v in manifests.selector(snapshot.context).items())
    n = CLIENT.current(snapshot)
    client_there = n > 0 and CLIENT.get(snapshot, n) is not None
    enough = servers_ready(snapshot) >= _wanted(snapshot)
    if not client_there and not enough and _too_late(snapshot, decision):
        return decision
    _keep(snapshot, decision)
    return decision.passing() if client_there or enough else decision


def servers_ready(snapshot: PlacedEval) -> int:
    """Return how many servers answer."""
    return sum(pod.ready for pod in snapshot.of_model(snapshot.pods_of("server")))


def _wanted(snapshot: PlacedEval) -> int:
    """Return how many servers must be ready before the client starts."""
    return min(snapshot.job.spec.min_servers, snapshot.roles["server"].replicas)


def _keep(snapshot: PlacedEval, decision: Decision[EvalStatus]) -> None:
    """Create missing servers, and delete surplus ones and those that cannot come back."""
    role, context = snapshot.roles["server"], snapshot.context
    wanted = [manifests.server_name(context, i) for i in range(role.replicas)]
    pods = {pod.name: pod for pod in snapshot.pods_of("server")}
    missing = [manifests.server(role, context, i) for i, name in enumerate(wanted) if name not in pods]
    decision.remove(*(pod for name, pod in pods.items() if name not in wanted or not pod.alive))
    decision.force(*filter(snapshot.lost, pods.values()))  # its name is needed again, and it has nothing to save
    waits_for(snapshot, decision, list(pods.values()))
    if missing:
        decision.create(*manifests.shared(context), *missing)


def _too_late(snapshot: PlacedEval, decision: Decision[EvalStatus]) -> bool:
    """Report what the servers wait for, and end the job if they have taken too long."""
    role, pods = snapshot.roles["server"], snapshot.of_model(snapshot.pods_of("server"))
    held = snapshot.held(pods) or next((w for pod in pods if (w := pod.waiting) is not None), None)
    ready, wanted = servers_ready(snapshot), _wanted(snapshot)
    text = f"{ready} of {role.replicas} servers are ready, {wanted} wanted to begin."
    if held is not None and held.message:
        text += f" {held.message}"
    reason = Reason.SERVERS_STARTING if held is None or held.reason is None else held.reason
    decision.status.phase(Phase.PENDING, reason, text)
    begun = [pod.started for pod in pods if pod.started is not None]
    if not begun:  # waiting for a node may take any time: activeDeadlineSeconds limits it
        if any(pod.gated for pod in pods):
            decision.status.fields.start_time = None  # but time in a queue does not count towards any deadline
        return False
    engine = role.probe.timeout_s if role.probe is not None else 0.0
    due = min(begun) + engine + snapshot.settings.server_start_seconds
    if snapshot.now < due:
        decision.look_again(due)
        return False
    remove_servers(snapshot, decision)
    decision.finish(False, Reason.SERVERS_NOT_READY, f"Too few servers became ready in time: {text}")
    return True
