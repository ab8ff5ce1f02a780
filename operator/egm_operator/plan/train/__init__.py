"""The policies of a training: one gang per attempt; a failed pod ends the attempt for the whole gang. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.plan.active_deadline import active_deadline
from egm_operator.plan.finished import finished
from egm_operator.plan.model import model
from egm_operator.plan.reopen import reopen
from egm_operator.plan.restart import restart
from egm_operator.plan.snapshot import PlacedPolicy, Policy
from egm_operator.plan.start import start
from egm_operator.plan.suspend import suspend
from egm_operator.plan.train.backend import available
from egm_operator.plan.train.failure import failure
from egm_operator.plan.train.gang import GANG, idle, stop, stop_for_good
from egm_operator.plan.train.gpu_usage import gpu_usage
from egm_operator.plan.train.pending import pending
from egm_operator.plan.train.prepare import prepare
from egm_operator.plan.train.progress import heard_while_stopping, progress
from egm_operator.plan.train.queue import queue
from egm_operator.plan.train.running import run
from egm_operator.plan.train.success import success
from grounding.api import ResolvedTrainJob
from grounding.api.status import TrainStatus

POLICIES: Sequence[Policy[ResolvedTrainJob, TrainStatus]] = (
    gpu_usage,
    reopen,
    finished(stop),
    success,
    active_deadline(stop_for_good),
    suspend(stop, idle, heard_while_stopping),
    available,
    model,
)
"""Policies that are called first, in this order"""
PLACED: Sequence[PlacedPolicy[ResolvedTrainJob, TrainStatus]] = (
    prepare,
    restart(GANG),
    start(GANG),
    progress,
    queue,
    failure,
    run,
    pending,
)
"""Policies that are called next if the model's URI is known"""
