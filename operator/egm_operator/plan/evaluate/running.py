"""Handle a client that runs or waits for its node."""

from __future__ import annotations

from egm_operator.plan.attempts import allowed, report_pending, waits_for
from egm_operator.plan.decision import Decision
from egm_operator.plan.evaluate.client import CLIENT
from egm_operator.plan.evaluate.results import apply_report
from egm_operator.plan.evaluate.servers import servers_ready
from egm_operator.plan.queued import leads_elsewhere, wait_for_admission
from egm_operator.plan.snapshot import PlacedEval
from egm_operator.status import ConditionType, Reason
from grounding.api.status import EvalStatus, Phase


def run(snapshot: PlacedEval) -> Decision[EvalStatus] | None:
    """Record the client's report, and whether the client runs."""
    under_way = CLIENT.under_way(snapshot)
    if under_way is None:
        return None
    (attempt, owner), decision = under_way, snapshot.decision()
    if (refused := leads_elsewhere(snapshot, owner)) is not None:
        return refused
    status, pods = decision.status, CLIENT.pods(snapshot, attempt)
    if snapshot.report is not None:
        apply_report(status, snapshot.report.body)
    late = waits_for(snapshot, decision, pods)
    if owner.held_back:
        if status.is_true(ConditionType.RUNNING):
            status.condition(ConditionType.RUNNING, False, Reason.QUEUED, "The client has been stopped.")
        wait_for_admission(snapshot, decision, owner)
        return decision
    if not any(pod.phase == "Running" for pod in pods):
        report_pending(snapshot, decision, attempt, pods, 0, 1, owner)
        return decision
    status.condition(ConditionType.RUNNING, True, Reason.CLIENT_RUNNING, f"The client of attempt {attempt} runs.")
    text = f"Attempt {attempt} of {allowed(status, snapshot.job.spec.max_attempts)}: the client runs"
    if (number := snapshot.model_number) is not None:
        text = f"Model {number} of {len(snapshot.job.spec.models)}, {snapshot.model.name}. {text}"
    if "server" in snapshot.roles:
        text += f", {servers_ready(snapshot)} of {snapshot.roles['server'].replicas} servers ready"
    words = f" {snapshot.refused}" if snapshot.refused else ""
    status.phase(Phase.RUNNING, Reason.CLIENT_RUNNING, f"{text}.{late}{words}")
    return decision
