"""model.trainJob: wait until that job has succeeded. Then the model is in the status, and the other job is no longer read."""

from __future__ import annotations

from egm_operator.manifests.places import check_for_pods, checked_output, model_left_by
from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import J, Snapshot
from egm_operator.status import ConditionType, Reason, S
from grounding.api.status import Phase
from grounding.errors import UserError


def model(snapshot: Snapshot[J, S]) -> Decision[S]:
    """Find the model's URI, or wait for the job that trains it. Raises `UserError` if the job's pods could not write its output or
    read its own reward or scoring."""
    reference, default = snapshot.model, snapshot.settings.default_output
    checked_output(snapshot.job, snapshot.owner.namespace, default)
    check_for_pods(snapshot.job)
    known = snapshot.status.fields.model
    uri = known if known else reference.source
    if not uri:
        reason, said = _upstream(snapshot, str(reference.train_job))
        if reason is not Reason.MODEL_FOUND:
            return _wait(snapshot, reason, said)
        uri = said
    decision = snapshot.decision()
    found = Reason.MODEL_GIVEN if reference.source else Reason.MODEL_FOUND
    decision.status.condition(ConditionType.MODEL_READY, True, found, uri)
    decision.status.fields.model = uri
    return decision.passing()


def _upstream(snapshot: Snapshot[J, S], name: str) -> tuple[Reason, str]:
    """Return (ModelFound, the model's URI), or the reason and message why it is not known yet."""
    upstream = snapshot.upstream
    if upstream is None:
        return Reason.UPSTREAM_NOT_FOUND, f"GroundingTrainJob {name} does not exist (yet)."
    if upstream.phase is Phase.FAILED:
        text = f"GroundingTrainJob {name} has failed; delete and create it again, or delete this job."
        return Reason.UPSTREAM_FAILED, text
    if upstream.phase is not Phase.SUCCEEDED:
        return Reason.UPSTREAM_NOT_READY, f"Waiting for GroundingTrainJob {name}, which is {upstream.phase}."
    try:
        left = model_left_by(upstream.resolved(), snapshot.owner.namespace, snapshot.settings.default_output)
    except UserError as error:
        return Reason.UPSTREAM_FAILED, f"GroundingTrainJob {name}: {error}"
    return Reason.MODEL_FOUND, left


def _wait(snapshot: Snapshot[J, S], reason: Reason, message: str) -> Decision[S]:
    decision = snapshot.decision()
    decision.status.condition(ConditionType.MODEL_READY, False, reason, message)
    decision.status.phase(Phase.PENDING, reason, message)
    if reason is Reason.UPSTREAM_NOT_READY:
        decision.status.fields.start_time = None  # as in a queue, this time does not count towards any deadline
    return decision
