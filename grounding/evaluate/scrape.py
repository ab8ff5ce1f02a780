"""Read the servers' metrics at intervals, for the live view and the summary. Failures are ignored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from grounding.evaluate.engines import Engine, Metrics
from grounding.runtime.pages import PLAIN, page

LARGEST_PAGE = 8 << 20
"""Largest page in bytes; a server with hundreds of series sends less than 1 MiB at `/metrics`"""


async def read_once(engine: Engine, endpoints: Sequence[str], readings: dict[str, Metrics], limit_s: float = 3) -> None:
    """Store the newest reading of each endpoint in `readings`. If an endpoint does not answer, remove its reading."""

    async def one(session: aiohttp.ClientSession, endpoint: str) -> None:
        url = endpoint.strip().rstrip("/").removesuffix("/v1") + "/metrics"
        try:
            async with session.get(url, allow_redirects=False) as response:
                response.raise_for_status()
                readings[endpoint] = engine.metrics((await page(response, LARGEST_PAGE)).decode())
        except (aiohttp.ClientError, TimeoutError, ValueError):  # undecodable text raises ValueError
            readings.pop(endpoint, None)

    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=limit_s), headers=PLAIN, auto_decompress=False
    ) as session:
        await asyncio.gather(*(one(session, e) for e in endpoints))


async def scrape(engine: Engine, endpoints: Sequence[str], readings: dict[str, Metrics], every_s: float = 5.0) -> None:
    """Call `read_once` every `every_s` seconds until cancelled."""
    while True:
        await read_once(engine, endpoints, readings)
        await asyncio.sleep(every_s)
