"""Stored summaries can be read again, also those of an earlier release; a damaged field does not hide the others."""

import orjson
import pytest

from grounding.evaluate.engines import Metrics
from grounding.evaluate.served import ServedModel
from grounding.evaluate.summary_model import (
    Costs,
    EndpointFacts,
    FileSummary,
    Intervals,
    Problem,
    SamplesSummary,
    ServedAnswers,
    Summary,
    VoteMean,
    VotesOf,
    read_summary,
    summary_of,
)
from grounding.scoring.doctor import diagnose

COSTS = Costs(9, 70.0, None, 5.0, 5.0, None, None, None, 0.1, 0.1, 0.2, 0.2, 4, 10.0, None, None, None, None)
RELEASE_0_1 = {
    "total": 48,
    "done": 46,
    "errors": 2,
    "empty": 0,
    "unparsed": 1,
    "truncated": 1,
    "macro": None,
    "micro": None,
    "ci95": None,
    "reason": "2 of 48 requests failed",
    "files": [{"name": "refcoco_val", "n": 46, "acc": 0.5, "acc75": 0.25, "acc90": 0.0, "mean_iou": 0.5, "errors": 2}],
    "model": "EGM-8B",
    "prompt": "qwen3",
    "scoring": "egm-eval",
    "mode": "throughput",
    "requests_per_second": 12.5,
    "wall_seconds": 3.7,
}
"""A summary that `egm eval` of release 0.1.0 wrote"""


def written(folder, summary):
    (folder / "summary.json").write_bytes(orjson.dumps(summary))
    return read_summary(folder)


def test_what_is_written_is_read_again(tmp_path):
    vote = VoteMean(macro=0.5, ci95=(0.4, 0.6))
    whole = Summary(
        total=9,
        done=9,
        macro=0.5,
        micro=0.5,
        ci95=Intervals(macro=(0.4, 0.6), micro=(0.4, 0.6)),
        problems=(Problem(what="refused", rows=1),),
        served=(ServedAnswers(id="m", path="/models/m", answers=9),),
        doctor=diagnose([0] * 9),
        files=(FileSummary(name="refcoco_val", n=9, total=9, acc=0.5, remark=""),),
        samples=SamplesSummary(count=1, by_number=(VotesOf(n=1, medoid=vote, mean=vote, first=vote, oracle=vote),)),
        servers=(EndpointFacts(endpoint="http://a", served=ServedModel(id="m"), metrics=Metrics(running=1.0)),),
        loop_lags=(0.01,),
        costs=COSTS,
    )
    assert written(tmp_path, whole.document()) == whole


def test_a_summary_of_release_0_1_is_read(tmp_path):
    found = written(tmp_path, RELEASE_0_1)
    assert found is not None and (found.done, found.reason, found.requests_per_second) == (
        46,
        "2 of 48 requests failed",
        12.5,
    )
    assert (found.files[0].acc, found.files[0].remark, found.doctor, found.costs, found.notes) == (
        0.5,
        None,
        None,
        None,
        (),
    )


@pytest.mark.parametrize("field", RELEASE_0_1)
@pytest.mark.parametrize("value", [[], {}, "x", -1, True, [None, 5], {"a": {}}])
def test_a_field_of_another_form_hides_no_other_one(tmp_path, field, value):
    found, whole = written(tmp_path, RELEASE_0_1 | {field: value}), written(tmp_path, RELEASE_0_1)
    for name in set(RELEASE_0_1) - {field}:
        assert getattr(found, name) == getattr(whole, name)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"null"])
def test_a_damaged_file_is_no_summary(tmp_path, text):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_bytes(text)
    assert read_summary(tmp_path) is None and summary_of(tmp_path) == Summary()


def test_notes_are_texts(tmp_path):
    assert written(tmp_path, {"notes": ["one", 2, None, "two"]}).notes == ("one", "two")
    assert written(tmp_path, {"notes": "text"}).notes == ()


def test_parts_that_an_evaluation_does_not_have_are_not_written():
    assert {"samples", "settings", "servers", "costs", "loop_lags"}.isdisjoint(Summary().document())


def test_scoring_again_keeps_what_was_measured():
    earlier = Summary(mode="latency", requests_per_second=None, costs=COSTS, macro=0.5)
    again = Summary(mode="throughput", requests_per_second=2.0, wall_seconds=1.0, macro=0.25)
    again.take_timing(earlier)
    assert (again.mode, again.requests_per_second, again.wall_seconds) == ("latency", None, 1.0)
    assert again.costs == COSTS and again.macro == 0.25
