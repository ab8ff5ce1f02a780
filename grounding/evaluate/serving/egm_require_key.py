"""Require a job's key: every request to its servers, except for health and metrics, must contain it.

A separate file that imports only the standard library, because engines load it in environments without this package. The key is passed in
the environment, so that no process list shows it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VARIABLE = "EGM_API_KEY"
OPEN = frozenset({"/health", "/metrics"})
"""Paths that need no key, because the kubelet's probes and Prometheus read them"""

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class Key(str):
    """A key whose `repr` does not show it, because SGLang logs all its arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return a text without the key, for logs."""
        return "'(hidden)'"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickle the key as a plain string, for other processes."""
        return str, (str(self),)


def key_of_process() -> Key:
    """Return this process's key. Raises `RuntimeError` if there is none, because the server must not start without a key."""
    key = os.environ.get(VARIABLE, "").strip()
    if not key:
        raise RuntimeError(f"{VARIABLE} is not set")
    return Key(key)


class RequireKey:
    """ASGI middleware that refuses requests without the key, with status 401."""

    def __init__(self, app: _App) -> None:
        self._app, self._expected = app, f"Bearer {key_of_process()}".encode()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "lifespan" or self._allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": {"message": "the key of this server is missing or wrong", "code": 401}}'
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _allowed(self, scope: _Scope) -> bool:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"].rstrip("/") in OPEN:
            return True
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)
