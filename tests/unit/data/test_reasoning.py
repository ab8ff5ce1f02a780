"""`egm data reasoning` against a real HTTP server for chat completions that sometimes fails."""

import base64
import io
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.data.images import open_images
from grounding.data.reasoning import Endpoint, Rejected, accept, answers, collect, draw_box, finish, read_tasks, target
from grounding.errors import Failure, UserError
from grounding.runtime.access import Access

COUNT = 12


class Server:
    """A server whose `plan(sent, attempt)` returns (status, text, finish_reason), or None to drop the connection."""

    def __init__(self) -> None:
        self.plan: Any = lambda sent, attempt: (200, f"The {sent} stands by the wall.", "stop")
        self.attempts: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        text = body["messages"][0]["content"][1]["text"]
        sent = orjson.loads(text.split("means: ")[1].split("\n")[0])
        self.attempts[sent] += 1
        answer = self.plan(sent, self.attempts[sent])
        if answer is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        status, text, reason = answer
        if status != 200:
            return web.Response(status=status, text=text)
        return web.json_response({"choices": [{"message": {"content": text}, "finish_reason": reason}]})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    fake = Server()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", fake.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield fake
    await runner.cleanup()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "img").mkdir()
    Image.new("RGB", (200, 100), "white").save(tmp_path / "img/a.png")
    rows = []
    for i in range(COUNT):
        turns = [
            {"from": "human", "value": f'<image>\nfind <ref>"quoted" dog {i}</ref>'},
            {"from": "gpt", "value": f"<box>[{100 + i}, 200, 500, 800]</box>"},
        ]
        rows.append({"id": i, "image": "a.png", "conversations": turns})
    path = tmp_path / "rl.json"
    path.write_bytes(orjson.dumps(rows))
    return path


def quick(server: Server, **change: Any) -> Endpoint:
    return replace(
        Endpoint(
            server.url,
            "big",
            Access({"Authorization": "Bearer secret"}),
            concurrency=4,
            attempts=4,
            wait_s=0.001,
            timeout_s=5,
        ),
        **change,
    )


async def run(rows: Path, server: Server, **change: Any) -> Any:
    store = open_images(rows.parent / "img")
    return await collect(read_tasks(rows), store, rows.parent / "out.jsonl", quick(server, **change), lambda _: None)


async def test_every_row_is_asked_once_with_the_box_drawn(rows: Path, server: Server) -> None:
    outcome = await run(rows, server)
    assert (outcome.done, outcome.new, outcome.failed) == (COUNT, COUNT, [])
    assert set(server.attempts.values()) == {1} and len(server.attempts) == COUNT
    assert server.keys == {"Bearer secret"}
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("big", 800, 0.7)
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))).astype(int)
    assert picture.shape == (100, 200, 3)
    green = (picture[..., 1] - picture[..., 0] > 100) & (picture[..., 1] - picture[..., 2] > 100)
    assert green[20:23, 40:100].any() and not green[40:60, 50:90].any()


async def test_failures_are_tried_again_and_never_become_text(rows: Path, server: Server) -> None:
    troubles = [(500, "boom", ""), None, (429, "slow down", ""), (200, "", "stop"), (200, "It is in the green box.", "stop"),
                (200, "half a sent", "length")]  # fmt: skip

    def plan(sent: str, attempt: int) -> Any:
        return troubles[int(sent.split()[-1]) % 6] if attempt == 1 else (200, f"Because of {sent}.", "stop")

    server.plan = plan
    outcome = await run(rows, server)
    assert (outcome.new, outcome.failed) == (COUNT, [])
    assert set(server.attempts.values()) == {2}
    texts = answers(rows.parent / "out.jsonl").values()
    assert len(texts) == COUNT and all(t.startswith("Because of") for t in texts)


async def test_a_server_that_is_gone_is_reported_while_its_requests_are_repeated(rows: Path, server: Server) -> None:
    said: list[str] = []
    endpoint = quick(
        server, url="http://127.0.0.1:9/v1", concurrency=64
    )  # more at once than rows, so that all are tried
    outcome = await collect(
        read_tasks(rows),
        open_images(rows.parent / "img"),
        rows.parent / "o.jsonl",
        endpoint,
        lambda _: None,
        said.append,
    )
    reason = "cannot connect to 127.0.0.1:9: Connection refused"
    assert said == [f"0 new answers; a request failed and is sent again (try 1 of 4): {reason}"]
    assert {text for _, text in outcome.failed} == {reason} and len(outcome.failed) == COUNT


async def test_rows_that_keep_failing_are_named_and_asked_again_next_time(rows: Path, server: Server) -> None:
    server.plan = lambda sent, attempt: (500, "boom", "") if sent.endswith("dog 3") else (200, "Fine.", "stop")
    outcome = await run(rows, server)
    assert outcome.new == COUNT - 1
    assert [(number, "HTTP 500" in reason) for number, reason in outcome.failed] == [(4, True)]
    assert b"boom" not in (rows.parent / "out.jsonl").read_bytes()

    server.attempts.clear()
    server.plan = lambda sent, attempt: (200, "Now.", "stop")
    outcome = await run(rows, server)
    assert (outcome.done, outcome.new) == (COUNT, 1)
    assert list(server.attempts) == ['"quoted" dog 3']


async def test_a_line_cut_by_a_crash_is_asked_again(rows: Path, server: Server) -> None:
    await run(rows, server)
    out = rows.parent / "out.jsonl"
    out.write_bytes(out.read_bytes()[:-9])
    server.attempts.clear()
    outcome = await run(rows, server)
    assert (outcome.done, outcome.new, len(answers(out))) == (COUNT, 1, COUNT)


async def test_a_dead_endpoint_ends_the_run_and_keeps_what_is_there(rows: Path, server: Server) -> None:
    server.plan = lambda sent, attempt: (503, "gone", "") if len(server.attempts) > 3 else (200, "Fine.", "stop")
    with pytest.raises(Failure, match="8 requests in a row failed") as caught:
        await run(rows, server, attempts=1, concurrency=1)
    assert "same command again to continue" in caught.value.hint
    assert len(answers(rows.parent / "out.jsonl")) == 3


async def test_a_refused_key_stops_at_once(rows: Path, server: Server) -> None:
    server.plan = lambda sent, attempt: (401, "who are you", "")
    with pytest.raises(UserError, match="answered 401"):
        await run(rows, server, concurrency=1)
    assert sum(server.attempts.values()) == 1


async def test_the_sft_file_is_in_task_order_with_escaped_labels(rows: Path, server: Server) -> None:
    await run(rows, server)
    sft = rows.parent / "out.sft.json"
    store = open_images(rows.parent / "img")
    assert finish(read_tasks(rows), store, rows.parent / "out.jsonl", sft) == COUNT
    made = orjson.loads(sft.read_bytes())
    assert [r["id"] for r in made] == [str(i) for i in range(COUNT)]
    assert (made[0]["width"], made[0]["height"]) == (200, 100)
    assert made[2]["conversations"][0]["value"] == (
        '<image>\nLocate "quoted" dog 2, output its bbox coordinates using JSON format.'
    )
    thought, answer = made[2]["conversations"][1]["value"].split("\n</think>\n\n")
    assert thought == 'The "quoted" dog 2 stands by the wall.'
    listing = answer.removeprefix("```json\n").removesuffix("\n```")
    assert orjson.loads(listing) == [{"bbox_2d": [102, 200, 500, 800], "label": '"quoted" dog 2'}]


def test_nothing_to_finish_is_an_error(rows: Path) -> None:
    with pytest.raises(UserError, match="no answer"):
        finish(read_tasks(rows), open_images(rows.parent / "img"), rows.parent / "out.jsonl", rows.parent / "x.json")


@given(st.text(min_size=1, max_size=40))
def test_any_label_survives(label: str) -> None:
    fenced = target("Because.", label, (1, 2, 3, 4)).split("```json\n")[1].removesuffix("\n```")
    assert orjson.loads(fenced) == [{"bbox_2d": [1, 2, 3, 4], "label": label}]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "see the green box",
        "the green bounding box",
        "a Ground Truth",
        "the highlighted region",
        "ok ```json",
        "<think>hm",
        None,
        5,
    ],
)
def test_answers_that_give_the_hint_away_are_refused(text: object) -> None:
    with pytest.raises(Rejected):
        accept(text, "stop")


def test_honest_answers_pass() -> None:
    assert accept("hm</think>\n The man in the green shirt\nby the green door. ", "stop") == (
        "The man in the green shirt by the green door."
    )
    with pytest.raises(Rejected, match="cut off"):
        accept("The man in", "length")


def test_a_reversed_box_is_drawn_all_the_same() -> None:
    buffer = io.BytesIO()
    Image.new("L", (50, 50)).save(buffer, "PNG")
    assert Image.open(io.BytesIO(draw_box(buffer.getvalue(), (900, 800, 100, 200)))).size == (50, 50)


def test_the_list_is_written_over_several_lines_with_a_tab() -> None:
    """The reference's converter and Qwen3-VL itself write the list in this form."""
    assert target("Because.", "a dog", (1.0, 2.4, 3.0, 4.6)) == (
        'Because.\n</think>\n\n```json\n[\n\t{"bbox_2d": [1, 2, 3, 5], "label": "a dog"}\n]\n```'
    )
