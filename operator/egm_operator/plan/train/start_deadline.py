"""startDeadlineSeconds: the time from the creation of a gang, or the last resume, until all its pods run."""

from __future__ import annotations

from egm_operator.plan.decision import Decision
from egm_operator.plan.snapshot import PlacedTrain
from egm_operator.plan.train.gang import GANG
from egm_operator.status import Reason
from grounding.api.status import TrainStatus, seconds


def start_deadline(snapshot: PlacedTrain) -> Decision[TrainStatus] | None:
    """End the job if its pods take too long to start; otherwise plan again at that time."""
    limit, under_way = snapshot.job.spec.start_deadline_seconds, GANG.under_way(snapshot)
    if limit is None or under_way is None:
        return None
    decision, gang, fields = snapshot.decision(), under_way[1], snapshot.status.fields
    resumed = seconds(fields.start_time)
    due = (gang.created if resumed is None else max(gang.created, resumed)) + limit
    if snapshot.now < due:
        decision.look_again(due)
        return decision.passing()
    decision.remove(gang)
    waited_for = "" if fields.message is None else fields.message
    text = f"Not all pods ran within startDeadlineSeconds ({limit} s): {waited_for}"
    decision.finish(False, Reason.START_DEADLINE_EXCEEDED, text)
    return decision
