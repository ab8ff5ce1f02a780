"""The choice of valid latencies: row by row, for any process that measured them, and the same after any restart."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.cli import run as command_line
from grounding.evaluate import run as module
from grounding.evaluate.latency import Lag, judge
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.summary_model import read_summary
from tests.unit.evaluate.test_run import evaluation, go

NAN = float("nan")


def judged(latency, lag, earlier=()):
    return judge(np.array(latency), np.array(lag), np.zeros(len(latency), np.uint16), earlier)


def test_only_what_a_late_process_measured_is_left_out():
    found = judged([0.1, 0.2, 0.1, NAN], [0.001, 0.05, 0.0, 0.9])
    assert found.latency_s[[0, 2]].tolist() == [0.1, 0.1] and np.isnan(found.latency_s[[1, 3]]).all()
    assert (found.left_out, found.worst_s, found.refused) == (1, 0.05, None)
    assert found.note == (
        "latencies of 1 of 3 answers are left out because the process that measured them was at times 50.0 ms late, "
        "more than 3% of the latency (100.0 ms)"
    )


def test_nothing_is_left_if_all_were_measured_late():
    found = judged([0.1, 0.2], [0.01, 0.02])
    assert np.isnan(found.latency_s).all() and found.note is None and "20.0 ms late" in found.refused
    assert "Lower --concurrency" in found.refused


def test_a_hiccup_costs_its_rows_and_needs_no_note():
    found = judged([0.1] * 200, [0.001] * 199 + [0.05])
    assert (found.left_out, found.note, found.refused) == (1, None, None)


def test_rows_of_earlier_versions_are_judged_by_their_processes():
    assert judged([0.1, 0.1], [NAN, 0.0], [0.001, 0.05]).left_out == 1
    assert judged([0.1, 0.1], [NAN, 0.0], [0.001]).left_out == judged([0.1, 0.1], [NAN, 0.0]).left_out == 0
    assert judged([NAN, NAN], [0.5, NAN], [9.0]).refused is None


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0, 1)), min_size=1, max_size=30), st.randoms())
def test_the_order_of_the_rows_is_nothing_and_what_counts_was_on_time(rows, chance):
    latency, lag = zip(*rows, strict=True)
    found = judged(latency, lag)
    limit = 0.03 * float(np.median(latency))
    counted = found.latency_s[~np.isnan(found.latency_s)]
    assert sorted(counted) == sorted(la for la, g in rows if g <= limit)
    order = chance.sample(range(len(rows)), len(rows))
    again = judged([latency[i] for i in order], [lag[i] for i in order])
    assert again.left_out == found.left_out == len(rows) - len(counted) and again.worst_s == found.worst_s


def test_a_loop_that_is_held_up_is_seen_at_once_and_forgotten_later():
    async def go():
        lag = Lag()
        task = asyncio.create_task(lag.measure())
        await asyncio.sleep(0.1)
        for _ in range(600):  # the lag may be real on a busy machine, so wait until it is small
            if lag.now() < 0.1:
                break
            await asyncio.sleep(0.1)
        time.sleep(0.15)  # noqa: ASYNC251  # holds the loop up
        held = lag.now()
        await asyncio.sleep(0)
        after = lag.now()
        task.cancel()
        return held, after

    held, after = asyncio.run(go())
    assert held > 0.1 and after > 0.1
    quiet = Lag()
    assert quiet.now() == quiet.p99() == 0.0


def late_by(monkeypatch, seconds):
    monkeypatch.setattr(module.Lag, "now", lambda self: seconds)


def test_a_resumed_run_is_judged_by_all_its_processes_and_loses_only_the_late_ones(dataset, server, monkeypatch):
    slow = evaluation(dataset, server.url, mode="latency", concurrency=2)
    server.delay = 0.02
    late_by(monkeypatch, 0.5)
    first = go(evaluation(dataset, server.url, mode="latency", concurrency=2, limit=12))
    assert first.latency_refused and first.costs.latency_p50 is None
    assert all(f.latency_p50 is f.latency_mean is None for f in first.files)
    late_by(monkeypatch, 0.0)
    second = go(slow)
    rows = list(read_rows(dataset / "out"))
    assert {r["loop_lag_s"] for r in rows} == {0.5, 0.0} and all(1 <= r["in_flight"] <= 2 for r in rows)
    measured = [r for r in rows if r["latency_s"] is not None]
    late = [r for r in measured if r["loop_lag_s"]]
    assert second.latency_refused is None and second.latencies_left_out == len(late) > 0
    assert any(n.startswith(f"latencies of {len(late)} of {len(measured)} answers") for n in second.notes)
    for f in second.files:
        own = [r["latency_s"] for r in measured if not r["loop_lag_s"] and r["file"] == f.name]
        assert f.latency_mean == (pytest.approx(np.mean(own)) if own else None)
    again = go(slow)  # all questions are answered, so nothing is sent
    kept = ("latencies_left_out", "loop_lag_p99", "in_flight_mean", "latency_refused", "notes", "files", "servers")
    assert [getattr(again, k) for k in kept] == [getattr(second, k) for k in kept]
    assert command_line(["rescore", str(dataset / "out")]) == 0
    scored = read_summary(dataset / "out")
    assert [getattr(scored, k) for k in kept] == [getattr(second, k) for k in kept]
    assert scored.costs.latency_p50 == second.costs.latency_p50 is not None


def test_a_process_that_was_killed_leaves_its_lag_in_its_rows(dataset, server, monkeypatch):
    """The rows can be checked without a summary of the killed process."""
    server.delay = 0.02
    late_by(monkeypatch, 0.5)
    go(evaluation(dataset, server.url, mode="latency", concurrency=2, limit=12))
    (dataset / "out/summary.json").unlink()
    late_by(monkeypatch, 0.0)
    found = go(evaluation(dataset, server.url, mode="latency", concurrency=2, limit=12))
    assert found.latency_refused and found.latencies_left_out > 0
