from dataclasses import replace
from typing import Any

import pytest
from egm_operator.plan.model import model
from egm_operator.plan.snapshot import Upstream, place

from grounding.errors import UserError
from tests.unit.operator.plan.kit import said, training
from tests.unit.operator.world import train

AWAITED = {"model": {"trainJob": "first"}}


@pytest.mark.parametrize(
    ("phase", "reason"),
    [
        (None, "UpstreamNotFound"),
        ("", "UpstreamNotReady"),
        ("Running", "UpstreamNotReady"),
        ("Failed", "UpstreamFailed"),
    ],
)
def test_it_waits(phase: str | None, reason: str) -> None:
    upstream = None if phase is None else Upstream({**train(), "status": {"phase": phase} if phase else {}})
    snapshot = replace(training(**AWAITED), upstream=upstream)
    assert said(model(snapshot)) == {"final": True, "phase": "Pending", "reason": reason}
    assert place(snapshot) is None


@pytest.mark.parametrize(
    ("spec", "status", "upstream", "uri"),
    [
        ({"model": {"source": "hf://a/b"}}, {}, None, "hf://a/b"),
        (AWAITED, {}, {**train(output="s3://b/first"), "status": {"phase": "Succeeded"}}, "s3://b/first/model"),
        # the training job may have been deleted since
        (AWAITED, {"model": "s3://b/first/model"}, None, "s3://b/first/model"),
    ],
)
def test_it_finds(spec: dict[str, Any], status: dict[str, Any], upstream: dict[str, Any] | None, uri: str) -> None:
    snapshot = replace(training(status=status, **spec), upstream=None if upstream is None else Upstream(upstream))
    decision = model(snapshot)
    assert not decision.final and decision.status.fields.model == uri
    placed = place(replace(snapshot, status=decision.status))
    assert placed is not None and placed.context.places.layout.model == uri


def test_a_job_that_says_nowhere_to_write() -> None:
    with pytest.raises(UserError, match="is missing"):
        model(training(output=None))


def test_a_reward_under_a_folder_that_no_pod_has() -> None:
    with pytest.raises(UserError, match="a pod has no folder"):
        model(training(reward={"file": "rewards/mine.py"}))
    for known in (
        {"file": "/data/mine.py"},
        {"file": "pvc://c/mine.py"},
        {"configMap": {"name": "mine", "key": "r.py"}},
    ):
        model(training(reward=known))
