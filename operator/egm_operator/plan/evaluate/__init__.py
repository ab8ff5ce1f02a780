"""The policies of an evaluation: servers, and one client Job per attempt that queries them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from egm_operator.plan.active_deadline import active_deadline
from egm_operator.plan.evaluate.client import CLIENT, idle, stop
from egm_operator.plan.evaluate.failure import failure
from egm_operator.plan.evaluate.gpu_usage import gpu_usage
from egm_operator.plan.evaluate.running import run
from egm_operator.plan.evaluate.servers import servers
from egm_operator.plan.evaluate.success import success
from egm_operator.plan.finished import finished
from egm_operator.plan.model import model
from egm_operator.plan.prepare import prepare
from egm_operator.plan.reopen import reopen
from egm_operator.plan.restart import restart
from egm_operator.plan.snapshot import PlacedPolicy, Policy
from egm_operator.plan.start import start
from egm_operator.plan.suspend import suspend
from grounding.api import ResolvedEvalJob
from grounding.api.status import EvalStatus

POLICIES: Sequence[Policy[ResolvedEvalJob, EvalStatus]] = (
    gpu_usage,
    reopen,
    finished(stop),
    success,
    active_deadline(stop),
    suspend(stop, idle),
    model,
)
"""Policies that are called first, in this order"""
PLACED: Sequence[PlacedPolicy[ResolvedEvalJob, EvalStatus]] = (
    prepare,
    servers,
    restart(CLIENT),
    start(CLIENT),
    failure,
    run,
)
"""Policies that are called next if the model's URI is known"""
