"""Pages of other processes (metrics, progress), read within bounds: who answers may be anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

PLAIN = {"Accept-Encoding": "identity"}
"""Headers of a request for a page; its session must not unpack by itself (`auto_decompress=False`)"""


async def page(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return a page of at most `most` bytes, which nothing is unpacked from: 1 MB of gzip can hold a gigabyte. Raises `ValueError`."""
    if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("no plain page")
    pieces, size = [], 0
    async for piece in response.content.iter_chunked(1 << 16):
        size += len(piece)
        if size > most:
            raise ValueError(f"a page of more than {most:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)
