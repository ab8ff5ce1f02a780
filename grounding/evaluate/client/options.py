"""How to ask: the options of the client, and what endpoints and pauses are."""

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
    """How to ask. Times are seconds."""

    endpoints: tuple[str, ...]
    request: Request
    concurrency: int = defaults.CONCURRENCY
    """Requests in flight over all endpoints, at most"""
    fixed: bool = False
    """Keep that many in flight from the start, instead of growing to it"""
    warm_up: int = 0
    """So many first answers are kept without their latency"""
    first_alone: bool = True
    """The first question of an image ahead of its siblings, which then find the image in the server's cache"""
    attempts: int = 6
    refusals: int = 20
    """Answers of 429 and 503 that one question bears before it counts as failed"""
    timeout_s: float = 600.0
    backoff_s: float = 0.5
    """The first pause between tries; it doubles up to 30 s"""
    unreachable_s: float = 10.0
    """Stop when no endpoint took a connection for so long; what was asked meanwhile is not recorded as failed"""
    wait_s: float = 0.0
    """At the start, before any answer, wait at least so long for the first endpoint; endpoints may come up while the run continues"""
    mixed: bool = False
    """Go on although endpoints, or the answers that are there already, say that they are of different models"""
    access: Access = field(default_factory=Access)
    """Keys and certificates"""
    method: Method = field(default_factory=Method)
    """How much is spent on a question"""
    served_by: Engine | None = None
    """What the servers are, for what only some of them can do; None: nothing is known"""
    sampling: Sampling = field(default_factory=Sampling)
    straggler_s: float = 5.0
    """Nothing is asked twice before a request is so old, and three times as old as 95 % of the others"""


def normalise(endpoint: str) -> str:
    """Return the chat completions URL of an endpoint. Raises `UserError` for what is no http URL.

    `http://host:port`, with or without `/v1` and with any path before it; a URL that ends in `/chat/completions` is taken as it is.
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
            "a URL with a user or password is not taken: it would be written down with the results", field="--endpoint"
        )
    return url if whole else url + "/v1/chat/completions"


def pause(attempt: int, asked_s: float, first_s: float, jitter: float) -> float:
    """Seconds to wait after try `attempt` (from 0): what the server asks for, and doubling to 30 more. `jitter` is 0..1."""
    return asked_s + min(30.0, first_s * 2.0 ** min(attempt, 20)) * (0.5 + 0.5 * jitter)


def asked_pause(retry_after: str | None) -> float:
    """Seconds of a Retry-After header, 60 at most; 0 for none and for a date, which is rare: there the doubling will do."""
    try:
        return min(60.0, max(0.0, float(retry_after or 0)))
    except ValueError:
        return 0.0
