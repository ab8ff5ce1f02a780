"""Reports of rank 0 -> progress, metrics and checkpoint in the status. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from egm_operator.plan.work import Work
from egm_operator.status import seconds, stamp

_METRICS = 16


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def take_in(w: Work, body: Mapping[str, Any], received: float | None) -> None:
    """Take a report into the draft. Whatever in it is not of the agreed form is left out: a report must not break a reconcile."""
    step, total = _number(body.get("step")), _number(body.get("totalSteps"))
    if step is not None and step >= 0:
        old = w.draft.new.get("progress") or {}
        at = _number(body.get("time")) or seconds(str(body.get("time", ""))) or received or w.now
        new: dict[str, Any] = {
            "step": int(step),
            "time": stamp(at) if int(step) != old.get("step") else old.get("time", stamp(at)),
        }
        if total:
            new["totalSteps"] = int(total)
            new["percent"] = round(100.0 * min(step, total) / total, 1)
            eta = _number(body.get("etaSeconds"))
            if eta is None:
                eta = _eta(old, int(step), int(total), at)
            if eta is not None:
                new["etaSeconds"] = int(max(0.0, eta))
        w.draft.new["progress"] = new
    metrics = body.get("metrics")
    if isinstance(metrics, Mapping):
        clean = {str(k): round(n, 6) for k, v in metrics.items() if (n := _number(v)) is not None}
        # validation happens every few steps only: the last figure stays
        merged = {**(w.draft.new.get("metrics") or {}), **clean}
        w.draft.new["metrics"] = dict(list(merged.items())[-_METRICS:])
    checkpoint = body.get("checkpoint")
    if isinstance(checkpoint, Mapping) and (_number(checkpoint.get("step")) or -1) >= 0:
        w.draft.new["checkpoint"] = {"step": int(checkpoint["step"]), "uri": str(checkpoint.get("uri") or "")[:512]}


def _eta(old: Mapping[str, Any], step: int, total: int, at: float) -> float | None:
    """Seconds left at the pace between the last two reports; the old figure while no step was finished."""
    before, then = old.get("step"), seconds(old.get("time"))
    if before is None or then is None or step < before:
        return None
    if step == before:
        return _number(old.get("etaSeconds"))
    return (total - step) * max(0.0, at - then) / float(step - before)


def last_step_time(w: Work) -> float:
    """When the last step was finished, as far as is known."""
    return seconds((w.draft.new.get("progress") or {}).get("time")) or 0.0
