"""Ask a server, by its own pages, which model it serves and how many requests it works on at once. A page that cannot be read is not an
error.
"""

from __future__ import annotations

import asyncio

import aiohttp
import orjson

from grounding.evaluate.client.options import normalise
from grounding.evaluate.engines import Engine
from grounding.evaluate.scrape import LARGEST_PAGE
from grounding.evaluate.served import ServerFacts
from grounding.runtime.access import Access
from grounding.runtime.pages import PLAIN, page

LIMIT_S = 3.0
"""Time limit in seconds for all pages of a server together"""


def page_url(endpoint: str, path: str) -> str:
    """Return the URL of a page of the server at `endpoint`, in whatever form the endpoint is given."""
    base = normalise(endpoint).removesuffix("/chat/completions")
    return base.removesuffix("/v1") + path if base.endswith("/v1") else base + path.removeprefix("/v1")


async def identify(
    engine: Engine, endpoint: str, asked_as: str | None, access: Access, limit_s: float = LIMIT_S
) -> ServerFacts:
    """Return what the server at `endpoint` reports about itself and about the model named `asked_as` in requests."""
    if not engine.info_pages:
        return ServerFacts()
    pages: dict[str, object] = {}

    async def read(session: aiohttp.ClientSession, name: str, paths: tuple[str, ...]) -> None:
        for path in paths:
            try:
                async with session.get(page_url(endpoint, path), allow_redirects=False) as response:
                    pages[name] = orjson.loads(await page(response, LARGEST_PAGE))
                    return
            except (aiohttp.ClientResponseError, ValueError):  # try the next path
                continue
            except (aiohttp.ClientError, TimeoutError, OSError):
                return

    secure = endpoint.strip().startswith("https")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=access.context() if secure else True),
        timeout=aiohttp.ClientTimeout(total=limit_s),
        headers={**PLAIN, **access.headers},
        auto_decompress=False,
    ) as session:
        wanted = (read(session, name, paths) for name, paths in engine.info_pages.items())
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*wanted)
        except TimeoutError:
            pass
    return ServerFacts(engine.served(pages, asked_as), engine.slots(pages))
