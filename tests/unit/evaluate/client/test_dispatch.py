"""Assigning, taking and stealing work: every question is asked once, whatever the endpoints do."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.evaluate.client.concurrency import Breaker, Limiter
from grounding.evaluate.client.dispatch import Dispatcher, homes, ranking


def dispatcher(images, endpoints, **more):
    numbers = np.array(images, dtype=np.uint32)
    names = [f"{i}.jpg" for i in range(max(images, default=0) + 1)]
    return Dispatcher(np.arange(len(images)), numbers, names, [f"http://{e}" for e in range(endpoints)], **more)


@given(
    st.lists(st.integers(0, 9), max_size=60),
    st.integers(1, 4),
    st.booleans(),
    st.randoms(use_true_random=False),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_every_question_is_handed_out_once_and_ends(images, endpoints, first_alone, chance: random.Random, slots):
    d = dispatcher(images, endpoints, first_alone=first_alone, slots=lambda e: slots[e])
    running, answered = [], []
    while d.unfinished:
        endpoint = chance.randrange(endpoints)
        job = d.take(endpoint)
        if job is not None:
            running.append((job, endpoint))
        elif not running:  # this endpoint has no work and no request in flight: another endpoint has the rest
            assert any(d._ready) and not d.idle
        if running and (job is None or chance.random() < 0.6):
            job, endpoint = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.2:
                d.again(job, chance.randrange(endpoints), last=chance.random() < 0.5)
                if chance.random() < 0.3:
                    d.evacuate(endpoint, lambda job: chance.randrange(endpoints))
            else:
                d.finish(job, endpoint)
                answered.append(job.row)
    assert sorted(answered) == list(range(len(images))) and d.idle
    assert all(d.take(e) is None for e in range(endpoints))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=60),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_refused_that_a_look_at_all_endpoints_would_find(images, endpoints, chance: random.Random):
    slots = [chance.randrange(4) for _ in range(endpoints)]
    d = dispatcher(images, endpoints, slots=lambda e: slots[e])
    running = []
    for _ in range(6 * len(images)):
        if chance.random() < 0.2:
            slots[chance.randrange(endpoints)] = chance.randrange(4)
            d.recheck()
        endpoint = chance.randrange(endpoints)
        left = sum(high - low for low, high in zip(d._low, d._high, strict=True))
        over = [e for e in range(endpoints) if len(d._ready[e]) > slots[e]]
        assert d.surplus == bool(left or over) and d.idle == (not left and not any(d._ready))
        expected = bool(d._ready[endpoint] or left or over)
        job = d.take(endpoint)
        assert (job is not None) == expected
        if job is not None:
            running.append((job, endpoint))
        if running and chance.random() < 0.7:
            done, at = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.2:
                d.again(done, chance.randrange(endpoints))
            else:
                d.finish(done, at)


@given(st.lists(st.text(max_size=8), max_size=20), st.lists(st.text(max_size=8), min_size=1, max_size=9, unique=True))
def test_a_home_is_the_first_of_the_ranking(images, endpoints):
    assert homes(images, endpoints, block=3).tolist() == [ranking(image, endpoints)[0] for image in images]


def test_the_first_of_an_image_goes_ahead():
    d = dispatcher([0, 1, 0, 0, 1], 1)
    first, other = d.take(0), d.take(0)
    assert (first.row, other.row, d.take(0)) == (0, 1, None)
    assert d.finish(first, 0) and [d.take(0).row for _ in range(2)] == [2, 3]
    assert d.take(0) is None and d.finish(other, 0) and d.take(0).row == 4
    at_once = dispatcher([0, 1, 0, 0, 1], 1, first_alone=False)
    assert [at_once.take(0).row for _ in range(5)] == [0, 2, 3, 1, 4]


def test_images_stay_together_while_there_is_enough_to_do():
    images = [i % 200 for i in range(1200)]
    d = dispatcher(images, 4, slots=lambda _: 8)
    where = {}
    for _ in range(150):  # the endpoints take questions in turn and answer at once
        for endpoint in range(4):
            job = d.take(endpoint)
            where.setdefault(images[job.row], set()).add(endpoint)
            d.finish(job, endpoint)
    assert all(len(endpoints) == 1 for endpoints in where.values())


def test_an_endpoint_that_runs_dry_takes_whole_images_from_the_fullest():
    images = [i // 6 for i in range(600)]
    d = dispatcher(images, 2, slots=lambda _: 4)
    rows, shared = [], {}
    while (job := d.take(0)) is not None:  # endpoint 1 takes no question
        rows.append(job.row)
        shared.setdefault(images[job.row], []).append(job.row)
        d.finish(job, 0)
    assert sorted(rows) == list(range(600))
    assert all(group == list(range(group[0], group[0] + 6)) for group in shared.values())


class Model:
    """A server with `slots`: further requests wait, so the latency grows with the number of waiting requests."""

    def __init__(self, slots, seconds):
        self.slots, self.seconds = slots, seconds

    def round(self, in_flight):
        """Return the seconds between two answers with this many requests in flight."""
        return self.seconds / min(in_flight, self.slots)


@pytest.mark.parametrize(("slots", "most"), [(4, 256), (20, 256), (64, 256), (500, 128)])
def test_the_limit_finds_the_server_s_size(slots, most):
    limiter, model, now = Limiter(most), Model(slots, 0.5), 0.0
    seen = []
    for _ in range(20_000):
        now += model.round(limiter.limit)
        limiter.answered(now, limiter.limit)
        seen.append(limiter.limit)
    tail = sorted(seen[10_000:])
    assert min(seen) >= 1 and max(seen) <= most
    middle = tail[len(tail) // 2]
    # the limit must be close to the server's slots
    assert min(slots, most) * 0.9 <= middle <= min(most, max(16, slots * 2.1))


def test_a_limit_begins_at_the_server_s_slots_once():
    limiter, now = Limiter(256), 0.0
    limiter.begin(80)
    assert limiter.limit == 80
    for _ in range(3 * 80):
        now += 0.5 / 80
        limiter.answered(now, limiter.limit)
    grown = limiter.limit
    assert grown > 80
    limiter.begin(20)  # the server is back: the earlier measurements must still count
    assert limiter.limit == grown
    for most, slots, expected in ((64, 80, 64), (64, 1, 1)):
        limiter = Limiter(most)
        limiter.begin(slots)
        assert limiter.limit == expected
    fixed = Limiter(32, fixed=True)
    fixed.begin(8)
    assert fixed.limit == 32


def test_overload_cuts_once_a_second_and_it_grows_again():
    limiter, now = Limiter(64, limit=64), 0.0
    for _ in range(30):
        limiter.overloaded(now)
    assert limiter.limit == 44
    limiter.overloaded(now + 1.5)
    assert limiter.limit == 30
    for _ in range(5000):
        now += 0.5 / limiter.limit
        limiter.answered(now, limiter.limit)
    assert limiter.limit == 64
    fixed = Limiter(32, fixed=True)
    fixed.overloaded(0.0)
    assert fixed.limit == 32


@given(
    st.lists(st.tuples(st.sampled_from("aobr"), st.floats(0, 2), st.integers(0, 70)), max_size=200), st.integers(1, 64)
)
def test_a_limit_never_leaves_its_range(events, most):
    limiter, now = Limiter(most), 0.0
    for kind, passed, number in events:
        now += passed
        if kind == "a":
            limiter.answered(now, number)
        elif kind == "o":
            limiter.overloaded(now)
        elif kind == "b":
            limiter.begin(number)
        else:
            limiter.resize(number)
        assert 1 <= limiter.limit <= limiter.most


def test_a_breaker_opens_probes_and_closes():
    b = Breaker()
    for _ in range(4):
        b.failure(0.0, refused=False, jitter=1.0)
    assert not b.open and b.admits(0.0) and b.sent() is False
    b.failure(0.0, refused=False, jitter=1.0)
    assert b.open and not b.admits(0.4) and b.admits(0.6)
    assert b.sent() is True
    assert not b.admits(0.7)  # while one probe is running, a second one is refused
    for _ in range(100):  # failures of requests that were in flight when the breaker opened
        b.failure(0.7, refused=False, jitter=1.0)
    assert not b.admits(0.8)
    b.failure(0.8, refused=True, jitter=1.0, probe=True)
    assert b.opened == 0.0 and not b.admits(1.7) and b.admits(1.9)  # the pause is now twice as long
    assert b.sent() and not b.admits(9.0)
    b.dropped(True)  # the probe was cancelled, so the next one may start
    assert b.admits(9.0)
    b.success()
    assert not b.open and b.admits(1.8)
    b.wait(5.0, 3.0)
    b.success()  # an answer to another question does not end the pause of Retry-After
    assert not b.admits(7.0) and b.admits(8.0)


@given(st.lists(st.tuples(st.sampled_from("sfrdw"), st.floats(0, 3), st.floats(0, 1)), max_size=100))
def test_a_breaker_never_locks_an_endpoint_out(events):
    b, now, out = Breaker(), 0.0, []
    for kind, passed, jitter in events:
        now += passed
        if b.admits(now):
            probe = b.sent()
            assert not (probe and any(out))  # never two probes at a time
            out.append(probe)
        if out and kind != "w":
            probe = out.pop(0)
            if kind == "s":
                b.success()
                out = [False] * len(out)  # the breaker is closed, so these requests are no longer probes
            elif kind == "d":
                b.dropped(probe)
            else:
                b.failure(now, refused=kind == "r", jitter=jitter, probe=probe)
        elif kind == "w":
            b.wait(now, 2.0)
    for probe in out:
        b.dropped(probe)
    assert b.admits(now + 12.0)
