"""Pictures in requests: encoded once for concurrent requests, kept within a limit, and freed once they are sent."""

import asyncio
import json
import socket
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grounding.data.images import open_images
from grounding.evaluate.client import client as client_module
from grounding.evaluate.client.client import Client
from grounding.evaluate.client.http import FairQueue, Pool
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.pictures import Pictures, Unusable
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling
from grounding.evaluate.worklist import read_worklist, settings_digest

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@given(
    st.lists(st.tuples(st.sampled_from(["fetch", "drop", "cancel"]), st.integers(0, 5)), max_size=40),
    st.integers(0, 400),
)
@settings(max_examples=60, deadline=None)
def test_every_picture_is_right_and_memory_is_bounded(steps, kept):
    async def go():
        pictures = Pictures(lambda image, row: bytes([image]) * (100 + image), kept)
        for what, image in steps:
            if what == "drop":
                pictures.drop(image)
            elif what == "cancel":
                task = asyncio.create_task(pictures.fetch(image, 0))
                await asyncio.sleep(0)
                task.cancel()
                pictures.drop(image)
            else:
                both = await asyncio.gather(pictures.fetch(image, 0), pictures.fetch(image, 1))
                assert both[0] is both[1] and both[0] == bytes([image]) * (100 + image)
            assert pictures.bytes == sum(map(len, pictures._kept.values())) <= kept
        for image in range(6):
            pictures.drop(image)
        for _ in range(3):  # a picture whose request ended while it was being encoded must not be kept either
            await asyncio.sleep(0.001)
        assert pictures.bytes == 0 and not pictures._kept

    asyncio.run(go())


def test_a_picture_that_cannot_be_made_fails_for_each_that_asks():
    def fails(image, row):
        raise Unusable("no picture")

    async def go():
        pictures = Pictures(fails)
        found = await asyncio.gather(*(pictures.fetch(0, i) for i in range(3)), return_exceptions=True)
        assert [str(e) for e in found] == ["no picture"] * 3 and not pictures._making

    asyncio.run(go())


def test_many_endpoints_share_what_is_read_ahead():
    pictures = Pictures(lambda image, row: b"")
    assert pictures.unsent(1) > 64 and pictures.unsent(8) >= 32 and pictures.unsent(100_000) == 2


async def test_a_request_that_waits_for_its_answer_holds_no_picture():
    asked, answer = asyncio.Event(), asyncio.Event()
    picture = b"p" * 3_000_000

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(picture) + 2)
        asked.set()
        await answer.wait()
        writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 16)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", FairQueue())

    async def body():
        return b"{", picture, b"}"

    before, sent = sys.getrefcount(picture), []
    task = asyncio.create_task(pool.post(body, {}, 30.0, lambda: sent.append(asked.is_set())))
    await asked.wait()
    await asyncio.sleep(0.05)
    assert len(sent) == 1 and sys.getrefcount(picture) == before
    answer.set()
    assert (await task).status == 200 and len(sent) == 1
    pool.close()
    server.close()


@pytest.mark.parametrize("fewest", [2, 3])
async def test_an_endpoint_that_reads_nothing_gets_few_questions(tmp_path, monkeypatch, fewest):
    (tmp_path / "images").mkdir()
    row = {"sent": "x", "bbox": [1, 1, 500, 500], "width": 1500, "height": 1500}
    with (tmp_path / "f.jsonl").open("w") as f:
        for i in range(12):
            Image.effect_noise((1500, 1500), 90).convert("RGB").save(tmp_path / "images" / f"{i}.png", compress_level=0)
            f.write(json.dumps(row | {"image": f"{i}.png"}) + "\n")
    images = open_images(tmp_path / "images")
    worklist = read_worklist([tmp_path / "f.jsonl"], settings_digest("m", "qwen3", Sampling()), images)
    monkeypatch.setattr(client_module.Pictures, "unsent", lambda self, endpoints: fewest)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)
        options = Options((f"http://127.0.0.1:{deaf.getsockname()[1]}",), Request("m", "qwen3"), 12, fixed=True)
        client = Client(options, worklist, images, lambda *_: None)
        task = asyncio.create_task(client.run(worklist.image.astype("int64") * 0 + range(12)))
        await asyncio.sleep(1.0)
        assert client.servers[0].active == client.servers[0].unsent == fewest
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert client._pictures.bytes == 0 and client.servers[0].unsent == 0
