"""Check whether a server continues a message, which is required for cutting off thoughts. Some servers accept the field but ignore it.

Before the first question, the check sends two requests of one token. Both end with a message of the assistant, and one of them asks to
continue it. A server that does so omits the end of the message and the beginning of another one, so this request's prompt is shorter. If
both prompts have the same length, the server ignores the field.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import orjson

from grounding.evaluate.client.options import normalise
from grounding.evaluate.engines import Engine
from grounding.evaluate.scrape import LARGEST_PAGE
from grounding.jsontypes import Document
from grounding.runtime.access import Access
from grounding.runtime.pages import PLAIN, page

LIMIT_S = 20.0
"""Time limit in seconds for both requests; a server that does not answer in time is not judged"""
IGNORES = "ignores the request to continue a message"
_SAID = [{"role": "user", "content": "Count to three."}, {"role": "assistant", "content": "One, two,"}]


async def ignored(engine: Engine, endpoints: Sequence[str], asked_as: str | None, access: Access) -> list[str]:
    """Return a note for each endpoint that accepts the fields for continuing a message but ignores them."""
    found = await asyncio.gather(*(continues(engine, endpoint, asked_as, access) for endpoint in endpoints))
    return [
        f"{endpoint} {IGNORES}: after a cut-off thought it begins another answer, so thinking budgets do not limit its thoughts"
        for endpoint, does in zip(endpoints, found, strict=True)
        if does is False
    ]


async def continues(engine: Engine, endpoint: str, asked_as: str | None, access: Access) -> bool | None:
    """Return whether the server at `endpoint` continues a message; None if it cannot be determined."""
    body: Document = {"messages": _SAID, engine.limit_field: 1, "temperature": 0}
    if asked_as is not None:
        body["model"] = asked_as
    secure = endpoint.strip().startswith("https")
    try:
        async with (
            asyncio.timeout(LIMIT_S),
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=access.context() if secure else True),
                headers={**PLAIN, "Content-Type": "application/json", **access.headers},
                auto_decompress=False,
            ) as session,
        ):
            prompts = [await _prompt(session, endpoint, b) for b in ({**body, **engine.continues}, body)]
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None
    longer, whole = prompts
    return None if longer is None or whole is None else longer < whole


async def _prompt(session: aiohttp.ClientSession, endpoint: str, body: Document) -> int | None:
    """Return the number of tokens of a request's prompt as reported by the server; None if it reports none."""
    async with session.post(normalise(endpoint), data=orjson.dumps(body), allow_redirects=False) as response:
        try:
            count = orjson.loads(await page(response, LARGEST_PAGE))["usage"]["prompt_tokens"]
        except (aiohttp.ClientResponseError, ValueError, KeyError, TypeError):
            return None
    return count if isinstance(count, int) and not isinstance(count, bool) else None
