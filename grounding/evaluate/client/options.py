"""The client's options, the URLs of endpoints, and the pauses between tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from grounding import defaults
from grounding.errors import UserError
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Engine, Sampling
from grounding.evaluate.method import Method
from grounding.runtime.access import Access


@dataclass(frozen=True)
class Options:
    """Options of the client. Times are seconds."""

    endpoints: tuple[str, ...]
    request: Request
    concurrency: int = defaults.CONCURRENCY
    """Maximum number of requests in flight over all endpoints"""
    fixed: bool = False
    """Keep `concurrency` requests in flight from the start, instead of growing to that number"""
    warm_up: int = 0
    """Number of answers at the start whose latency is not recorded"""
    first_alone: bool = True
    """Send the first question of an image alone, so that the others find the image in the server's cache"""
    attempts: int = 6
    refusals: int = 20
    """Number of answers 429 and 503 after which a question has failed"""
    timeout_s: float = 600.0
    backoff_s: float = 0.5
    """First pause between two tries; it doubles up to 30 s"""
    unreachable_s: float = 10.0
    """Stop if no endpoint accepts a connection for this time; requests in this time are not recorded as failed"""
    wait_s: float = 0.0
    """At the start, wait at least this long for the first endpoint, before any answer. Other endpoints may come up while the run continues
    """
    mixed: bool = False
    """Continue even if endpoints or existing answers report different models"""
    access: Access = field(default_factory=Access)
    """Keys and certificates for the endpoints"""
    method: Method = field(default_factory=Method)
    """The effort for each question"""
    served_by: Engine | None = None
    """The servers' engine, for features that only some have; None: unknown"""
    sampling: Sampling = field(default_factory=Sampling)
    straggler_s: float = 5.0
    """Age from which a slow request may be repeated at another endpoint, if it is also three times as old as 95 % of the others"""


def normalise(endpoint: str) -> str:
    """Return the chat completions URL of an endpoint. Raises `UserError` if it is not an http URL.

    `http://host:port`, with or without `/v1` and with any path before it; a URL that ends in `/chat/completions` is used unchanged.
    """
    url = endpoint.strip().rstrip("/")
    whole, url = url.endswith("/chat/completions"), url.removesuffix("/v1")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{endpoint!r} is not an http URL", field="--endpoint", hint="Write http://HOST:PORT.")
    if parts.username is not None:
        raise UserError(
            "a URL must not contain a user or password, because it is stored with the results", field="--endpoint"
        )
    return url if whole else url + "/v1/chat/completions"


def pause(attempt: int, asked_s: float, first_s: float, jitter: float) -> float:
    """Return the seconds to wait after try `attempt` (from 0): what the server asks for (`asked_s`) plus a pause that doubles from
    `first_s` up to 30 s. `jitter` is a random number in 0..1.
    """
    return asked_s + min(30.0, first_s * 2.0 ** min(attempt, 20)) * (0.5 + 0.5 * jitter)


def asked_pause(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header, at most 60; 0 if there is no header or it has a date, which is rare."""
    try:
        return min(60.0, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0
