import json
from typing import Any

import pytest
from egm_operator.plan.train.progress import apply_report, progress
from egm_operator.status import ConditionType, StatusBuilder, as_json, read_status
from hypothesis import given
from hypothesis import strategies as st

from grounding.api.status import TrainStatus
from tests.unit.operator.plan.kit import NOW, Report, conditions, gang, placed_training, pod, stamp

pytestmark = pytest.mark.usefixtures("back_end")

OLD = {"progress": {"step": 4, "totalSteps": 9, "time": stamp(NOW - 10)}, "metrics": {"valAccuracy": 0.8}}


def _applied(body: dict[str, Any], old: dict[str, Any] = OLD) -> dict[str, Any]:
    builder = StatusBuilder(read_status({"status": old}, TrainStatus), 1, NOW)
    apply_report(builder, body, None)
    return as_json(builder.fields)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, OLD["progress"]),
        ({"step": "x"}, OLD["progress"]),
        ({"step": True}, OLD["progress"]),
        ({"step": -1}, OLD["progress"]),
        # without a new step, the time does not change
        ({"step": 4, "totalSteps": 9}, {**OLD["progress"], "percent": 44.4}),
        (
            {"step": 5, "totalSteps": 10, "time": NOW},
            {"step": 5, "totalSteps": 10, "percent": 50.0, "etaSeconds": 50, "time": stamp(NOW)},
        ),
        (
            {"step": 5, "totalSteps": 10, "etaSeconds": 7.9, "time": "2027-01-15T08:00:00Z"},
            {"step": 5, "totalSteps": 10, "percent": 50.0, "etaSeconds": 7, "time": "2027-01-15T08:00:00Z"},
        ),
        ({"step": 5, "totalSteps": 0}, {"step": 5, "time": stamp(NOW)}),
        # the API server would refuse a negative number
        ({"step": 5, "totalSteps": -3}, {"step": 5, "time": stamp(NOW)}),
        ({"step": 5, "time": 1e300}, {"step": 5, "time": stamp(NOW)}),
        (
            {"step": 5, "metrics": {"rolloutsFailed": 3.0, "valFailed": -1}},
            {"step": 5, "time": stamp(NOW), "rolloutsFailed": 3},
        ),
    ],
)
def test_progress(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert _applied(body)["progress"] == expected


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        (
            {"metrics": {"score": 0.12345678, "loss": None, "x": "y"}},
            "metrics",
            {"valAccuracy": 0.8, "score": 0.123457},
        ),
        ({"metrics": [1]}, "metrics", {"valAccuracy": 0.8}),
        ({"checkpoint": {"step": 3, "uri": "s3://b/c"}}, "checkpoint", {"step": 3, "uri": "s3://b/c"}),
        ({"checkpoint": {"step": None, "uri": "s3://b/c"}}, "checkpoint", None),
        ({"saved": {"step": 3, "time": NOW}}, "saved", {"step": 3, "time": stamp(NOW)}),
        ({"uploaded": {"step": 3, "time": -1}}, "uploaded", None),
    ],
)
def test_what_else_a_report_says(body: dict[str, Any], name: str, value: Any) -> None:
    assert _applied(body).get(name) == value


FAILING = {"reason": "UploadFailing", "step": 3, "message": "the S3 credentials have expired (ExpiredToken)"}
MOMENT = {"step": 2, "time": NOW - 50}


@pytest.mark.parametrize(
    ("before", "body", "ended", "expected", "event"),
    [
        (None, {"step": 1, "events": []}, None, None, None),  # the job has no store to upload to
        (None, {"step": 1, "events": [], "uploaded": MOMENT}, None, ("True", "Uploaded"), None),
        (None, {"step": 3, "events": [FAILING]}, None, ("False", "UploadFailing"), "UploadFailing"),
        ("True", {"step": 3, "events": [FAILING], "uploaded": MOMENT}, None, ("False", "UploadFailing"), "UploadFailing"),
        ("False", {"step": 3, "events": [FAILING]}, None, ("False", "UploadFailing"), None),
        ("False", {"step": 3, "events": []}, None, ("True", "Uploaded"), "Uploaded"),
        ("False", {"step": 3}, None, ("False", "Said"), None),  # a report that was cut to fit contains no events
        ("False", {"step": 3, "events": [FAILING]}, {"step": 4, "events": []}, ("True", "Uploaded"), "Uploaded"),
        ("True", {"step": 3, "events": []}, {"step": 4, "events": [FAILING]}, ("False", "UploadFailing"), "UploadFailing"),
    ],
)  # fmt: skip
def test_uploads_that_fail_are_a_condition(
    before: str | None,
    body: dict[str, Any],
    ended: dict[str, Any] | None,
    expected: tuple[str, str] | None,
    event: str | None,
) -> None:
    known = {} if before is None else {"conditions": conditions(OutputWritable=before)}
    master = pod("a", master=True) if ended is None else pod("a", master=True, code=1, message=json.dumps(ended))
    snapshot = placed_training(gang(), master, status={"attempt": 1, **known}, report=Report(NOW, body))
    decision = progress(snapshot)
    assert decision is not None and not decision.final
    found = decision.status.get(ConditionType.OUTPUT_WRITABLE)
    assert (None if found is None else (found.status, found.reason)) == expected
    assert [e.reason for e in decision.plan.events] == ([] if event is None else [event])
    if found is not None and found.reason == "UploadFailing":
        assert "expired" in found.message


def test_what_is_done_about_a_stop_is_the_attempts_own() -> None:
    said = "waiting for the current step 7: it needs about 40 s more, and 66 s are left"
    assert _applied({"step": 6, "stopping": said})["stopping"] == said
    assert "stopping" not in _applied({"step": 7}, {"stopping": said}), (
        "expected no `stopping`, because the next attempt was not asked to stop"
    )
    assert _applied({}, {"stopping": said})["stopping"] == said


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    ["step", "totalSteps", "time", "etaSeconds", "metrics", "checkpoint", "saved", "events", "stopping", "x"]
)


@given(st.dictionaries(_FIELDS, _JSON))
def test_no_report_breaks_a_status(body: dict[str, Any]) -> None:
    """The models, and therefore the API server, accept the resulting status."""
    TrainStatus.model_validate(_applied(body))
