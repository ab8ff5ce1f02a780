"""Reading a metrics page is limited: no decompression, no endless body, no redirect to another host."""

import zlib

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from grounding.evaluate import scrape
from grounding.evaluate.engines import Metrics, get_engine

PAGE = 'sglang:num_running_reqs{model_name="m"} 3.0\n'


async def read(handler):
    app = web.Application()
    app.router.add_get("/metrics", handler)
    app.router.add_get("/elsewhere", _plain)
    found = {}
    async with TestServer(app) as server:
        await scrape.read_once(get_engine("sglang"), [str(server.make_url("/v1"))], found)
    return list(found.values())


async def _plain(_):
    return web.Response(text=PAGE)


async def _redirect(_):
    raise web.HTTPFound("/elsewhere")


async def _packed(_):
    return web.Response(body=zlib.compress(b"#" * (64 << 20)), headers={"Content-Encoding": "deflate"})


async def _endless(_):
    return web.Response(text="# a comment that is repeated\n" * 400_000)


async def test_a_plain_page_is_read():
    async def handler(request):
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(text=PAGE)

    assert [m.running for m in await read(handler)] == [3.0]


@pytest.mark.parametrize("handler", [_redirect, _packed, _endless])
async def test_anything_else_is_no_reading(handler):
    assert await read(handler) == []


def test_metrics_have_a_type():
    assert isinstance(get_engine("sglang").metrics(PAGE), Metrics)
