"""A table of unusual servers: their replies, and the required results. They use real HTTP over loopback.

Three questions are asked. Two get a good answer; the third gets the reply in the table, once or always. Thus a table
row is about one question, and the others show that the run itself is not affected. Add a row here first if you find a
new kind of reply.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from odd_server import CLOSE, HANG, RESET, OddServer, head, http
from PIL import Image

from grounding.errors import UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.results.reader import read_answers
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run

RIGHT, WRONG = '[{"bbox_2d": [100, 100, 505, 600]}]', '[{"bbox_2d": [600, 600, 900, 900]}]'
ROOT = {"width": 100, "height": 80, "bbox": [10, 8, 50.5, 48], "image": "0.png"}


def completion(content=RIGHT, finish="stop", usage=None, message=None, **more):
    said = {"role": "assistant", "content": content, **(message or {})}
    counts = {"prompt_tokens": 7, "completion_tokens": 5} if usage is None else usage
    return {"model": "m", "choices": [{"index": 0, "message": said, "finish_reason": finish}], "usage": counts} | more


def raw(*changes, **kinds):
    """Return a good completion as text, with replacements."""
    text = json.dumps(completion(**kinds))
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


GOOD = http(completion())
TEXT = json.dumps(completion()).encode()
CHUNKS = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (TEXT[:7], TEXT[7:90], TEXT[90:]))
CHUNKED = head(200, None, "application/json", "Transfer-Encoding: chunked")
LONG = "a long thought " * 3000
GIVEN_UP, ENDED = {"partial": RIGHT, "text": None}, "the server ended 1 of 3 requests (33.33 %) by "


class Odd(NamedTuple):
    """The reply to the third question, and the row that it must have."""

    sends: Any
    outcome: str = "ok"
    correct: bool = True
    says: str = ""
    """Part of the row's error"""
    asked: int = 1
    """Number of requests: two if a second try may help"""
    row: Mapping[str, Any] = MappingProxyType({})
    note: str = ""
    """Part of the summary's notes"""
    unseen: int = 0
    """Further requests that do not count as tries: an idle connection may have been closed"""


def wrong(sends, outcome, **more):
    return Odd(sends, outcome, False, **more)


def retried(sends, says, **more):
    """Return a case without an answer, which is asked again: a good second reply answers it, a second bad one makes an error row."""
    return Odd(sends, "error", False, says, asked=2, **more)


def refused(status, body="no", says="", kind="application/json"):
    """Return a case in which the server refuses the question, so that there is no second try."""
    return Odd(http(body, status, kind), "error", False, says or f"HTTP {status}")


ANSWERS = {
    # ends of an answer
    "stop": Odd(GOOD),
    "length, with a box": Odd(http(completion(finish="length")), "truncated"),
    "length, without a box": wrong(http(completion(LONG, "length")), "truncated"),
    "length, with nothing": wrong(http(completion("", "length")), "truncated"),
    "length, in the thought": wrong(
        http(completion(None, "length", message={"reasoning": LONG})), "truncated", note="reasoning-parser"
    ),
    # contents of an answer
    "a wrong box": wrong(http(completion(WRONG)), "ok"),
    "prose": wrong(http(completion("It is on the left.")), "unparsed"),
    "nothing": wrong(http(completion("")), "empty"),
    "blanks": wrong(http(completion(" \n\t")), "empty"),
    "null": wrong(http(completion(None)), "empty", row={"text": ""}),
    "no content at all": wrong(http(raw(('"content": ' + json.dumps(RIGHT), '"x": 1'))), "empty"),
    "a refusal": wrong(http(completion(None, message={"refusal": "I cannot help."})), "empty"),
    "parts": Odd(http(completion([{"type": "text", "text": RIGHT[:9]}, {"type": "text", "text": RIGHT[9:]}]))),
    "texts": Odd(http(completion([RIGHT]))),
    "a part that is a picture": Odd(http(completion([{"type": "image_url", "image_url": {}}, {"text": RIGHT}]))),
    "an empty list": wrong(http(completion([])), "empty"),
    "reasoning_content alone": Odd(
        http(completion(None, message={"reasoning_content": RIGHT})), row={"reasoning": RIGHT}, note="reasoning-parser"
    ),
    "reasoning alone": Odd(http(completion(None, message={"reasoning": RIGHT})), note="reasoning-parser"),
    "thinking alone": Odd(http(completion("", message={"thinking": RIGHT})), note="reasoning-parser"),
    "reasoning_details alone": Odd(
        http(completion(None, message={"reasoning_details": [{"type": "reasoning.text", "text": RIGHT}]})),
        note="reasoning-parser",
    ),
    "a thought and an answer": Odd(
        http(completion(RIGHT, message={"reasoning_content": WRONG})), row={"reasoning": WRONG, "text": RIGHT}
    ),
    "a thought that is a number": Odd(
        http(completion(RIGHT, message={"reasoning_content": 7})), row={"reasoning": None}
    ),
    "a tool call beside the answer": Odd(http(completion(RIGHT, message={"tool_calls": [{"id": "a"}]}))),
    "emoji, zero bytes, another script": Odd(http(completion(f"左 \U0001f600 \u0000 \u202e {RIGHT}"))),
    "half a character": Odd(http(raw(("HERE", "\\ud83d"), content=f"cut HERE {RIGHT}"))),
    "Latin-1": Odd(http(raw(("HERE", "café"), content=f"HERE {RIGHT}").encode("latin-1"))),
    "a megabyte of brackets": wrong(http(completion("[" * 1_000_000)), "unparsed"),
    "two choices": Odd(
        http({"choices": [{"message": {"content": t}, "finish_reason": "stop"} for t in (RIGHT, WRONG)]})
    ),
    "a thought among the parts": Odd(
        http(completion([{"type": "reasoning", "text": WRONG}, {"type": "text", "text": RIGHT}])),
        row={"text": RIGHT, "reasoning": WRONG},
    ),
    "a thought that is a list of parts": Odd(
        http(
            completion(
                [{"type": "thinking", "thinking": [{"type": "text", "text": WRONG}]}, {"type": "text", "text": RIGHT}]
            )
        ),
        row={"text": RIGHT, "reasoning": WRONG},
    ),
    "nothing but a thought among the parts": Odd(
        http(completion([{"type": "reasoning", "text": RIGHT}])), row={"text": ""}, note="reasoning-parser"
    ),
    "an output_text": Odd(http(completion([{"type": "output_text", "text": RIGHT}]))),
    "text under another name": wrong(
        http(completion(None, message={"thoughts": RIGHT})),
        "empty",
        row={"rest": json.dumps({"thoughts": RIGHT}).replace(": ", ":", 1)},
    ),
    "fields that no server documents": Odd(http(completion(system_fingerprint="x", x={"y": [1]}, service_tier=None))),
    # reported token counts
    "no usage": Odd(http(raw(('"usage"', '"other"'))), row={"completion_tokens": None, "prompt_tokens": None}),
    "usage null": Odd(http(raw(usage={}).replace('"usage": {}', '"usage": null')), row={"completion_tokens": None}),
    "usage a list": Odd(http(completion(usage=[1])), row={"completion_tokens": None}),
    "usage a float": Odd(http(completion(usage={"completion_tokens": 5.0})), row={"completion_tokens": 5}),
    "usage a fraction": Odd(http(completion(usage={"completion_tokens": 1.5})), row={"completion_tokens": None}),
    "usage a text": Odd(http(completion(usage={"completion_tokens": "many"})), row={"completion_tokens": None}),
    "usage true": Odd(http(completion(usage={"completion_tokens": True})), row={"completion_tokens": None}),
    "usage negative": Odd(http(completion(usage={"completion_tokens": -1})), row={"completion_tokens": None}),
    "usage 2**31": Odd(http(completion(usage={"completion_tokens": 2**31})), row={"completion_tokens": None}),
    "usage 2**64": Odd(http(completion(usage={"completion_tokens": 2**64})), row={"completion_tokens": None}),
    "usage 1e300": Odd(http(completion(usage={"completion_tokens": 1e300})), row={"completion_tokens": None}),
    "usage NaN": Odd(http(completion(usage={"completion_tokens": float("nan")})), row={"completion_tokens": None}),
    "usage Infinity": Odd(http(completion(usage={"completion_tokens": float("inf")})), row={"completion_tokens": None}),
    "usage with details": Odd(
        http(completion(usage={"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}})),
        row={"completion_tokens": 9, "reasoning_tokens": 4},
    ),
    "details null": Odd(http(completion(usage={"completion_tokens": 9, "completion_tokens_details": None}))),
    # reported model names
    "no model": Odd(http(raw(('"model"', '"other"'))), row={"served_model": None}),
    "a model that is a number": Odd(http(completion(model=7)), row={"served_model": None}),
    "a weight version": Odd(http(completion(metadata={"weight_version": "2"})), row={"weight_version": "2"}),
    # encodings of the response
    "chunked": Odd(CHUNKED + CHUNKS + b"0\r\n\r\n"),
    "chunked, with an extension and a trailer": Odd(
        CHUNKED + b"%x;a=b\r\n%s\r\n0\r\nX-Sum: 1\r\n\r\n" % (len(TEXT), TEXT)
    ),
    "byte by byte at its end": Odd([GOOD[:-3], 0.01, GOOD[-3:-2], 0.01, GOOD[-2:-1], 0.01, GOOD[-1:]]),
    "a slow head": Odd([GOOD[:20], 0.1, GOOD[20:]]),
    "to the end of the connection": Odd([head() + TEXT, CLOSE]),
    "HTTP/1.0": Odd([head().replace(b"1.1", b"1.0") + TEXT, CLOSE]),
    "it says that it closes": Odd([http(TEXT, 200, "application/json", "Connection: close"), CLOSE]),
    "it closes and does not say so": Odd([GOOD, CLOSE]),
    "103 and 100 first": Odd(b"HTTP/1.1 103 X\r\nLink: </x>\r\n\r\nHTTP/1.1 100 X\r\n\r\n" + GOOD),
    "bytes behind the answer": Odd([GOOD + b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\nok", CLOSE]),
    "gzip although it was not requested": Odd(
        http(gzip.compress(TEXT, mtime=0), 200, "application/json", "Content-Encoding: gzip")
    ),
    "deflate": Odd(http(zlib.compress(TEXT), 200, "application/json", "Content-Encoding: deflate")),
    "as text/html": Odd(http(TEXT, 200, "text/html")),
    "without a type": Odd(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(TEXT), TEXT)),
    "blanks before the JSON": Odd(http(b"\n \n\n" + TEXT)),
    "a byte order mark": Odd(http(b"\xef\xbb\xbf" + TEXT)),
}
FAILURES = {
    # unfinished answers
    **{
        f"finish_reason {finish!r}": retried(http(completion(finish=finish)), says, row=GIVEN_UP, note=ENDED)
        for finish, says in [
            ("abort", "'abort'"),
            ("content_filter", "'content_filter'"),
            ("tool_calls", "'tool_calls'"),
            ("function_call", "'function_call'"),
            ("error", "'error'"),
            ("repetition", "'repetition'"),
            ("STOP", "'STOP'"),
            ("", "''"),
            (None, "'null'"),
            (7, "'7'"),
            (["stop"], '["stop"]'),
            ("x" * 5000, "'" + "x" * 60 + "'"),
        ]
    },
    "no finish_reason": retried(
        http(raw(('"finish_reason"', '"other"'))), "'null'", row=GIVEN_UP | {"finish_reason": "null"}, note=ENDED
    ),
    "a thought that is given up": retried(
        http(completion(None, "repetition", message={"reasoning": WRONG})),
        "'repetition'",
        row={"partial": "", "reasoning": WRONG, "finish_reason": "repetition"},
        note="the server ended 1 of 3 requests (33.33 %) by 'repetition'; it does not count as an answer",
    ),
    # bodies that are not completions
    "content a number": retried(http(completion(5)), "not a chat completion"),
    "content an object": retried(http(completion({"text": RIGHT})), "not a chat completion"),
    "no message": retried(http({"choices": [{"text": RIGHT, "finish_reason": "stop"}]}), "not a chat completion"),
    "a message that is null": retried(http({"choices": [{"message": None, "finish_reason": "stop"}]}), "not a chat"),
    "a piece of a stream": retried(http({"choices": [{"delta": {"content": RIGHT}}]}), "not a chat completion"),
    "no choices": retried(http({"model": "m"}), "not a chat completion"),
    "choices null": retried(http({"choices": None}), "not a chat completion"),
    "empty choices": retried(http({"choices": []}), "not a chat completion"),
    "a choice that is null": retried(http({"choices": [None]}), "not a chat completion"),
    "an error with status 200": retried(
        http({"error": {"message": "overloaded"}}), "status 200: {'message': 'overloaded'}"
    ),
    "an error as vLLM once sent it": retried(http({"object": "error", "message": "too busy", "code": 500}), "too busy"),
    "a list": retried(http([1]), "not a chat completion"),
    "a number": retried(http("7"), "not a chat completion"),
    "HTML": retried(http("<html>Please log in</html>", 200, "text/html"), "not JSON (text/html): '<html>Please log in"),
    "a stream of events": retried(http("data: {}\n\ndata: [DONE]\n\n", 200, "text/event-stream"), "text/event-stream"),
    "nothing at all": retried(http(b""), "not JSON"),
    "half of the JSON": retried(http(TEXT[:-20]), "not JSON"),
    "two JSON values": retried(http(TEXT + TEXT), "not JSON"),
    "a hundred thousand brackets": retried(http("[" * 100_000), "not JSON"),
    "gzip cut short": retried(http(gzip.compress(TEXT, mtime=0)[:-9], 200, "x", "Content-Encoding: gzip"), "truncated"),
    "a body that claims to be gzip": retried(http(TEXT, 200, "x", "Content-Encoding: gzip"), "not valid gzip"),
    "brotli": retried(http(TEXT, 200, "x", "Content-Encoding: br"), "encoding 'br'"),
    # statuses
    **{
        f"status {s}": retried(http("no", s), f"HTTP {s}")
        for s in (201, 202, 206, 408, 425, 500, 502, 504, 507, 520, 529)
    },
    "status 204": retried(b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP 204"),
    "status 503": retried(http({"error": {"message": "Loading model"}}, 503), "Loading model"),
    "status 429": retried(http("slow", 429), "HTTP 429: slow"),
    "status 429 with a time": retried(http("slow", 429, "x", "Retry-After: 0.05"), "HTTP 429"),
    "status 429 with a date": retried(http("slow", 429, "x", "Retry-After: Sun, 29 Nov 2026 08:00:00 GMT"), "HTTP 429"),
    "status 429 with nonsense": retried(http("slow", 429, "x", "Retry-After: soon, -3"), "HTTP 429"),
    **{
        f"redirect {s}": Odd(http("", s, "x", "Location: /elsewhere"), "error", False, f"HTTP {s}")
        for s in (301, 302, 307, 308)
    },
    **{f"status {s}": refused(s) for s in (400, 401, 402, 403, 404, 405, 409, 410, 415, 422, 451)},
    "too long": refused(400, {"message": "maximum context length is 4096 tokens"}, "maximum context length is 4096"),
    "too large for the proxy": refused(413, "<html>413 Request Entity Too Large</html>", "Too Large", "text/html"),
    # broken connections
    "reset before the answer": retried([RESET], "closed before an answer", unseen=1),
    "reset in the head": retried([GOOD[:25], RESET], "of the answer"),
    "reset in the middle": retried([GOOD[:-30], RESET], "of the answer"),
    "closed before the answer": retried([CLOSE], "closed before an answer", unseen=1),
    "closed in the middle": retried([GOOD[:-30], CLOSE], "of the answer"),
    "closed in a chunk": retried([CHUNKED + CHUNKS[:-20], CLOSE], "of the answer"),
    "closed before the last chunk": retried([CHUNKED + CHUNKS, CLOSE], "of the answer"),
    "closed in the head": retried([b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE], "of the answer"),
    "no HTTP": retried([b"\x00\x01\x02 what is this\r\n\r\n", CLOSE], "not HTTP"),
    "HTTP/0.9": retried([TEXT, CLOSE], "not HTTP"),
    "a length that is a word": retried([b"HTTP/1.1 200 X\r\nContent-Length: many\r\n\r\n" + TEXT, CLOSE], "not HTTP"),
    "two lengths": retried(
        [b"HTTP/1.1 200 X\r\nContent-Length: 5\r\nContent-Length: %d\r\n\r\n" % len(TEXT) + TEXT, CLOSE], "not HTTP"
    ),
    "a chunk whose size is not a number": retried([CHUNKED + b"zz\r\n" + TEXT, CLOSE], "not HTTP"),
    "another protocol": retried(
        [b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", CLOSE], "another protocol"
    ),
    "more than it announced": retried([http(b"", 200)[:-4] + b"\r\nX: 1", CLOSE], "of the answer"),
    "it hangs": retried([HANG], "no answer in 0.6 s"),
    "it hangs in the middle": retried([GOOD[:-30], HANG], "no answer in 0.6 s"),
    "less than it announced": retried([head(200, len(TEXT) + 1) + TEXT, HANG], "no answer in 0.6 s"),
    "one byte now and then": retried([s for b in GOOD[:40] for s in (bytes([b]), 0.05)], "no answer in 0.6 s"),
}
assert len(ANSWERS) + len(FAILURES) >= 70


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    Image.new("RGB", (100, 80), "white").save(folder / "0.png")
    rows = [{"sent": sent} | ROOT for sent in ("good one", "odd one", "good two")]
    (folder / "refcoco_val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def ask(data, tmp_path):
    made = []

    def go(odd, times):
        """Evaluate; the third question gets the unusual reply this many times, then a good answer. Return the summary,
        the row of that question, and the number of its requests.
        """
        sends = odd.sends
        made.append(OddServer(lambda question, n: sends if "odd one" in question and n < times else GOOD))
        client = Options(
            (made[-1].url,),
            Request("m", "qwen3"),
            concurrency=2,
            attempts=2,
            refusals=2,
            backoff_s=0.01,
            timeout_s=0.6 if "0.6 s" in odd.says else 20.0,
            first_alone=False,
        )
        evaluation = Evaluation((data / "refcoco_val.jsonl",), (data,), tmp_path / "out", "m", client)
        summary = run(evaluation, plan(evaluation))
        rows = {r["sent"]: r for r in read_rows(tmp_path / "out")}
        assert len(rows) == 3 and all(rows[f"good {n}"]["correct"] for n in ("one", "two"))
        read_answers(tmp_path / "out")
        return summary, rows["odd one"], next(n for q, n in made[-1].asked.items() if "odd one" in q)

    yield go
    for server in made:
        server.close()


def check(odd, summary, row, asked):
    assert (row["outcome"], bool(row["correct"])) == (odd.outcome, odd.correct)
    assert {name: row[name] for name in odd.row} == dict(odd.row)
    assert any(odd.note in note for note in summary.notes) if odd.note else not summary.notes
    assert odd.asked <= asked <= odd.asked + odd.unseen
    if odd.outcome == "error":
        assert odd.says in row["error"] and len(row["error"]) < 500 and row["iou"] is row["text"] is None
        assert (summary.done, summary.errors, summary.macro) == (2, 1, None)
        assert summary.reason == "1 of 3 requests failed" and odd.says in summary.problems[0].what
    else:
        assert (summary.done, summary.errors, summary.reason) == (3, 0, None)
        assert summary.macro == pytest.approx((2 + odd.correct) / 3)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_odd_answer_is_read(ask, name):
    check(ANSWERS[name], *ask(ANSWERS[name], 99))


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_no_answer_is_an_error_by_name(ask, name):
    check(FAILURES[name], *ask(FAILURES[name], 99))


@pytest.mark.parametrize("name", [n for n, odd in FAILURES.items() if odd.asked == 2])
def test_what_is_no_answer_is_asked_again(ask, name):
    summary, row, asked = ask(FAILURES[name], 1)
    assert (row["outcome"], row["correct"], summary.macro, summary.errors, asked) == ("ok", True, 1.0, 0, 2)


def test_another_model_behind_one_address_stops_the_run(data, ask):
    with pytest.raises(UserError, match="different models"):
        ask(Odd(http(completion(model="other"))), 99)
