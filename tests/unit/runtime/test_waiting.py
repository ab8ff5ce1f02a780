"""A message about waiting is printed at once, then at intervals."""

from __future__ import annotations

from grounding.runtime.waiting import Every


def test_a_message_is_due_at_first_and_then_at_intervals() -> None:
    times = iter((0.0, 1.0, 9.9, 10.0, 15.0, 25.0))
    every = Every(10.0, lambda: next(times))
    assert [every.due() for _ in range(6)] == [True, False, False, True, False, True]
