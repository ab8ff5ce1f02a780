"""The operator's time is that of the API server, if this machine's clock differs from it."""

from email.utils import formatdate

import pytest
from egm_operator.kube.clock import ServerClock

SERVER = 1_800_000_000.0


@pytest.mark.parametrize(("ahead", "error"), [(0.0, 0.0), (4.0, 4.0), (-4.0, -4.0), (3600.0, 0.0), (-3600.0, 0.0)])
def test_a_clock_that_differs(ahead: float, error: float) -> None:
    clock = ServerClock(lambda: SERVER + ahead)
    assert clock() == SERVER + ahead
    clock.heard(formatdate(SERVER, usegmt=True))
    assert clock() == SERVER + error


def test_it_is_asked_again_after_a_while() -> None:
    passed, ahead = [0.0], [3600.0]
    clock = ServerClock(lambda: SERVER + passed[0] + ahead[0], lambda: passed[0])
    clock.heard(formatdate(SERVER, usegmt=True))
    ahead[0] = 0.0  # the clock is set right
    for seconds in (1.0, 11.0):
        passed[0] = seconds
        clock.heard(formatdate(SERVER + seconds, usegmt=True))
    assert clock() == SERVER + 11.0


@pytest.mark.parametrize("date", [None, "", "yesterday"])
def test_an_answer_without_a_date(date: str | None) -> None:
    clock = ServerClock(lambda: SERVER)
    clock.heard(date)
    assert clock() == SERVER
