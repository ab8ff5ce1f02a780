"""The pure parts: summary, merge of parts, requests, engines."""

import json
import random

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.data.records import Expression
from grounding.errors import UserError
from grounding.evaluate.client import Options, body_of, data_url, normalise, parse_reply, pause, ranking
from grounding.evaluate.engines import ENGINES, Sampling, ServeOptions
from grounding.evaluate.results import Results, Tally, read_rows
from grounding.evaluate.role import program, server_port
from grounding.evaluate.summary import PAPER_ORDER, file_order, interval, summarise
from grounding.evaluate.work import Item, key_of, settings_digest


def item(file, line, image="a.jpg", sent="x"):
    e = Expression(file, line, image, sent, (1.0, 2.0, 3.0, 4.0), 10, 10)
    return Item(e, key_of(settings_digest("m", "qwen3", Sampling()), e))


TALLIES = st.builds(
    lambda outcome, iou: Tally(outcome, iou, iou > 0.5 and outcome != "error", 5, 0.1, "egm-eval"),
    st.sampled_from(["ok", "unparsed", "truncated", "error"]),
    st.floats(0, 1),
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["b", "refcocog_val", "refcoco_val"]), st.none() | TALLIES), min_size=1, max_size=30
    ),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_summary_counts_and_does_not_depend_on_order(rows, chance: random.Random):
    items = [item(f, i, image=f"{i % 4}.jpg") for i, (f, _) in enumerate(rows)]
    done = {i.key: t for i, (_, t) in zip(items, rows, strict=True) if t is not None}
    summary = summarise(items, done)
    assert summary["total"] == len(rows)
    assert summary["done"] + summary["errors"] == len(done)
    answered = [t for t in done.values() if t.outcome != "error"]
    assert sum(round((f["acc"] or 0) * f["n"]) for f in summary["files"]) == sum(t.correct for t in answered)
    whole = len(answered) == len(rows)
    assert (summary["macro"] is not None) == whole == (summary["reason"] is None) == (summary["ci95"] is not None)
    shuffled, mixed = list(items), list(done.items())
    chance.shuffle(shuffled)
    chance.shuffle(mixed)
    assert orjson.dumps(summarise(shuffled, dict(mixed))) == orjson.dumps(summary)


def test_macro_is_the_mean_of_files_and_micro_of_rows():
    items = [item("refcoco_val", i, f"{i}.jpg") for i in range(3)] + [item("refcoco_testA", 1, "9.jpg")]
    flags = [True, True, False, False]
    done = {i.key: Tally("ok", 0.8 * c, c, None, None, "egm-eval") for i, c in zip(items, flags, strict=True)}
    summary = summarise(items, done)
    assert summary["macro"] == pytest.approx(1 / 3) and summary["micro"] == 0.5
    assert summary["files"][0]["acc75"] == pytest.approx(2 / 3) and summary["files"][0]["acc90"] == 0


def test_interval_is_by_image_and_has_the_width_of_theory():
    chance = random.Random(1)
    correct = [chance.random() < 0.8 for _ in range(2000)]
    alone = interval([0] * 2000, list(range(2000)), correct)["micro"]
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * (0.16 / 2000) ** 0.5, rel=0.15)
    ten = interval([0] * 20000, [i // 10 for i in range(20000)], [c for c in correct for _ in range(10)])["micro"]
    assert ten[1] - ten[0] == pytest.approx(alone[1] - alone[0], rel=0.05)  # ten copies of a row add no knowledge


def test_paper_order():
    assert file_order(["z", "refcocog_test", "a", *reversed(PAPER_ORDER[:7])]) == [*PAPER_ORDER, "a", "z"]


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["ok", "error"]), st.booleans()), max_size=20),
    st.integers(0, 40),
)
@settings(max_examples=40, deadline=None)
def test_the_last_row_of_a_key_wins_over_parts_and_a_cut_line_is_skipped(tmp_path_factory, rows, cut):
    out = tmp_path_factory.mktemp("r")
    expected = {}
    results = Results(out, "abcd")
    for key, outcome, reopen in rows:
        if reopen:
            results.close()
            results = Results(out, "abcd")
        results.add({"key": key, "outcome": outcome, "iou": 0.1, "scoring": "egm-eval"})
        expected[key] = outcome
    results.close()
    for part in (out / "results").glob("part-*.jsonl"):
        with part.open("ab") as f:
            f.write(b'{"key": "a", "outcome": "cut by a crash and never ended"}'[:cut])
    with Results(out, "abcd") as again:
        assert {k: t.outcome for k, t in again.done.items()} == expected
    assert len(list(read_rows(out))) == len(rows)


def test_one_writer_at_a_time(tmp_path):
    with Results(tmp_path, ""), pytest.raises(UserError, match="another evaluation is writing"):
        Results(tmp_path, "")


def test_keys_tell_rows_models_prompts_and_sampling_apart():
    e = item("f", 1).expression
    digests = [
        settings_digest("m", "qwen3", Sampling()),
        settings_digest("n", "qwen3", Sampling()),
        settings_digest("m", "amodal", Sampling()),
        settings_digest("m", "qwen3", Sampling(max_tokens=8)),
    ]
    keys = {key_of(d, e) for d in digests} | {
        item("f", 2).key,
        item("g", 1).key,
        item("f", 1, "b").key,
        item("f", 1, sent="y").key,
    }
    assert len(keys) == 8


@given(st.text())
@settings(max_examples=50)
def test_body_is_json_whatever_the_expression(sent):
    try:
        sent.encode()
    except UnicodeEncodeError:
        return
    for model in ("m", None):
        body = json.loads(body_of(Options(("u",), model, "qwen3", {}), data_url(b"\xff\xd8\xff"), sent))
        assert (
            body["messages"][0]["content"][1]["text"] == f"Locate {sent}, output its bbox coordinates using JSON format"
        )
        assert body.get("model") == model


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage"]), c),
    ).map(lambda v: json.dumps(v).encode())
)
@settings(max_examples=80)
def test_parse_reply_raises_value_error_only(raw):
    try:
        parse_reply(raw, 0.1)
    except ValueError:
        pass


def test_pause_obeys_retry_after():
    options = Options(("u",), "m", "qwen3")
    assert pause(0, "3", options, 0.0) == 3.25
    assert pause(20, None, options, 1.0) == 30.0
    assert pause(0, "Wed, 21 Oct 2026 07:28:00 GMT", options, 1.0) == 0.5


@given(st.lists(st.text(max_size=5), min_size=2, max_size=6, unique=True), st.text(max_size=5))
def test_a_lost_endpoint_moves_only_its_images(endpoints, image):
    whole = ranking(image, endpoints)
    rest = [e for e in endpoints if e != whole[-1]]
    assert ranking(image, rest) == whole[:-1]


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/chat/completions"])
def test_endpoint_forms(url):
    assert normalise(url) == "http://h:1/v1/chat/completions"


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", "http://h:99999"])
def test_endpoint_mistakes(url):
    with pytest.raises(UserError, match="not an http URL"):
        normalise(url)


def test_engines():
    for engine in ENGINES.values():
        argv = engine.command("/m", ServeOptions("127.0.0.1", 1234, "name", 8))
        assert "/m" in argv and "1234" in argv and engine.readiness == "/health"
    sglang = ENGINES["sglang"].command("/m", ServeOptions(gpus=8))
    assert sglang[sglang.index("--dp-size") + 1] == "8" and sglang[sglang.index("--mem-fraction-static") + 1] == "0.8"
    assert set(ENGINES["transformers"].request_extras(Sampling())) == {"max_tokens", "temperature", "top_p"}
    assert ENGINES["vllm"].env == {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def test_program_and_port(monkeypatch):
    with pytest.raises(UserError, match="not installed"):
        program(["no-such-program-of-ours"])
    monkeypatch.setenv("EGM_PORT", "x")
    with pytest.raises(UserError, match="EGM_PORT"):
        server_port()
