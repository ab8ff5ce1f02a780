"""Handle the success of an evaluation. Servers are deleted as soon as the client has ended.

In a sweep over models, the next model follows: the status counts the measured models, and attempts start from 1 again. There is no other
state, and objects have the number of their model, so a kill between two writes changes nothing.
"""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.evaluate.client import CLIENT, done, remove_servers
from egm_operator.plan.evaluate.results import apply_report
from egm_operator.plan.snapshot import EvalSnapshot
from egm_operator.status import ConditionType, Reason
from grounding.api.status import EvalStatus, Phase


def success(snapshot: EvalSnapshot) -> Decision[EvalStatus] | None:
    """End the job or begin with the next model if a client has succeeded."""
    for job in CLIENT.all(snapshot):
        pods, end = done(snapshot, job), job.complete
        if job.deleting or not (pods or end):
            continue
        decision = snapshot.decision()
        if not pods and end is not None and not snapshot.is_settled(end, pods):
            decision.look_again(snapshot.now + 1)
            return decision
        fields = decision.status.fields
        fields.attempt = CLIENT.current(snapshot)  # its start may not have been recorded
        for pod in pods:
            apply_report(decision.status, pod.termination_message)
        remove_servers(snapshot, decision)
        if (number := snapshot.model_number) is not None:
            fields.measured_models = number
            if number < len(snapshot.job.spec.models):
                return _next_model(snapshot, decision, number)
        macro = None if fields.accuracy is None else fields.accuracy.macro
        result = "" if macro is None else f": macro accuracy {macro:.4f}"
        notes = "" if fields.notes is None else "".join(f" Note: {note}." for note in fields.notes)
        decision.finish(True, Reason.COMPLETED, f"All questions are answered{result}.{notes}")
        return decision
    return None


def _next_model(snapshot: EvalSnapshot, decision: Decision[EvalStatus], number: int) -> Decision[EvalStatus]:
    """Begin with the model after `number`: start its servers, and give its client all attempts."""
    status, models = decision.status, snapshot.job.spec.models
    status.fields.model, status.fields.attempt = None, None
    status.fields.disruptions, status.fields.failures_in_a_row = None, None
    text = f"Model {number} of {len(models)}, {models[number - 1].name}, is measured; {models[number].name} follows."
    status.condition(ConditionType.MODEL_READY, False, Reason.MODEL_MEASURED, text)
    for kind in (ConditionType.RUNNING, ConditionType.RESTARTING):
        if status.is_true(kind):
            status.condition(kind, False, Reason.MODEL_MEASURED, text)
    status.phase(Phase.PENDING, Reason.MODEL_MEASURED, text)
    status.forget_eta()
    decision.event(Reason.MODEL_MEASURED, text)
    return decision
