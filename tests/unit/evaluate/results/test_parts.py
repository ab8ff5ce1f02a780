"""The pure functions of an evaluation: summary, merging of parts, requests, engines."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.data.records import Expression
from grounding.errors import Failure, UserError
from grounding.evaluate.client.dispatch import ranking
from grounding.evaluate.client.options import asked_pause, normalise, pause
from grounding.evaluate.client.request import Request, data_url
from grounding.evaluate.engines import ENGINES, Routing, Sampling, ServeOptions
from grounding.evaluate.reply import read_reply
from grounding.evaluate.results.writer import Results, Tallies, read_rows
from grounding.evaluate.role import program, server_port
from grounding.evaluate.summary import PAPER_ORDER, file_order, interval, summarise
from grounding.evaluate.worklist import key_of, read_worklist, settings_digest

SETTINGS = settings_digest("m", "qwen3", Sampling())


def expression(file, line, image="a.jpg", sent="x"):
    return Expression(file, line, image, sent, (1.0, 2.0, 3.0, 4.0), 10, 10)


def worklist(folder, rows, order=None):
    """Return the worklist of (file, image) rows; each file's rows are in order, and `order` says which file comes first."""
    files = {}
    for number, (file, image) in enumerate(rows):
        row = {"image": image, "sent": f"row {number}", "bbox": [1, 2, 3, 4], "width": 10, "height": 10}
        files.setdefault(file, []).append(json.dumps(row) + "\n")
    for file, lines in files.items():
        (folder / f"{file}.jsonl").write_text("".join(lines))
    return read_worklist([folder / f"{f}.jsonl" for f in order or files], SETTINGS)


def tallied(work, answers):
    """Return the columns of a worklist with `answers`, which maps the text of a row to its stored row."""
    done = Tallies(len(work))
    for number in range(len(work)):
        row = answers.get(work.expression(number).sent)
        if row is not None:
            done.set(number, row, "egm-eval")
    return done


TALLIES = st.builds(
    lambda outcome, iou: {
        "outcome": outcome,
        "iou": iou,
        "correct": iou > 0.5 and outcome != "error",
        "completion_tokens": 5,
        "latency_s": 0.1,
        "scoring": "egm-eval",
    },
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
def test_summary_counts_and_does_not_depend_on_order(tmp_path_factory, rows, chance: random.Random):
    folder = tmp_path_factory.mktemp("s")
    pairs = [(f, f"{i % 4}.jpg") for i, (f, _) in enumerate(rows)]
    answers = {f"row {i}": t for i, (_, t) in enumerate(rows) if t is not None}
    work = worklist(folder, pairs)
    summary = summarise(work, tallied(work, answers))
    assert summary.total == len(rows)
    assert summary.done + summary.errors == len(answers)
    answered = [t for t in answers.values() if t["outcome"] != "error"]
    assert sum(round((f.acc or 0) * f.n) for f in summary.files) == sum(t["correct"] for t in answered)
    whole = len(answered) == len(rows)
    assert (summary.macro is not None) == whole == (summary.reason is None) == (summary.ci95 is not None)
    order = list({f for f, _ in rows})
    chance.shuffle(order)
    shuffled = worklist(folder, pairs, order)
    assert summarise(shuffled, tallied(shuffled, answers)).document() == summary.document()


def test_macro_is_the_mean_of_files_and_micro_of_rows(tmp_path):
    work = worklist(tmp_path, [("refcoco_val", f"{i}.jpg") for i in range(3)] + [("refcoco_testA", "9.jpg")])
    flags = [True, True, False, False]
    row = {"outcome": "ok", "scoring": "egm-eval"}
    done = tallied(work, {f"row {i}": row | {"iou": 0.8 * c, "correct": c} for i, c in enumerate(flags)})
    summary = summarise(work, done)
    assert summary.macro == pytest.approx(1 / 3) and summary.micro == 0.5
    assert summary.files[0].acc75 == pytest.approx(2 / 3) and summary.files[0].acc90 == 0


def test_interval_is_by_image_and_has_the_width_of_theory():
    chance = random.Random(1)
    correct = [chance.random() < 0.8 for _ in range(2000)]
    alone = interval([0] * 2000, list(range(2000)), correct).micro
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * (0.16 / 2000) ** 0.5, rel=0.15)
    ten = interval([0] * 20000, [i // 10 for i in range(20000)], [c for c in correct for _ in range(10)]).micro
    # ten copies of each row must not make the interval smaller
    assert ten[1] - ten[0] == pytest.approx(alone[1] - alone[0], rel=0.05)


def test_paper_order():
    assert file_order(["z", "refcocog_test", "a", *reversed(PAPER_ORDER[:7])]) == [*PAPER_ORDER, "a", "z"]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["ok", "error"]), st.booleans()), max_size=20),
    st.integers(0, 40),
)
@settings(max_examples=40, deadline=None)
def test_the_last_row_of_a_key_wins_over_parts_and_a_cut_line_is_skipped(tmp_path_factory, rows, cut):
    out = tmp_path_factory.mktemp("r")
    work = worklist(out, [("f", "a.jpg")] * 4)
    expected = ["", "", "", ""]
    results = Results(out, work, "egm-eval")
    for number, outcome, reopen in rows:
        if reopen:
            results.close()
            results = Results(out, work, "egm-eval")
        results.add(number, {"key": work.key(number), "outcome": outcome, "iou": 0.1, "scoring": "egm-eval"})
        expected[number] = outcome
    results.close()
    for part in (out / "results").glob("part-*.jsonl"):
        with part.open("ab") as f:
            f.write(b'{"key": "a", "outcome": "cut by a crash and never ended"}'[:cut])
    with Results(out, work, "egm-eval") as again:
        assert [("", "ok", "", "", "error")[o] for o in again.done.outcome] == expected
        assert again.done.pending(retry_errors=True).tolist() == [i for i, e in enumerate(expected) if e != "ok"]
    assert len(list(read_rows(out))) == len(rows)


def test_one_writer_at_a_time(tmp_path):
    work = worklist(tmp_path, [("f", "a.jpg")])
    with Results(tmp_path, work, "egm-eval"), pytest.raises(UserError, match="another evaluation is writing"):
        Results(tmp_path, work, "egm-eval")


def test_keys_tell_rows_models_prompts_and_sampling_apart():
    e = expression("f", 1)
    digests = [
        SETTINGS,
        settings_digest("n", "qwen3", Sampling()),
        settings_digest("m", "amodal", Sampling()),
        settings_digest("m", "qwen3", Sampling(max_tokens=8)),
    ]
    rows = [expression("f", 2), expression("g", 1), expression("f", 1, "b"), expression("f", 1, sent="y")]
    assert len({key_of(d, e) for d in digests} | {key_of(SETTINGS, r) for r in rows}) == 8


@given(st.lists(st.integers(0, 29), max_size=40), st.lists(st.text("0123456789abcdef", max_size=33), max_size=5))
@settings(max_examples=30, deadline=None)
def test_keys_are_found_again_and_others_are_not(tmp_path_factory, numbers, strangers):
    work = worklist(tmp_path_factory.mktemp("k"), [("ab"[i % 2], f"{i % 7}.jpg") for i in range(30)])
    keys = [work.key(n) for n in numbers]
    assert keys == [key_of(SETTINGS, work.expression(n)) for n in numbers]
    assert work.find(keys + strangers).tolist() == numbers + [-1] * len(strangers)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    work = worklist(tmp_path, [("f", "a.jpg")] * 3)
    path = tmp_path / "f.jsonl"
    path.write_text(path.read_text().replace("row 1", "row 9"))
    assert work.expression(2).sent == "row 2"
    with pytest.raises(Failure, match=r"f\.jsonl:2: the file has changed"):
        work.expression(1)


@given(st.text())
@settings(max_examples=50)
def test_body_is_json_whatever_the_expression(sent):
    try:
        sent.encode()
    except UnicodeEncodeError:
        return
    for model in ("m", None):
        for routing in (Routing(), Routing(4, "rank"), Routing(4, "", "X-Rank")):
            request = Request(model, "qwen3", {"top_k": 3}, routing=routing)
            pieces = request.pieces(data_url(b"\xff\xd8\xff"), expression("f", 1, sent=sent), "a.jpg")
            body, headers = json.loads(b"".join(pieces)), request.headers("a.jpg")
            assert body.get("rank", 1) == int(headers.get("X-Rank", 1)) == 1  # both must give the image the same rank
            assert ("rank" in body) == bool(routing.field) and ("X-Rank" in headers) == bool(routing.header)
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
def test_read_reply_raises_value_error_only(raw):
    try:
        read_reply(raw, 0.1)
    except ValueError:
        pass


def test_pause_obeys_retry_after():
    assert pause(0, asked_pause("3"), 0.5, 0.0) == 3.25
    assert pause(20, 0.0, 0.5, 1.0) == 30.0
    assert [asked_pause(v) for v in (None, "", "-1", "900", "Wed, 21 Oct 2026 07:28:00 GMT")] == [0, 0, 0, 60, 0]


@given(st.lists(st.text(max_size=5), min_size=2, max_size=6, unique=True), st.text(max_size=5))
def test_a_lost_endpoint_moves_only_its_images(endpoints, image):
    whole = [endpoints[i] for i in ranking(image, endpoints)]
    rest = [e for e in endpoints if e != whole[-1]]
    assert [rest[i] for i in ranking(image, rest)] == whole[:-1]


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/chat/completions"])
def test_endpoint_forms(url):
    assert normalise(url) == "http://h:1/v1/chat/completions"


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", "http://h:99999", "http://[::1"])
def test_endpoint_mistakes(url):
    with pytest.raises(UserError, match="not an http URL"):
        normalise(url)


def test_engines():
    for engine in [e for e in ENGINES.values() if e.name != "openai"]:
        argv = engine.command("/m", ServeOptions("127.0.0.1", 1234, "name", 8))
        assert "/m" in argv and "1234" in argv and engine.readiness == "/health"
    sglang = ENGINES["sglang"].command("/m", ServeOptions(gpus=8))
    assert sglang[sglang.index("--dp-size") + 1] == "8" and sglang[sglang.index("--mem-fraction-static") + 1] == "0.8"
    with pytest.raises(UserError, match="already running"):
        ENGINES["openai"].command("/m", ServeOptions())
    assert set(ENGINES["transformers"].request_extras(Sampling())) == {"max_tokens", "temperature", "top_p"}


def test_program_and_port(monkeypatch):
    with pytest.raises(UserError, match="not installed"):
        program(["no-such-program-of-ours"])
    monkeypatch.setenv("EGM_PORT", "x")
    with pytest.raises(UserError, match="EGM_PORT"):
        server_port()
