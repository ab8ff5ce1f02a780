"""Faults of servers: no question is lost or counted as wrong, each has one row in the result, and healthy servers take over."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter

import pytest
from misbehaving import ANSWER, BYTES, THEN_CLOSE, Misbehaving
from PIL import Image

from grounding.errors import Failure
from grounding.evaluate.client.http import Broken, FairQueue, Pool, Unreachable
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run

IMAGES, ROWS = 40, 240


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "images").mkdir()
    for i in range(IMAGES):
        Image.new("RGB", (100, 80), (5 * i, 10, 10)).save(folder / "images" / f"{i}.png")
    box = {"bbox": [10, 8, 50.5, 48], "width": 100, "height": 80}
    rows = [{"image": f"{i % IMAGES}.png", "sent": f"thing {i}"} | box for i in range(ROWS)]
    (folder / "refcoco_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def servers():
    made = []

    def make(*plans, **more):
        for p in plans or [lambda n, q: "good"]:
            made.append(Misbehaving(p, **more))
        return made[-len(plans or [0]) :]

    yield make
    for server in made:
        server.close()


def evaluate(data, out, *urls, retry_errors=False, **changes):
    request = Request("m", "qwen3", get_engine("sglang").request_extras(Sampling()))
    usual = {
        "concurrency": 12,
        "attempts": 4,
        "backoff_s": 0.01,
        "timeout_s": 0.6,
        "unreachable_s": 0.5,
        "straggler_s": 0.3,
    }
    client = Options(urls, request, **usual | changes)
    e = Evaluation((data / "refcoco_val.jsonl",), (data / "images",), out, "m", client, retry_errors=retry_errors)
    return run(e, plan(e))


def whole(summary, out):
    """Check that every question has exactly one stored row, and that the row is an answer."""
    stored = Counter(r["line"] for r in read_rows(out))
    assert stored == Counter(range(1, ROWS + 1))
    assert (summary.done, summary.errors, summary.unparsed, summary.macro) == (ROWS, 0, 0, 1.0)


HARMLESS = ("chunked", "early hints", "says close", "to the end", "answers, then closes")
MISCHIEF = [*(k for k in BYTES if k != "good"), *THEN_CLOSE, "reset", "hang", "drip"]


@pytest.mark.parametrize("mischief", MISCHIEF)
def test_one_of_three_servers_goes_bad_for_good(data, tmp_path, servers, mischief):
    bad, *good = servers(lambda n, q: mischief if n >= 20 else "good", lambda n, q: "good", lambda n, q: "good")
    for server in good:  # slow, so that the bad server gets questions too
        server.delay = 0.005
    summary = evaluate(data, tmp_path, bad.url, *(s.url for s in good))
    whole(summary, tmp_path)
    assert bad.count > 20
    if mischief not in HARMLESS:
        assert all(s.count > 40 for s in good)


@pytest.mark.parametrize("mischief", [m for m in MISCHIEF if m not in ("drip", "404")])
def test_a_lone_server_has_a_bad_spell(data, tmp_path, servers, mischief):
    (server,) = servers(lambda n, q: mischief if 30 <= n < 36 else "good")
    whole(evaluate(data, tmp_path, server.url, timeout_s=0.3), tmp_path)


def test_a_server_is_killed_with_questions_on_their_way(data, tmp_path, servers):
    victim, other = servers(lambda n, q: "good", lambda n, q: "good")
    victim.delay = other.delay = 0.01
    threading.Thread(target=lambda: (wait_for(lambda: victim.count > 40), victim.kill())).start()
    whole(evaluate(data, tmp_path, victim.url, other.url), tmp_path)
    repeated = sum((victim.asked + other.asked).values()) - ROWS
    assert 0 <= repeated <= 12 + 6  # at most the requests in flight, and those repeated at the end


def test_all_servers_go_and_come_back(data, tmp_path, servers):
    first, second = servers(lambda n, q: "good", lambda n, q: "good")
    first.delay = second.delay = 0.01
    back = []

    def outage():
        wait_for(lambda: first.count + second.count > 60)
        first.kill(), second.kill()
        time.sleep(0.7)
        back.extend(servers(lambda n, q: "good", port=first.port))

    thread = threading.Thread(target=outage)
    thread.start()
    whole(evaluate(data, tmp_path, first.url, second.url, unreachable_s=5.0), tmp_path)
    thread.join()
    assert back[0].count > 100


def test_servers_that_are_still_to_come(data, tmp_path, servers):
    ports = [free_port() for _ in range(3)]  # the third server never starts
    late = []

    def start():
        for port in ports[:2]:
            time.sleep(0.8)
            late.extend(servers(lambda n, q: "good", port=port))
            # slow until both servers have answered, because the client may find the second one late
            late[-1].delay = 1.0
        wait_for(lambda: late[1].count)
        for server in late:
            server.delay = 0.01

    thread = threading.Thread(target=start)
    thread.start()
    urls = [f"http://127.0.0.1:{p}" for p in ports]
    whole(evaluate(data, tmp_path, *urls, unreachable_s=0.3, wait_s=20.0, concurrency=6), tmp_path)
    thread.join()
    assert late[0].count and late[1].count


def test_an_endpoint_that_never_accepts(data, tmp_path, servers):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        (good,) = servers()
        whole(evaluate(data, tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}", good.url), tmp_path)


def test_retry_after_is_obeyed_also_by_what_was_on_its_way(data, tmp_path, servers):
    (server,) = servers(lambda n, q: "good")
    said = []

    def busy(n, q):
        if n == 20:
            said.append(time.monotonic())
            return "wait"
        return "good"

    BYTES["wait"] = b"HTTP/1.1 429 X\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"
    server.plan, server.delay = busy, 0.02
    whole(evaluate(data, tmp_path, server.url), tmp_path)
    del BYTES["wait"]
    assert not [t for t in server.at if said[0] + 0.1 < t < said[0] + 0.9]


def test_a_flood_of_429_begins_no_more_than_it_can_hold(data, tmp_path, servers):
    (server,) = servers(lambda n, q: "429")
    with pytest.raises(Failure, match="many questions in a row have failed: HTTP 429"):
        evaluate(data, tmp_path, server.url, backoff_s=0.05, refusals=4)
    assert len(server.images) <= 16 + 12 + 8  # at most those that wait, are in flight or were given up
    assert sum(1 for _ in read_rows(tmp_path)) < 8


def test_a_server_that_breaks_for_good_stops_the_run_and_costs_few_rows(data, tmp_path, servers):
    (server,) = servers(lambda n, q: "500" if n >= 40 else "good")
    with pytest.raises(Failure, match=r"no endpoint answers.*HTTP 500: no"):
        evaluate(data, tmp_path, server.url, attempts=40, unreachable_s=0.2)
    assert [r for r in read_rows(tmp_path) if r["outcome"] == "error"] == []
    server.plan = lambda n, q: "good"
    whole(evaluate(data, tmp_path, server.url), tmp_path)


def test_a_poisonous_question_is_given_up_and_no_other(data, tmp_path, servers):
    (server,) = servers(lambda n, q: "reset" if "thing 77," in q else "good")
    summary = evaluate(data, tmp_path, server.url)
    assert (summary.done, summary.errors, summary.macro) == (ROWS - 1, 1, None)
    (lost,) = [r for r in read_rows(tmp_path) if r["outcome"] == "error"]
    assert lost["sent"] == "thing 77" and lost["iou"] is None and "4 tries" in lost["error"]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- only the HTTP client ----
def body(question="x", size=1000):
    picture = b"p" * size
    head = b'{"messages":[{"content":[{"image_url":{"url":"'
    return [head, picture, b'"}},{"text":"' + question.encode() + b'"}]}]}']


async def ask(pool, count=1, timeout_s=5.0, size=1000):
    async def made():
        return body(size=size)

    return [await pool.post(made, {"X-Test": "1"}, timeout_s) for _ in range(count)]


@pytest.mark.parametrize("form", ["good", "chunked", "early hints", "says close", "to the end", "answers, then closes"])
async def test_every_form_of_an_answer_is_read(servers, form):
    (server,) = servers(lambda n, q: form)
    pool = Pool(server.url + "/v1", FairQueue())
    answers = await ask(pool, 3, size=3_000_000)
    pool.close()
    assert [(a.status, a.body) for a in answers] == [(200, ANSWER)] * 3 and all(a.latency_s > 0 for a in answers)
    assert server.connections == (1 if form in ("good", "chunked", "early hints") else 3)


@pytest.mark.parametrize("form", ["half", "half chunked", "half a head", "closes", "not http", "reset"])
async def test_what_is_no_whole_answer_is_broken(servers, form):
    (server,) = servers(lambda n, q: form)
    pool = Pool(server.url, FairQueue())
    with pytest.raises(Broken):
        await ask(pool)
    pool.close()


async def test_a_kept_connection_that_the_server_closed_is_replaced(servers):
    (server,) = servers(lambda n, q: "closes" if n == 1 else "good")
    pool = Pool(server.url, FairQueue())
    assert [a.status for a in await ask(pool, 2)] == [200, 200]
    pool.close()
    assert server.count == 3 and server.connections == 2


async def test_the_deadline_is_of_the_whole_and_closes_the_connection(servers):
    (server,) = servers(lambda n, q: "drip")
    pool = Pool(server.url, FairQueue())
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        await ask(pool, timeout_s=0.4)
    assert time.monotonic() - start < 3.0 and not pool._idle
    await asyncio.sleep(0.05)
    assert not pool._all
    pool.close()


async def test_no_connection_is_no_answer():
    with pytest.raises(Unreachable, match="refused"):
        await ask(Pool(f"http://127.0.0.1:{free_port()}", FairQueue()))
    with pytest.raises(Unreachable):
        await ask(Pool("http://no-such-host.invalid:80", FairQueue()))


async def test_a_cancelled_request_leaves_no_answer_behind(servers):
    (server,) = servers(lambda n, q: "good")
    server.delay = 0.2
    pool = Pool(server.url, FairQueue())
    task = asyncio.create_task(ask(pool))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [a.body for a in await ask(pool)] == [ANSWER] and server.connections == 2
    pool.close()
