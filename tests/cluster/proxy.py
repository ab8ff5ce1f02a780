"""A proxy between an operator and the API server, which disturbs requests as networks and busy servers do."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tests.cluster.operator_kit import Api

_HOP = {
    "host",
    "connection",
    "transfer-encoding",
    "content-length",
    "content-encoding",
    "keep-alive",
    "accept-encoding",
}


@dataclass(frozen=True)
class Fault:
    """A fault of a request: an answer with `status`, a reset before or after the server received it, or a watch that ends early."""

    kind: str
    status: int = 0
    retry_after: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}{self.status or ''}"


CONFLICT, INVALID, BUSY, BROKEN, UNAVAILABLE = (
    Fault("answer", 409),
    Fault("answer", 422),
    Fault("answer", 429, retry_after=1),
    Fault("answer", 500),
    Fault("answer", 503),
)
UNKNOWN_KIND = Fault("answer", 404)
RESET, LOST_ANSWER, CUT_WATCH, EXPIRED_WATCH = Fault("reset"), Fault("lost"), Fault("cut"), Fault("expired")
_UNKNOWN = "the server could not find the requested resource"
_REASONS = {
    404: "NotFound",
    409: "Conflict",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


class Proxy(threading.Thread):
    """A proxy with plain HTTP on loopback in front of `api`. `choose(method, path, watch)` returns the fault of a request."""

    def __init__(self, api: Api, choose: Callable[[str, str, bool], Fault | None]) -> None:
        super().__init__(daemon=True)
        self.api, self.choose = api, choose
        self.port = 0
        self.done: Counter[str] = Counter()
        """Return how often each fault has happened."""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._ending = asyncio.Event()
        self._open: dict[int, web.Request] = {}

    def __enter__(self) -> Proxy:
        self.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self.join(10)

    def cut(self) -> None:
        """Close the connection of every current request."""

        def hang_up() -> None:
            for request in list(self._open.values()):
                _hang_up(request)

        self._loop.call_soon_threadsafe(hang_up)

    def kubeconfig(self, path: Path) -> Path:
        """Return a kubeconfig for this proxy."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        path.write_text(json.dumps(config))
        return path

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        connector = aiohttp.TCPConnector(ssl=self.api.ssl, limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as self._session:
            app = web.Application(client_max_size=2**26)
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            self._ready.set()
            await self._ending.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._open[id(request)] = request
        try:
            return await self._answer(request)
        finally:
            self._open.pop(id(request), None)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        watch = request.query.get("watch") in ("1", "true")
        fault = self.choose(request.method, request.path, watch)
        if fault is not None:
            self.done[str(fault)] += 1
        if fault is not None and fault.kind == "answer":
            return _refusal(fault)
        if fault is not None and fault.kind == "reset":
            return _hang_up(request)
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        # otherwise a listing would be compressed, and its encoding would not be passed on
        headers["Accept-Encoding"] = "identity"
        url = self.api.server + request.raw_path
        try:
            async with self._session.request(request.method, url, data=body or None, headers=headers) as answer:
                if watch and answer.status == 200:
                    return await self._stream(request, answer, fault)
                data = await answer.read()
        except aiohttp.ClientError:  # the server is unreachable
            return _hang_up(request)
        if fault is not None and fault.kind == "lost":
            return _hang_up(request)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
        return web.Response(status=answer.status, body=data, headers=kept)

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        to = web.StreamResponse(headers={"Content-Type": "application/json"})
        await to.prepare(request)
        if fault is not None and fault.kind == "expired":
            await to.write(_status_line())
            return to
        until = asyncio.get_running_loop().time() + random.uniform(0.2, 2) if fault else None
        reading = answer.content.iter_any().__aiter__()
        try:
            async with asyncio.timeout_at(until):
                async for chunk in reading:
                    await to.write(chunk)
        except TimeoutError:
            return _hang_up(request)  # the connection may be cut in the middle of a line
        return to


def _hang_up(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _refusal(fault: Fault) -> web.Response:
    body: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": _REASONS[fault.status],
        "code": fault.status,
        "message": _UNKNOWN if fault is UNKNOWN_KIND else f"injected {fault.status}",
    }
    headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
    return web.json_response(body, status=fault.status, headers=headers)


def _status_line() -> bytes:
    status = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": "Expired",
        "code": 410,
        "message": "old",
    }
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
