"""The Lease: only one of several replicas holds it, and its work ends before that of another begins."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import pytest
from egm_operator.kube.client import ApiError
from egm_operator.kube.leader import Lease, lead
from egm_operator.settings import Settings


class Server:
    """An API server with one Lease that can become unreachable."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version, self.gone = 0, False

    async def request(
        self, method: str, path: str, *, body: Any = None, query: Mapping[str, str] | None = None, content: str = ""
    ) -> Any:
        await asyncio.sleep(0)
        if self.gone:
            raise ApiError(0, "Unreachable", "no")
        if method == "GET":
            if self.lease is None:
                raise ApiError(404, "NotFound", "no")
            return self.lease
        if method == "POST" and self.lease is not None:
            raise ApiError(409, "AlreadyExists", "no")
        if method == "PUT" and body["metadata"]["resourceVersion"] != str(self.version):
            raise ApiError(409, "Conflict", "no")
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        return self.lease


def _lease(server: Server, name: str, clock: list[float]) -> Lease:
    return Lease(server, "n", Settings(identity=name, lease_seconds=15), lambda: clock[0])  # type: ignore[arg-type]


async def test_one_holds_it_until_it_stops_renewing() -> None:
    server, clock = Server(), [0.0]
    one, two = _lease(server, "one", clock), _lease(server, "two", clock)
    assert await one.hold() and not await two.hold()
    for _ in range(5):
        clock[0] += 10
        assert await one.hold() and not await two.hold()
    clock[0] += 14
    assert not await two.hold()
    clock[0] += 2
    assert await two.hold() and not await one.hold()
    assert server.lease is not None and server.lease["spec"]["leaseTransitions"] == 1


async def test_of_two_takers_one_wins() -> None:
    server, clock = Server(), [0.0]
    takers = [_lease(server, str(i), clock) for i in range(5)]
    assert sum(await asyncio.gather(*(t.hold() for t in takers))) == 1


async def test_given_back_it_is_free_at_once() -> None:
    server, clock = Server(), [0.0]
    one, two = _lease(server, "one", clock), _lease(server, "two", clock)
    await one.hold()
    await two.hold()
    await one.release()
    assert await two.hold()


async def test_work_ends_while_the_lease_cannot_be_renewed_and_before_it_is_over() -> None:
    server = Server()
    loop = asyncio.get_running_loop()
    lease = Lease(server, "n", Settings(identity="one", lease_seconds=2), loop.time)  # type: ignore[arg-type]
    working, ended, ended_at = asyncio.Event(), asyncio.Event(), 0.0

    async def work() -> None:
        nonlocal ended_at
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended_at = loop.time()
            ended.set()

    task = asyncio.create_task(lead(lease, work))
    await working.wait()
    server.gone = True
    await ended.wait()
    assert ended_at < lease.renewed_at + 2
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_work_that_fails_is_seen() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await lead(Lease(Server(), "n", Settings(identity="one")), work)  # type: ignore[arg-type]
