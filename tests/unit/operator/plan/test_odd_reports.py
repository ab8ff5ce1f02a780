"""Whatever a job's pods report, the plan succeeds, and the API server accepts its status.

A report comes from `/progress`, an annotation or the termination message of a pod, and users decide what pods run. If a
report broke the plan, the job would stay as it is and keep its GPUs.
"""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from egm_operator.plan import plan
from egm_operator.snapshot import Observed, Report
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from grounding.api.report import EvalReport, TrainReport
from grounding.api.status import EvalStatus, TrainStatus
from tests.unit.operator.plan.kit import MODEL, client, conditions, ended, gang, pod, stamp
from tests.unit.operator.world import NOW, SETTINGS, evaluation, train

HUGE = [1e300, -1e300, 2**63, 2**53, 2**53 - 1, 2**31, -(2**63), 253402300800.0, 1e308, 5e-324]
ODD: list[Any] = [*HUGE, 0, 1, -1, 0.5, True, None, "", "x", "9" * 400, "\ud800", "\x1b[2J", [], {}, [[]], {"a": {}}]
ODD += ["0001-01-01T00:00:00", "9999-12-31T23:59:59-23:59", NOW * 1000, float("nan"), float("inf")]


def names(model: type[BaseModel]) -> list[str]:
    """Return all field names of a report, including nested ones."""
    text = orjson.dumps(model.model_json_schema()).decode()
    found = {str(f.alias or n) for n, f in model.model_fields.items()}
    return sorted(found | {part for part in text.split('"') if part.isidentifier() and len(part) < 20})


def reports(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Return bodies with a report's field names at all depths, and unusual values."""
    leaf = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)
    keys = st.sampled_from(names(model))
    values = st.recursive(leaf, lambda inner: st.dictionaries(keys, inner, max_size=5) | st.lists(inner, max_size=3))
    return st.dictionaries(keys, values, max_size=9)


def body_of(body: dict[str, Any]) -> dict[str, Any]:
    """Pass the value through JSON, because a report can only contain what JSON can express."""
    try:
        found: dict[str, Any] = orjson.loads(orjson.dumps(body))
    except TypeError:
        return {}
    return found


def check(status: Any, model: type[BaseModel]) -> None:
    """Check that a status has the right form, with numbers and sizes that the API server accepts."""
    assert len(orjson.dumps(status)) < 600_000
    model.model_validate(status)
    todo = [status]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, float):
            assert math.isfinite(value)
        elif isinstance(value, int):
            assert abs(value) < 2**63


RUNNING = {"phase": "Running", "attempt": 1, "startTime": stamp(NOW - 99), "model": MODEL}
RUNNING |= {"conditions": conditions(DataReady="True", Running="True")}
BEFORE = {"progress": {"step": 1, "totalSteps": 9, "time": stamp(NOW - 10)}}


def trained(body: dict[str, Any]) -> None:
    raw = {**train(), "status": RUNNING | BEFORE}
    check(plan(Observed(raw, [gang(), pod(master=True)], None, Report(NOW, body)), SETTINGS, NOW).status, TrainStatus)
    last = pod(master=True, code=0, message=orjson.dumps(body).decode())
    check(plan(Observed(raw, [gang(**ended("Succeeded")), last]), SETTINGS, NOW).status, TrainStatus)


def evaluated(body: dict[str, Any]) -> None:
    raw = {**evaluation(), "status": RUNNING}
    there = pod("c", role="evaluate")
    check(plan(Observed(raw, [client(), there], None, Report(NOW, body)), SETTINGS, NOW).status, EvalStatus)
    last = pod("c", role="evaluate", code=0, message=orjson.dumps(body).decode())
    check(plan(Observed(raw, [client(**ended("Complete")), last]), SETTINGS, NOW).status, EvalStatus)


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize("name", ["etaSeconds", "totalSteps", "step", "time", "gpuSeconds", "score", "rolloutsFailed"])
def test_numbers_of_a_training_that_nothing_can_be_worth(name: str, value: Any) -> None:
    body = {"step": 5, "totalSteps": 10, "time": NOW, "metrics": {"score": 1.0}}
    trained(body | ({"metrics": {name: value}} if name in ("score", "rolloutsFailed") else {name: value}))


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize("name", ["etaSeconds", "done", "total", "requestsPerSecond", "macro", "ci95", "flops", "n"])
def test_numbers_of_an_evaluation_that_nothing_can_be_worth(name: str, value: Any) -> None:
    given = {"macro": {"accuracy": {"macro": value}}, "ci95": {"accuracy": {"ci95": [value, value]}}}
    given |= {"flops": {"costs": {"flops": value}}, "n": {"accuracy": {"files": [{"name": "x" * 5000, "n": value}]}}}
    evaluated({"done": 3, "total": 4} | given.get(name, {name: value}))


few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(reports(TrainReport))
def test_any_report_of_a_training(body: dict[str, Any]) -> None:
    trained(body_of(body))


@few
@given(reports(EvalReport))
def test_any_report_of_an_evaluation(body: dict[str, Any]) -> None:
    evaluated(body_of(body))
