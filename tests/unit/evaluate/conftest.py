"""A real server on loopback with programmed faults, and a small evaluation set."""

import asyncio
import json
import threading

import pytest
from aiohttp import web
from PIL import Image


class Server:
    """A server whose box depends only on the question. `plan(n, body)` returns the fault of request n, or None."""

    def __init__(self):
        self.count, self.plan, self.bodies, self.delay = 0, lambda n, body: None, [], 0.0
        self.metrics = lambda: ""
        self.pages, self.seen = {}, []
        """Path -> the reply to a GET: JSON, or a status; and the requested paths with their headers"""
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def _serve(self, ready):
        asyncio.set_event_loop(self._loop)

        async def up():
            app = web.Application(client_max_size=1 << 26)
            app.router.add_post("/v1/chat/completions", self._answer)
            app.router.add_get("/metrics", self._metrics)
            app.router.add_get("/{path:.*}", self._page)
            self.runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            ready.set()

        self._loop.run_until_complete(up())
        self._loop.run_forever()

    async def _metrics(self, request):
        return web.Response(text=text) if (text := self.metrics()) else web.Response(status=404)

    async def _page(self, request):
        self.seen.append((request.path, dict(request.headers)))
        page = self.pages.get(request.path, 404)
        if page == "hang":
            await asyncio.sleep(30)
        if isinstance(page, int | str):
            return web.Response(status=page if isinstance(page, int) else 200, text=str(page))
        return web.json_response(page)

    async def _answer(self, request):
        body = await request.json()
        n, self.count = self.count, self.count + 1
        self.bodies.append(body)
        if self.delay:
            await asyncio.sleep(self.delay)
        mischief = self.plan(n, body)
        if isinstance(mischief, dict):  # the test defines the reply
            return web.json_response(mischief)
        if mischief == "garbage":
            return web.Response(text="<html>hello</html>")
        if mischief == "empty":
            return web.json_response({"choices": []})
        if mischief == 429:
            return web.Response(status=429, headers={"Retry-After": "0.05"}, text="busy")
        if isinstance(mischief, int):
            return web.Response(status=mischief, text="no")
        if mischief == "half":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices"')
            request.transport.close()
            return response
        if mischief == "hang":
            await asyncio.sleep(30)
        question = body["messages"][0]["content"][1]["text"]
        number = int("".join(c for c in question if c.isdigit()) or 0)
        box = [100, 100, 500 + 60 * (number % 10), 600]
        text = "no idea" if mischief == "unparsed" else json.dumps([{"bbox_2d": box, "label": "x"}])
        finish = "length" if mischief == "truncated" else "stop"
        return web.json_response(
            {
                "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 5},
            }
        )

    def close(self):
        async def down():
            await self.runner.cleanup()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:  # end the requests that hang
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(down(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def dataset(tmp_path):
    """Two files of 24 rows each over 6 PNG images that are named .jpg, 100 x 80 pixels."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.new("RGB", (100, 80), (40 * i, 10, 10)).save(images / f"{i}.jpg", format="PNG")
    for name in ("refcoco_val", "refcoco+_testA"):
        rows = [
            {"image": f"/{i % 6}.jpg", "sent": f"thing {i}", "bbox": [10, 8, 50.5, 48], "width": 100, "height": 80}
            for i in range(24)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path
