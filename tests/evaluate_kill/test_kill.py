"""After `kill -9` at twenty random moments, the table is the same, and only requests in flight are repeated."""

import json
import random
import signal
import time

import pytest
from misbehaving import CONCURRENCY, ROWS, steady

from grounding.evaluate.results.writer import read_rows

KILLS = 20


@pytest.mark.timeout(300)
def test_twenty_kills_change_nothing(data, server, start, finish):
    reference = finish(data / "reference")
    assert reference["done"] == ROWS == server.count and 0 < reference["macro"] < 1
    before, server.delay, chance = server.count, 0.02, random.Random()
    kills = during = 0
    while kills < KILLS:
        child, at = start(data / "out"), server.count
        want = at + chance.randint(1, 14)
        # so that about every fifth kill happens during the start
        end = time.monotonic() + (chance.uniform(0.0, 1.0) if kills % 5 == 0 else 30.0)
        while server.count < want and time.monotonic() < end and child.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.03))
        assert child.poll() is None, child.communicate()
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills, during = kills + 1, during + (server.count > at)
    assert during >= KILLS // 2
    assert len({r["key"] for r in read_rows(data / "out")}) < ROWS  # the last kill happened before the end
    summary = finish(data / "out")
    assert steady(summary) == steady(reference)
    assert steady(json.loads((data / "out/summary.json").read_text())) == steady(reference)
    assert ROWS <= server.count - before <= ROWS + during * CONCURRENCY
    answered = server.count
    assert steady(finish(data / "out")) == steady(reference) and server.count == answered
