"""Watch the API server for the benchmark: one connection pool, one watch per kind, and the time at which each mark of an object was first seen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import orjson
from operator_kit import Api

Marks = dict[str, dict[str, float]]
"""Name of an object -> mark -> monotonic seconds"""


class Server:
    """An asynchronous client of the API server."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=api.ssl, limit=64), headers={"User-Agent": "bench"}, read_bufsize=2**21
        )

    async def aclose(self) -> None:
        await self._session.close()

    async def request(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """Send and receive JSON. Any response except success ends the benchmark."""
        data = orjson.dumps(body) if body is not None else None
        headers = {"Content-Type": content}
        async with self._session.request(method, self.api.server + path, data=data, headers=headers) as answer:
            text = await answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
            return orjson.loads(text)

    async def lines(self, path: str) -> Any:
        """Yield the lines of a watch until the server ends it."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        async with self._session.get(self.api.server + path, timeout=timeout) as answer:
            rest = b""
            async for chunk in answer.content.iter_any():
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line


def phase(obj: Mapping[str, Any]) -> list[str]:
    """Return the phase of a job or a pod, as a mark."""
    found = (obj.get("status") or {}).get("phase")
    return [found.lower()] if found else []


def conditions(obj: Mapping[str, Any]) -> list[str]:
    """Return the types of the conditions that are true, as marks."""
    return [c["type"].lower() for c in (obj.get("status") or {}).get("conditions") or [] if c["status"] == "True"]


class Watch:
    """Records when each object was first seen, and when each of its marks was first seen."""

    def __init__(
        self,
        server: Server,
        kind: str,
        namespace: str,
        marks: Callable[[Mapping[str, Any]], list[str]],
        query: str = "",
    ) -> None:
        self.server, self.path, self.query, self.marks = server, server.api.path(kind, namespace), query, marks
        self.seen: Marks = {}
        self.counts: dict[str, int] = {}

    async def begin(self) -> asyncio.Task[None]:
        """List the objects, then watch in the background."""
        listed = await self.server.request("GET", f"{self.path}?limit=1{self.query}")
        return asyncio.create_task(self._follow(listed["metadata"]["resourceVersion"]))

    async def _follow(self, version: str) -> None:
        while True:
            path = f"{self.path}?watch=1&timeoutSeconds=3000&resourceVersion={version}{self.query}"
            with contextlib.suppress(aiohttp.ClientError):
                async for line in self.server.lines(path):
                    if not line:
                        continue
                    now = time.monotonic()
                    obj = orjson.loads(line)["object"]
                    version = obj["metadata"]["resourceVersion"]
                    marks = self.seen.setdefault(obj["metadata"]["name"], {})
                    for mark in ["there", *self.marks(obj)]:
                        if mark not in marks:
                            marks[mark] = now
                            self.counts[mark] = self.counts.get(mark, 0) + 1

    async def until(self, mark: str, count: int, seconds: float) -> float:
        """Return the time (monotonic) at which the `count`-th object got this mark. Fails after `seconds`."""
        end = time.monotonic() + seconds
        while self.counts.get(mark, 0) < count:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{self.counts.get(mark, 0)} of {count} {self.path} are {mark} after {seconds:.0f} s"
                )
            await asyncio.sleep(0.05)
        return max(m[mark] for m in self.seen.values() if mark in m)
