"""The cache and the queue: any order of events gives the same state, and two workers never process the same key."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
from egm_operator.controller.work_queue import WorkQueue
from egm_operator.kube.cache import Store
from hypothesis import given
from hypothesis import strategies as st

LABELS = {"grounding.egm.dev/job": "j", "grounding.egm.dev/kind": "train"}


def _pod(name: int, version: int) -> dict[str, Any]:
    meta = {"name": f"p{name}", "namespace": "n", "uid": f"u{name}", "resourceVersion": str(version), "labels": LABELS}
    return {"kind": "Pod", "metadata": meta, "status": {"phase": f"v{version}"}}


def _listed(store: Store, pods: list[dict[str, Any]], at: int) -> None:
    store.keep("Pod", {store.put(p) for p in pods}, at)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=40), st.integers())
def test_the_same_events_in_any_order_end_in_the_same_state(events: list[tuple[int, int]], seed: int) -> None:
    one, other = Store(), Store()
    shuffled = events[:]
    random.Random(seed).shuffle(shuffled)
    for name, version in events:
        one.put(_pod(name, version))
    for name, version in [*shuffled, *shuffled]:  # each event comes twice
        other.put(_pod(name, version))
    key = ("GroundingTrainJob", "n", "j")
    assert one.children(key) == other.children(key)


def test_a_name_used_again_is_another_object() -> None:
    store = Store()
    store.put(_pod(1, 5))
    late = _pod(1, 5)
    fresh = _pod(1, 2)
    fresh["metadata"]["uid"] = "new"
    store.put(fresh)
    store.drop(late)  # the deletion of the old pod, reported late
    found = store.get("Pod", "n", "p1")
    assert found is not None and found["metadata"]["uid"] == "new"


def test_a_listing_drops_what_is_gone() -> None:
    woken: list[Any] = []
    store = Store(woken.append)
    store.put(_pod(1, 1))
    store.put(_pod(2, 1))
    woken.clear()
    _listed(store, [_pod(2, 1)], 5)
    assert [c["metadata"]["name"] for c in store.children(("GroundingTrainJob", "n", "j"))] == ["p2"]
    assert woken == [("GroundingTrainJob", "n", "j")]


def test_a_listing_does_not_drop_what_was_made_after_it() -> None:
    store = Store()
    store.put(_pod(1, 7))
    _listed(store, [], 5)
    assert store.get("Pod", "n", "p1") is not None


def test_what_is_gone_does_not_come_back_with_a_late_answer() -> None:
    store = Store()
    store.put(_pod(1, 1))
    store.drop(_pod(1, 3))
    store.put(_pod(1, 2))  # the response to a write that arrives after the watch event
    assert store.get("Pod", "n", "p1") is None and store.children(("GroundingTrainJob", "n", "j")) == []


def test_an_object_that_is_read_may_be_changed() -> None:
    store = Store()
    store.put(_pod(1, 1))
    found = store.get("Pod", "n", "p1")
    assert found is not None
    found["status"]["phase"] = "other"
    assert store.get("Pod", "n", "p1") != found


def test_who_waits_for_a_model_is_woken() -> None:
    woken: list[Any] = []
    store = Store(woken.append)
    meta = {"namespace": "n", "uid": "a", "resourceVersion": "1"}
    store.put({"kind": "GroundingEvalJob", "metadata": {**meta, "name": "e"}, "spec": {"model": {"trainJob": "t"}}})
    woken.clear()
    store.put({"kind": "GroundingTrainJob", "metadata": {**meta, "name": "t"}, "spec": {}})
    assert ("GroundingEvalJob", "n", "e") in woken


async def test_a_key_waits_once_and_comes_back_when_it_was_added_meanwhile() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a")
    assert await queue.get() == "a" and len(queue) == 0
    queue.add("a")
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(queue.get(), 0.05)
    queue.done("a")
    assert await queue.get() == "a"


async def test_the_earlier_time_wins_and_failures_wait_longer() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.after("a", 50)
    queue.after("a", 0.01)
    assert await asyncio.wait_for(queue.get(), 1) == "a"
    now = 0.0
    queue = WorkQueue(clock=lambda: now)
    delays = []
    for _ in range(12):
        delays.append(queue.retry("b"))
        now += delays[-1]
    assert delays == sorted(delays) and delays[-1] == 60.0 and len(set(delays)) > 5
    queue.forget("b")
    assert queue.retry("b") == delays[0]


async def test_failures_of_a_key_that_events_wake_do_not_put_off_its_next_try() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(clock=lambda: now)
    delays = [queue.retry("a") for _ in range(30)]
    assert set(delays) == {delays[0]}, "thirty failures at the same time must count as one"
    now += delays[0]
    assert queue.retry("a") > delays[0]


async def test_a_train_of_events_is_one_look_at_its_end() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(clock=lambda: now, pause=0.2)

    async def comes(key: str) -> bool:
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(queue.get(), 0.01) == key
        return False

    queue.add("a")
    assert await comes("a"), "the first event must make the key due at once"
    queue.add("a")
    queue.done("a")
    for now in (0.05, 0.1, 0.15):  # noqa: B007  # the queue's clock returns `now`
        queue.add("a")
        assert not await comes("a")
    queue.add("b")
    assert await comes("b"), "the pause of one key must not delay another key"
    now = 0.21
    assert await comes("a")
    queue.done("a")
    now = 0.5
    queue.add("a")
    assert await comes("a"), "after the pause, an event must make the key due at once"
    queue.done("a")
    queue.done("b")
    now = 1.0
    queue.add("c")
    assert await comes("c")
    queue.done("c")
    assert list(queue._rests) == ["c"], "pauses that have ended must be removed"


async def test_times_that_earlier_ones_replace_do_not_pile_up() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(clock=lambda: now, pause=0.2)
    queue.add("a")
    for _ in range(5000):
        assert await queue.get() == "a"
        queue.after("a", 86400.0 - now)
        queue.done("a")
        queue.add("a")  # the event that its own write causes
        now += 0.25
    assert queue.delayed == 1 and len(queue._heap) < 1100
    assert await queue.get() == "a"


async def test_no_key_is_with_two_workers() -> None:
    queue: WorkQueue[int] = WorkQueue()
    held: set[int] = set()
    worked = 0

    async def worker() -> None:
        nonlocal worked
        while True:
            key = await queue.get()
            assert key not in held
            held.add(key)
            await asyncio.sleep(0.001)
            held.discard(key)
            worked += 1
            queue.done(key)

    workers = [asyncio.create_task(worker()) for _ in range(5)]
    for i in range(200):
        queue.add(i % 7)
        if i % 5 == 0:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.2)
    assert worked >= 7 and len(queue) == 0
    for w in workers:
        assert not w.done()
        w.cancel()
