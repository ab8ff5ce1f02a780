"""The share of the grace period that a role gets, and the time that remains of it."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.runtime.grace import MARGIN_S, Stop, for_role


@given(st.floats(0, 1e6))
def test_a_role_gets_the_period_less_a_margin(period: float) -> None:
    assert 0 <= for_role(period) <= period
    assert period - for_role(period) <= MARGIN_S
    assert for_role(period) >= 0.75 * period - 1e-9


def test_examples_of_the_docs() -> None:
    assert for_role(120) == 110 and for_role(600) == 590 and for_role(20) == 15


def test_what_is_left_counts_from_the_first_request() -> None:
    now = [100.0]
    stop = Stop(50.0, clock=lambda: now[0])
    assert not stop.asked and stop.left() == 50.0 and not stop.training_is_late()
    stop.ask()
    now[0] = 110.0
    stop.ask(signal.SIGTERM, None)
    assert stop.asked and stop.left() == 40.0 and not stop.training_is_late()
    now[0] = 131.0
    assert stop.training_is_late() and stop.left() == 19.0
    now[0] = 500.0
    assert stop.left() == 0.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_the_stop(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_GRACE_SECONDS", "7.5")
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = Stop.of_process()
        os.kill(os.getpid(), number)
        assert stop.asked and stop.grace_s == 7.5
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
