"""A reply is stored unchanged, and only a finished reply is an answer."""

import gzip
import json
import zlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.evaluate.reply import (
    LARGEST_BODY,
    LARGEST_COUNT,
    Reply,
    Unfinished,
    answer_text,
    count,
    json_value,
    read_reply,
    unpacked,
)
from grounding.evaluate.results.writer import outcome_of

BOX = '[{"bbox_2d": [1, 2, 3, 4]}]'


def reply(finish="stop", model="m", usage=None, **message):
    return {"model": model, "choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def read(value):
    return read_reply(orjson.dumps(value), 0.5)[0]


@pytest.mark.parametrize(
    "finish", ["abort", "content_filter", "tool_calls", "error", "repetition", "function_call", "", None, 7, {}]
)
def test_only_stop_and_length_end_an_answer(finish):
    with pytest.raises(Unfinished, match="aborted the request with the finish reason"):
        read(reply(finish, content=BOX))


@pytest.mark.parametrize(
    "message",
    [
        {"content": BOX},
        {"content": [{"type": "text", "text": BOX[:5]}, {"type": "text", "text": BOX[5:]}]},
        {"content": [BOX]},
        {"content": BOX, "reasoning_content": "it is left"},
        {"content": None, "reasoning_content": BOX},
        {"content": "", "reasoning": BOX},
        {"content": " \n", "thinking": BOX},
        {"content": None, "reasoning_details": [{"type": "reasoning.text", "text": BOX}]},
        {"reasoning": [{"type": "text", "text": BOX}]},
    ],
)
def test_the_answer_is_found_in_any_form(message):
    assert answer_text(read(reply(**message))) == BOX


def test_the_thought_is_kept_apart():
    found = read(
        reply(
            content=BOX, reasoning_content="[9, 9, 9, 9]", usage={"completion_tokens_details": {"reasoning_tokens": 5}}
        )
    )
    assert (found.text, found.reasoning, found.reasoning_tokens, found.served_model) == (BOX, "[9, 9, 9, 9]", 5, "m")


@pytest.mark.parametrize("value", [2**31, 2**64 - 1, -1, -(2**40), 1.5, 1e300, "5", True, None, [], {}])
def test_a_count_that_cannot_be_one_is_unknown(value):
    assert count(value) is None
    usage = json.loads(json.dumps({"prompt_tokens": value, "completion_tokens": value}))
    found = read(reply(content=BOX, usage=usage))
    assert found.prompt_tokens is None and found.completion_tokens is None and found.text == BOX


def test_counts_up_to_the_limit_are_kept():
    assert [count(v) for v in (0, 7, 7.0, LARGEST_COUNT)] == [0, 7, 7, LARGEST_COUNT]


@pytest.mark.parametrize(
    ("raw", "kind", "words"),
    [
        (b"<html>login</html>", "text/html", "not JSON .text/html.: '<html>login"),
        (b'data: {"choices": []}', "text/event-stream", "text/event-stream"),
        (b"\x1f\x8b\x08", "", "not JSON: "),
        (b"", "", "not JSON"),
        (b'{"error": {"message": "overloaded"}}', "", "an error with status 200"),
        (b'{"choices": []}', "", "not a chat completion"),
        (b'{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}', "", "not a chat completion"),
        (b"[1]", "", "not a chat completion"),
    ],
)
def test_what_is_no_completion_says_what_came(raw, kind, words):
    with pytest.raises(ValueError, match=words):
        read_reply(raw, 0.1, kind)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "reasoning", "message", "text", "type"]), x)
    ),
    max_leaves=12,
)


@given(st.sampled_from(["stop", "length", "abort", None]) | _JSON, _JSON, _JSON, _JSON)
def test_any_json_is_a_reply_or_a_value_error(finish, message, usage, model):
    value = {"choices": [{"message": message, "finish_reason": finish}], "usage": usage, "model": model}
    try:
        found, cached = read_reply(orjson.dumps(value), 0.1)
    except ValueError:
        return
    assert isinstance(found, Reply) and isinstance(answer_text(found), str) and 0 <= cached <= LARGEST_COUNT
    assert all(c is None or 0 <= c <= LARGEST_COUNT for c in (found.prompt_tokens, found.completion_tokens))


@given(st.binary())
def test_any_bytes_are_a_reply_or_a_value_error(raw):
    with pytest.raises(ValueError):
        read_reply(raw, 0.1)


@pytest.mark.parametrize("name", ["gzip", "x-gzip", "deflate", " GZIP "])
def test_a_packed_body_is_unpacked(name):
    packed = zlib.compress(BOX.encode()) if name == "deflate" else gzip.compress(BOX.encode())
    assert unpacked(packed, name) == BOX.encode() and unpacked(b"x", "") == unpacked(b"x", "identity") == b"x"
    for broken in (packed[:-1], b"", b"x"):
        with pytest.raises(ValueError):
            unpacked(broken, name)


def test_a_packed_body_is_bounded():
    with pytest.raises(ValueError, match="more than 64 MiB"):
        unpacked(zlib.compress(bytes(LARGEST_BODY + 1), 1), "deflate")


@given(_JSON, st.sampled_from([b"\xef\xbb\xbf", b" ", b""]))
def test_what_servers_write_beside_json_changes_nothing(value, before):
    raw = before + orjson.dumps({"value": value, "nan": 0}).replace(b'"nan":0', b'"nan":NaN')
    assert json_value(raw) == orjson.loads(orjson.dumps({"value": value, "nan": None}))


def test_an_answer_without_text_has_an_outcome_of_its_own():
    assert outcome_of(False, "stop", " ") == "empty" and outcome_of(False, "stop", "x") == "unparsed"
    assert outcome_of(True, "stop", BOX) == "ok" and outcome_of(True, "length", "") == "truncated"
