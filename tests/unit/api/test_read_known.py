from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.api.base import read_known
from grounding.api.report import TrainReport
from grounding.api.status import EvalStatus, TrainStatus

GOOD = {"type": "Running", "status": "True", "reason": "R", "message": "", "lastTransitionTime": "2027-01-15T08:00:00Z"}


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (None, {}),
        ("text", {}),
        ({"phase": "Running", "unknown": 1}, {"phase": "Running"}),
        ({"phase": "Nonsense", "attempt": 2}, {"attempt": 2}),
        ({"conditions": [GOOD, {"type": "Half"}, {**GOOD, "status": "?"}, GOOD]}, {"conditions": [GOOD, GOOD]}),
        ({"progress": {"step": 3, "percent": 200}}, {"progress": {"step": 3}}),
        ({"metrics": {"a": 1.0, "b": "x", "c": None}}, {"metrics": {"a": 1.0}}),
        ({"checkpoint": {"uri": "s3://b"}, "attempt": 1}, {"attempt": 1}),
    ],
)
def test_the_good_is_kept(found: Any, kept: dict[str, Any]) -> None:
    assert read_known(TrainStatus, found).model_dump(mode="json", by_alias=True, exclude_none=True) == kept


def test_what_is_read_is_not_changed() -> None:
    found = {"conditions": [{"type": "Half"}], "attempt": -1}
    read_known(TrainStatus, found)
    assert found == {"conditions": [{"type": "Half"}], "attempt": -1}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(GOOD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
_NAMES = st.sampled_from(
    ["phase", "conditions", "attempt", "progress", "metrics", "checkpoint", "accuracy", "columns", "step", "time", "events", "x"]
)  # fmt: skip


@pytest.mark.parametrize("model", [TrainStatus, EvalStatus, TrainReport])
@given(found=st.dictionaries(_NAMES, _JSON))
def test_anything_can_be_read_and_what_was_read_is_whole(model: Any, found: dict[str, Any]) -> None:
    once = read_known(model, found)
    assert read_known(model, once.model_dump(by_alias=True, exclude_none=True)) == once
