"""Read pages of other processes (metrics, progress) with a size limit, because the responder may not be trustworthy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

PLAIN = {"Accept-Encoding": "identity"}
"""Headers of a request for a page; its session must not decompress responses (`auto_decompress=False`)"""


async def page(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return a page of at most `most` bytes. Raises `ValueError` for a compressed page, because 1 MB of gzip can expand to a gigabyte."""
    if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("the page is compressed")
    pieces, size = [], 0
    async for piece in response.content.iter_chunked(1 << 16):
        size += len(piece)
        if size > most:
            raise ValueError(f"the page has more than {most:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)
