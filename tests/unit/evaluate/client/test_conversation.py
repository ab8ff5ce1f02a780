"""Questions that need several requests, with a server whose tokens are words: budgets, several answers, stored rows."""

import base64
import io
import re

import pytest
from PIL import Image

from grounding.errors import Failure, UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request, fitting
from grounding.evaluate.engines import ENGINES, Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.method import Method, check
from grounding.evaluate.plan import plan
from grounding.evaluate.rescoring import stored_evaluation
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run
from grounding.evaluate.worklist import settings_digest

BOX = '[{"bbox_2d": [100, 100, 500, 600]}]'


def completion(*texts, finish="stop", tokens=None):
    choices = [{"message": {"role": "assistant", "content": t}, "finish_reason": finish} for t in texts]
    count = sum(len(t.split()) for t in texts) if tokens is None else tokens
    return {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": count}}


class Thinker:
    """A model that thinks `length` words and then answers; it obeys max_tokens and stop, and can continue a message."""

    def __init__(self, length, answer=BOX, closes=True):
        self.words = [f"w{i}" for i in range(length)]
        self.answer, self.closes = answer, closes

    def __call__(self, n, body):
        last = body["messages"][-1]
        if last["role"] == "assistant":
            assert body.get("continue_final_message") is True
            assert last["content"].endswith("\n</think>\n\n")
            assert last["content"].count("</think>") == 1
            return completion(self.answer)
        said = [*self.words, "</think>", self.answer] if self.closes else self.words
        said = said[: body["max_tokens"]]
        if "</think>" in said and "</think>" in body.get("stop", ()):
            said = said[: said.index("</think>") + 1]
            return completion(" ".join(said), tokens=len(said))
        whole = not self.closes or said[-1] == self.answer
        return completion(" ".join(said), finish="stop" if whole else "length", tokens=len(said))


def evaluate(dataset, server, method, out="out", sampling=None, engine="sglang", known=False):
    """Evaluate with these settings. With `known`, the evaluation knows the kind of the servers, as in a job."""
    chosen, sampling = get_engine(engine), sampling or Sampling()
    request = Request("m", "qwen3", chosen.request_extras(sampling))
    client = Options(
        (server.url,),
        request,
        4,
        attempts=2,
        backoff_s=0.01,
        timeout_s=10.0,
        method=method,
        served_by=chosen,
        sampling=sampling,
    )
    files = (dataset / "refcoco+_testA.jsonl", dataset / "refcoco_val.jsonl")
    e = Evaluation(files, (dataset / "images",), dataset / out, "m", client, sampling, engine=engine if known else "")
    return run(e, plan(e)), list(read_rows(dataset / out))


@pytest.mark.parametrize("engine", [name for name, e in ENGINES.items() if e.continues])
@pytest.mark.parametrize(("length", "budget"), [(20, 8), (5, 8), (7, 8), (8, 8)])
def test_a_thought_is_never_longer_than_its_budget_and_the_box_is_read(dataset, server, engine, length, budget):
    server.plan = Thinker(length)
    summary, rows = evaluate(dataset, server, Method(thinking_budget=budget), engine=engine)
    assert (summary.errors, summary.unparsed, summary.truncated) == (0, 0, 0)
    for row in rows:
        # if a thought ends by itself, `</think>` is one more token
        assert row["reasoning_tokens"] == min(length + 1, budget)
        assert row["completion_tokens"] == row["reasoning_tokens"] + len(BOX.split())
        assert row["text"] == BOX and row["reasoning"].split() == [f"w{i}" for i in range(min(length, budget))]
        assert row["prompt_tokens"] == 7
    assert server.count == 2 * len(rows)
    thoughts = [b for b in server.bodies if b["messages"][-1]["role"] == "user"]
    assert {b["max_tokens"] for b in thoughts} == {budget} and {tuple(b["stop"]) for b in thoughts} == {("</think>",)}
    answers = [b for b in server.bodies if b["messages"][-1]["role"] == "assistant"]
    assert {b["max_tokens"] for b in answers} == {4096} and {tuple(b["stop"]) for b in answers} == {("</think>",)}


class Template:
    """Renders messages as a chat template does, with one token per word; `heeds`: it continues a message on request."""

    def __init__(self, heeds, status=200):
        self.heeds, self.status = heeds, status

    def __call__(self, n, body):
        if self.status != 200 and body.get("continue_final_message"):
            return self.status
        last = body["messages"][-1]
        words = 4 * len(body["messages"]) + sum(len(str(m["content"]).split()) for m in body["messages"])
        goes_on = self.heeds and body.get("continue_final_message")
        thinks = last["role"] == "user" and body["max_tokens"] == 8
        found = completion("w " * 8 if thinks else BOX, finish="length" if thinks else "stop")
        found["usage"]["prompt_tokens"] = words - 1 if goes_on else words + 2
        return found


NOT = "ignores the request to continue a message"


@pytest.mark.parametrize("engine", [name for name, e in ENGINES.items() if e.continues])
@pytest.mark.parametrize(("heeds", "notes"), [(True, 0), (False, 1)])
def test_whether_a_server_continues_a_message_is_seen_and_not_trusted(dataset, server, engine, heeds, notes):
    """The client compares the tokens of two prompts before the first question, and does not rely on the server's name."""
    server.plan = Template(heeds)
    summary, _ = evaluate(dataset, server, Method(thinking_budget=8), engine=engine, known=True)
    assert len([n for n in summary.notes if NOT in n]) == notes and not summary.errors
    asked, plain = server.bodies[:2]
    fields = get_engine(engine).continues
    assert {k: asked[k] for k in fields} == dict(fields) and not fields.keys() & plain.keys()
    assert asked["max_tokens"] == plain["max_tokens"] == 1 and asked["messages"] == plain["messages"]
    if notes:  # a second run asks nothing, but keeps the note
        again, _ = evaluate(dataset, server, Method(thinking_budget=8), engine=engine, known=True)
        assert len([n for n in again.notes if NOT in n]) == 1


def test_a_server_that_refuses_to_continue_a_message_stops_the_run(dataset, server):
    server.plan = Template(True, 400)
    with pytest.raises(Failure, match="refuses every question: HTTP 400"):
        evaluate(dataset, server, Method(thinking_budget=8), engine="vllm", known=True)


def test_nothing_is_asked_beforehand_without_a_budget(dataset, server):
    summary, rows = evaluate(dataset, server, Method(), known=True)
    assert server.count == len(rows) and not summary.notes


def test_a_server_that_does_not_keep_the_budget_is_no_measurement(dataset, server):
    server.plan = lambda n, body: completion("w " * 50, finish="length")
    with pytest.raises(UserError, match="50 tokens although the limit was 8"):
        evaluate(dataset, server, Method(thinking_budget=8))


def test_what_the_second_request_finds_in_the_engines_cache_is_counted(dataset, server):
    """SGLang (with its cache report) and vLLM (with prompt token details) report this in each response."""
    thinker = Thinker(20)

    def reports(n, body):
        found = thinker(n, body)
        again = body["messages"][-1]["role"] == "assistant"
        found["usage"] |= {"prompt_tokens": 17 if again else 7}
        found["usage"]["prompt_tokens_details"] = {"cached_tokens": 15} if again else None
        return found

    server.plan = reports
    summary, rows = evaluate(dataset, server, Method(thinking_budget=8))
    [facts] = summary.servers
    assert facts.cached_tokens == 15 * len(rows) and {r["prompt_tokens"] for r in rows} == {7}


def test_budget_zero_is_one_request_without_a_thought(dataset, server):
    server.plan = Thinker(20)
    _, rows = evaluate(dataset, server, Method(thinking_budget=0))
    assert server.count == len(rows)
    assert {(r["reasoning_tokens"], r["text"], r["reasoning"]) for r in rows} == {(0, BOX, None)}


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize(("budget", "samples"), [(0, 1), (8, 1), (0, 3), (8, 3)])
def test_a_model_that_thinks_again_after_its_thought_was_closed_gets_no_box_for_it(
    dataset, server, stops, budget, samples
):
    """A tiny model that had learned to think did so in 10 of 20 answers, and its setting "no thought" looked as good as the others."""
    thinker = Thinker(20)

    def plan_(n, body):
        if body["messages"][-1]["role"] == "user":
            return thinker(n, body)
        again = int(body["messages"][0]["content"][1]["text"].count("thing 3"))
        return completion("it is left\n</think>" + ("" if stops else BOX) if again else BOX)

    server.plan = plan_
    method, sampling = Method(thinking_budget=budget, samples=samples), Sampling(temperature=0.7, seed=5)
    summary, rows = evaluate(dataset, server, method, sampling=sampling)
    again = [r for r in rows if r["sent"] == "thing 3"]
    assert again and {(r["text"], r["scaled_bbox"], r["outcome"]) for r in again} == {
        ("it is left\n</think>", None, "unparsed")
    }
    assert {r["text"] for r in rows if r not in again} == {BOX}
    [note] = [n for n in summary.notes if "another thought" in n]
    assert note.startswith(f"for {len(again)} of {len(rows)} questions")
    e = stored_evaluation(dataset / "out")
    assert note in run(e, plan(e)).notes  # scoring again keeps it


def test_an_answer_that_ends_within_the_budget_has_no_thought(dataset, server):
    server.plan = lambda n, body: completion(BOX)
    _, rows = evaluate(dataset, server, Method(thinking_budget=64))
    assert server.count == len(rows)
    assert {(r["reasoning_tokens"], r["completion_tokens"], r["text"]) for r in rows} == {(0, 5, BOX)}


def test_a_server_that_splits_the_thought_off_is_understood(dataset, server):
    def plan_(n, body):
        if body["messages"][-1]["role"] == "assistant":
            return completion(BOX)
        found = completion("", tokens=3)
        found["choices"][0]["message"] |= {"content": None, "reasoning_content": "it is left"}
        return found

    server.plan = plan_
    _, rows = evaluate(dataset, server, Method(thinking_budget=8))
    assert {(r["reasoning"], r["text"], r["reasoning_tokens"]) for r in rows} == {("it is left", BOX, 3)}


def test_a_request_that_fails_in_the_middle_is_asked_again_whole(dataset, server):
    thinker = Thinker(20)
    server.plan = lambda n, body: 500 if n == 1 else thinker(n, body)
    summary, rows = evaluate(dataset, server, Method(thinking_budget=8))
    assert summary.errors == 0 and {r["reasoning_tokens"] for r in rows} == {8}


def test_an_engine_that_cannot_continue_is_refused_before_anything_is_sent(dataset, server):
    with pytest.raises(UserError, match="cannot continue"):
        evaluate(dataset, server, Method(thinking_budget=8), engine="openai")
    assert server.count == 0


def boxes_of(number):
    """Return three answers that overlap and a distant one; their position depends on the question."""
    return [f'[{{"bbox_2d": [{100 + i}, 100, {500 + number % 7 + i}, 600]}}]' for i in range(3)] + [
        '[{"bbox_2d": [900, 900, 950, 950]}]'
    ]


def several(n, body):
    number = int("".join(re.findall(r"\d", body["messages"][0]["content"][1]["text"])) or 0)
    texts = boxes_of(number)
    if "n" in body:
        assert body["n"] == 4
        return completion(*texts)
    return completion(texts[body["seed"] - 5])


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_several_answers_from_one_request_or_from_several(dataset, server, engine):
    server.plan = several
    sampling = Sampling(temperature=0.7, seed=5)
    summary, rows = evaluate(dataset, server, Method(samples=4), sampling=sampling, engine=engine)
    assert server.count == len(rows) * (1 if get_engine(engine).takes_n else 4)
    for row in rows:
        assert len(row["samples"]) == 4 and row["chosen"] != 3
        own = row["samples"][row["chosen"]]
        assert (row["text"], row["scaled_bbox"], row["correct"]) == (own["text"], own["scaled_bbox"], own["correct"])
        assert row["completion_tokens"] == 20
    points = summary.samples.by_number
    assert [p.n for p in points] == [1, 2, 3, 4]
    share = sum(sum(s["correct"] for s in r["samples"]) for r in rows) / 4 / len(rows)
    whole = sum(any(s["correct"] for s in r["samples"]) for r in rows) / len(rows)
    assert summary.micro == pytest.approx(sum(r["correct"] for r in rows) / len(rows))
    by_file = {f: [r for r in rows if r["file"] == f] for f in {r["file"] for r in rows}}
    macro = sum(sum(sum(s["correct"] for s in r["samples"]) / 4 for r in g) / len(g) for g in by_file.values()) / len(
        by_file
    )
    assert summary.samples.accuracy_at_1 == pytest.approx(macro)
    assert points[-1].medoid.macro == pytest.approx(summary.macro)
    assert points[-1].oracle.macro >= points[-1].medoid.macro >= 0
    assert share <= whole
    import pyarrow.parquet as pq

    table = pq.read_table(dataset / "out/results.parquet").to_pylist()
    assert {tuple(s["text"] for s in r["samples"]) for r in table} == {
        tuple(s["text"] for s in r["samples"]) for r in rows
    }


def indexed(*texts, indices=None):
    found = completion(*texts)
    for choice, i in zip(found["choices"], indices or range(len(texts)), strict=True):
        choice["index"] = i
    return found


@pytest.mark.parametrize("most", [1, 2, 3])
def test_answers_that_a_server_leaves_out_are_asked_again(dataset, server, most):
    asked = []

    def plan_(n, body):
        first, count = body["seed"] - 5, min(most, body["n"])  # with the same seed, all answers would be equal
        asked.append((first, body["n"], count))
        return indexed(*(f"[{{'n': {i}}}] {BOX}" for i in range(first, first + count)))

    server.plan = plan_
    summary, rows = evaluate(dataset, server, Method(samples=4), sampling=Sampling(temperature=0.7, seed=5))
    assert summary.errors == 0 and summary.samples.count == 4 and not summary.notes
    for row in rows:
        assert [s["text"] for s in row["samples"]] == [f"[{{'n': {i}}}] {BOX}" for i in range(4)]
        assert row["completion_tokens"] == 4 * 7 and row["prompt_tokens"] == 7
    assert all(first + wanted == 4 for first, wanted, _ in asked) and sum(c for _, _, c in asked) == 4 * len(rows)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (indexed(*[BOX] * 5), "5 choices came although 4 were requested"),
        (indexed(*boxes_of(0), indices=[0, 1, 1, 2]), "2 choices have the index 1"),
        (indexed(*boxes_of(0)[:2], indices=[0, 0]), "2 choices have the index 0"),
    ],
)
def test_choices_that_are_too_many_or_one_twice_are_errors_by_name(dataset, server, reply, says):
    number = re.compile(r"thing (\d+),")
    server.plan = lambda n, body: (
        reply if number.search(body["messages"][0]["content"][1]["text"])[1] == "3" else several(n, body)
    )
    summary, rows = evaluate(dataset, server, Method(samples=4), sampling=Sampling(temperature=0.7), engine="vllm")
    assert summary.macro is None and summary.errors == 2
    assert {r["sent"] for r in rows if r["outcome"] == "error" and says in r["error"]} == {"thing 3"}


def test_the_first_choice_counts_if_one_was_asked_for(dataset, server):
    server.plan = lambda n, body: indexed("no idea", BOX, indices=[1, 0])
    _, rows = evaluate(dataset, server, Method())
    assert {r["text"] for r in rows} == {BOX}


def test_answers_that_are_all_the_same_are_noted(dataset, server):
    server.plan = lambda n, body: indexed(*[BOX] * 4)
    summary, _ = evaluate(dataset, server, Method(samples=4), sampling=Sampling(temperature=0.7), engine="vllm")
    assert any("the 4 answers to each question are identical" in note for note in summary.notes)


def test_stored_answers_are_scored_again_as_they_were(dataset, server):
    server.plan = several
    summary, rows = evaluate(
        dataset, server, Method(samples=4), sampling=Sampling(temperature=0.7, seed=5), engine="vllm"
    )
    e = stored_evaluation(dataset / "out")
    again = run(e, plan(e))
    assert again.samples == summary.samples and again.macro == summary.macro
    newest = {r["key"]: r for r in read_rows(dataset / "out")}
    assert [newest[r["key"]] for r in rows] == rows


def test_the_same_answer_many_times_is_refused(dataset, server):
    with pytest.raises(UserError, match="temperature 0"):
        evaluate(dataset, server, Method(samples=4))
    assert server.count == 0


def test_what_is_not_used_leaves_the_identity_of_an_answer_as_it_was():
    plain = settings_digest("m", "qwen3", Sampling())
    assert settings_digest("m", "qwen3", Sampling(), method=Method()) == plain
    others = [Method(samples=2), Method(thinking_budget=0), Method(thinking_budget=8), Method(max_pixels=5000)]
    assert len({settings_digest("m", "qwen3", Sampling(), method=m) for m in others} | {plain}) == 5
    assert len({m.name for m in [*others, Method()]}) == 5


def test_a_larger_picture_is_sent_smaller(dataset, server):
    _, rows = evaluate(dataset, server, Method(max_pixels=1024))
    assert rows
    for body in server.bodies:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            assert image.width * image.height <= 1024


def test_a_picture_keeps_its_shape():
    assert fitting((640, 480), None) == (640, 480) and fitting((640, 480), 640 * 480) == (640, 480)
    width, height = fitting((640, 480), 10_000)
    assert width * height <= 10_000 < (width + 1) * (height + 1) and abs(width / height - 4 / 3) < 0.03
    assert fitting((100_000, 1), 1024)[1] == 1


def test_small_pictures_are_sent_larger_if_that_is_wished(dataset, server):
    assert fitting((100, 80), None, 20_000) == (159, 127) and fitting((100, 80), 30_000, 8000) == (100, 80)
    assert fitting((640, 480), 10_000, 5000) == fitting((640, 480), 10_000)
    _, rows = evaluate(dataset, server, Method(min_pixels=20_000))
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == (159, 127) and sent.width * sent.height >= 20_000
    assert all(row["width"] == 100 for row in rows), (
        "rows must have the size of the stored picture, not of the resized one"
    )
    assert Method(min_pixels=20_000).settings() == {"min_pixels": 20_000}
    with pytest.raises(UserError, match="the minimum of 20000 pixels is above the maximum of 10000"):
        Method(max_pixels=10_000, min_pixels=20_000)
    for scoring in ("egm-eval-pixels", "egm-eval-resized"):
        with pytest.raises(UserError, match="size moves its boxes"):
            check(Method(min_pixels=20_000), 0.0, scoring)
