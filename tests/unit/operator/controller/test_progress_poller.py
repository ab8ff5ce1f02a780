"""Pods that send arbitrary replies to `/progress`: the operator accepts only a JSON object of some kilobytes."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from egm_operator.controller import progress_poller
from egm_operator.settings import Settings

from tests.unit.operator.plan.kit import pod

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
GOOD = {"step": 3, "metrics": {f"metric{i}": i for i in range(2000)}}
"""About 40 kB, which is more than one read of a socket returns"""


async def _slowly(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    text = json.dumps(GOOD).encode()
    for start in range(0, len(text), 10_000):
        await response.write(text[start : start + 10_000])
        await asyncio.sleep(0.01)
    return response


async def _packed(_: web.Request) -> web.StreamResponse:
    return web.Response(body=gzip.compress(json.dumps(GOOD).encode()), headers={"Content-Encoding": "gzip"})


async def _large(_: web.Request) -> web.StreamResponse:
    return web.Response(text=json.dumps({"step": 1, "stage": "x" * 70_000}))


async def _deep(_: web.Request) -> web.StreamResponse:
    return web.Response(text="[" * 60_000)


async def _no_object(_: web.Request) -> web.StreamResponse:
    return web.Response(text="[1]")


async def _no_text(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b'{"step": "\xff"}')


async def _away(_: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" " * 65536)
    return response


@contextlib.asynccontextmanager
async def polled(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], Any]]:
    """Poll one pod that answers with the handler; yield the known progress after two polls."""
    asked = asyncio.Queue[str]()

    async def noted(request: web.Request) -> web.StreamResponse:
        asked.put_nowait(request.path)
        return await handler(request)

    async def elsewhere(_: web.Request) -> web.StreamResponse:
        return web.Response(text=json.dumps(GOOD))

    app = web.Application()
    app.router.add_get("/progress", noted)
    app.router.add_get("/elsewhere", elsewhere)
    async with TestServer(app) as server:
        monkeypatch.setattr(progress_poller, "PROGRESS_PORT", server.port)
        reporter = pod(master=True, podIP="127.0.0.1")
        store: Any = SimpleNamespace(jobs=lambda: iter([("k", "n", "j")]), children=lambda _: [reporter])
        poller = progress_poller.Poller(store, None, Settings(progress_seconds=0.05), lambda _: None)
        running = asyncio.create_task(poller.run())
        try:
            for _ in range(2):
                await asyncio.wait_for(asked.get(), 10)
            assert not running.done(), "one bad answer must not end the polling"
            yield lambda: poller.report([reporter])
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


async def test_an_answer_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    async with polled(_slowly, monkeypatch) as report:
        assert report() is not None and report().body == GOOD


@pytest.mark.parametrize("handler", [_packed, _large, _deep, _no_object, _no_text, _away, _endless])
async def test_anything_else_is_no_answer(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    async with polled(handler, monkeypatch) as report:
        assert report() is None
