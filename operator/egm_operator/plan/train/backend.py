"""Check before creating any object whether the cluster has the kind of the job's back end."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import TrainSnapshot
from egm_operator.plan.train.gang import backend
from egm_operator.status import ConditionType, Reason
from grounding.api.status import Phase, TrainStatus


def available(snapshot: TrainSnapshot) -> Decision[TrainStatus] | None:
    """Hold the job while the cluster lacks the kind of its back end, such as PyTorchJob.

    Return None if an attempt already exists: it runs to its end.
    """
    wanted = backend(snapshot)
    if not wanted.missing(snapshot.absent) or snapshot.gangs:
        return None
    kind, decision = wanted.form.kind, snapshot.decision()
    text = f"The cluster has no {kind.name} ({kind.api_version}), which the job's backend needs: {wanted.cure}."
    if snapshot.settings.namespaces:  # then the watches are started only once, with the process
        text += f" An operator that serves single namespaces detects {kind.name} only after a restart."
    if decision.status.fields.reason != Reason.REFUSED:
        decision.event(Reason.REFUSED, text, warning=True)
    phase = decision.status.current_phase
    if decision.status.is_true(ConditionType.RUNNING):  # the kind was deleted, and all its objects with it
        decision.status.condition(ConditionType.RUNNING, False, Reason.REFUSED, text)
    decision.status.phase(Phase.PENDING if phase is Phase.RUNNING else phase, Reason.REFUSED, text)
    return decision
