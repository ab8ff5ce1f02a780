"""HTTP requests to the API server: authentication, a pool of connections, JSON, lines of a watch. `cluster.py` builds on it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict
from urllib.request import getproxies

import aiohttp
import orjson
from kubernetes.aio import client, config
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION

from egm_operator.kube.clock import ServerClock
from egm_operator.kube.objects import Raw
from egm_operator.kube.objects import text as text_of
from egm_operator.names import FIELD_MANAGER

_log = logging.getLogger("egm_operator")
_NETWORK = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.TimeoutError)
_REQUEST = aiohttp.ClientTimeout(total=30)
# A quiet watch gets a bookmark about every minute, so a watch without a line for longer hangs.
_WATCH = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=100)
_STUMBLES = (0.1, 0.3)
"""Seconds before the second and the third try. A reconcile sends many requests, and if one fails, all must be repeated"""
_UNKNOWN_KIND = ("could not find the requested resource", "404 page not found")
LOG = aiohttp.ClientTimeout(total=None, sock_connect=10)
"""A pod may write nothing to its log for hours"""


class _Way(TypedDict, total=False):
    """Options of aiohttp for the route to the API server: a proxy, or another name in its certificate."""

    proxy: str
    server_hostname: str


class ApiError(Exception):
    """The API server refused a request, or could not be reached (`status` 0). `after`: seconds for which it asks to wait."""

    def __init__(self, status: int, reason: str, message: str, after: float = 0.0) -> None:
        self.status, self.reason, self.message, self.after = status, reason, message, after
        super().__init__(f"{status} {reason}: {message}" if status else message)

    @property
    def final(self) -> bool:
        """Return whether the same request would get the same answer, because the object is refused (invalid, a policy, a taken name)."""
        return self.status in (400, 403, 413, 422) or self.reason == "Taken"

    @property
    def unknown_kind(self) -> bool:
        """Return whether the server does not know the kind, or its whole group. For a missing object or namespace, it has a different message."""
        return self.status == 404 and any(words in self.message for words in _UNKNOWN_KIND)

    @property
    def stumble(self) -> bool:
        """Return whether another try may succeed soon. False for 429, because a busy server must not be asked again at once."""
        return self.status in (0, 500, 502, 503, 504)


class Api:
    """A connection to one API server. The official client reads kubeconfigs and service accounts and configures TLS; this class sends the
    requests.
    """

    def __init__(self, configuration: client.Configuration) -> None:
        self._configuration = configuration
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64, ssl=RESTClientObject(configuration).ssl_context),
            headers={"User-Agent": FIELD_MANAGER, "Accept": "application/json"},
            read_bufsize=2**20,
            # the proxy, if there is one; aiohttp would search for it with each request, in a thread
            trust_env=bool(getproxies()),
        )
        self._more = _Way()
        if configuration.proxy:
            self._more["proxy"] = configuration.proxy
        if configuration.tls_server_name:
            self._more["server_hostname"] = configuration.tls_server_name
        self.clock = ServerClock()
        self.requests: dict[str, int] = {}
        self.requested: Callable[[str, str, int, float], None] = lambda *_: None
        """Called after each request with method, path, status code (0: no answer) and seconds"""

    @classmethod
    async def connect(cls) -> Api:
        """Connect with the current kubeconfig ($KUBECONFIG), or with the service account of a pod."""
        return cls(await _configuration())

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
        retry: bool = True,
    ) -> Raw:
        """Send a request with a JSON body and return the JSON answer. Repeat it if that may help; all our writes allow this. Raises `ApiError`."""
        data = orjson.dumps(body) if body is not None else None
        for pause in (*(_STUMBLES if retry else ()), None):
            begun = time.perf_counter()
            try:
                return await self._request(method, path, data, query, content)
            except ApiError as error:
                slow = time.perf_counter() - begun > 5.0  # the server hangs; let the caller decide how long to wait
                if pause is None or slow or not error.stumble:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")

    async def _request(
        self, method: str, path: str, data: bytes | None, query: Mapping[str, str] | None, content: str
    ) -> Raw:
        self.requests[method] = self.requests.get(method, 0) + 1
        for again in (True, False):
            begun, code = time.perf_counter(), 0
            try:
                async with self._session.request(
                    method,
                    self._configuration.host + path,
                    params=query,
                    data=data,
                    headers={"Content-Type": content, **await self._who()},
                    timeout=_REQUEST,
                    **self._more,
                ) as answer:
                    self.clock.heard(answer.headers.get("Date"))
                    text = await answer.read()
                    code = answer.status
            except _NETWORK as error:
                raise _unreachable(error) from None
            finally:
                self.requested(method, path, code, time.perf_counter() - begun)
            if answer.status == 401 and again:  # the token of an authentication plug-in has expired
                self._configuration.api_key = (await _configuration()).api_key
                continue
            break
        if answer.status >= 300:
            raise _refused(answer.status, text, answer.headers)
        found: Raw = orjson.loads(text) if text else {}
        return found

    async def lines(
        self, path: str, query: Mapping[str, str], limits: aiohttp.ClientTimeout = _WATCH
    ) -> AsyncIterator[bytes]:
        """Yield the lines of an answer until the server ends it, without line ends. Raises `ApiError`."""
        self.requests["WATCH"] = self.requests.get("WATCH", 0) + 1
        url = self._configuration.host + path
        try:
            async with self._session.get(
                url, params=query, headers=await self._who(), timeout=limits, **self._more
            ) as answer:
                if answer.status >= 300:
                    raise _refused(answer.status, await answer.read(), answer.headers)
                rest = b""
                async for chunk in answer.content.iter_any():
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        yield line
                if rest:
                    yield rest
        except _NETWORK as error:
            raise _unreachable(error) from None

    async def _who(self) -> dict[str, str]:
        """Return the authentication header; empty if a certificate is used."""
        found = (await self._configuration.auth_settings()).get("BearerToken")
        return {"Authorization": str(found["value"])} if found else {}


def missing_kubeconfig(location: str = KUBE_CONFIG_DEFAULT_LOCATION) -> str:
    """Return an error message if there is no kubeconfig, otherwise an empty text. The client's own error would be misleading."""
    if any(Path(file).expanduser().exists() for file in location.split(os.pathsep) if file):
        return ""
    return f"{location}: no such file" if location else "$KUBECONFIG is empty"


async def _configuration() -> client.Configuration:
    found = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=found)
    except config.ConfigException:
        if problem := missing_kubeconfig():
            raise config.ConfigException(problem) from None
        await config.load_kube_config(client_configuration=found)
    return found


def _unreachable(error: Exception) -> ApiError:
    return ApiError(0, "Unreachable", f"the API server does not answer: {str(error) or type(error).__name__}")


def _refused(status: int, body: bytes, headers: Mapping[str, str]) -> ApiError:
    wait = headers.get("Retry-After", "")
    after = min(float(wait), 60.0) if wait.isdigit() else 0.0
    try:
        said = orjson.loads(body)
        return ApiError(status, text_of(said, "reason"), text_of(said, "message"), after)
    except (orjson.JSONDecodeError, AttributeError):
        return ApiError(status, "", body.decode(errors="replace")[:300], after)
