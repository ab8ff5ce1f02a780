"""Whatever servers send, the result is computed from real answers, or there is none and a reason is given."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grounding.cli import run as command_line
from grounding.errors import EgmError, Failure, UserError
from grounding.evaluate.progress import Progress
from grounding.evaluate.results.reader import read_answers
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.role import evaluate_role
from grounding.evaluate.summary_model import read_summary
from tests.unit.evaluate.conftest import Server
from tests.unit.evaluate.test_run import evaluation, go

RIGHT = '[{"bbox_2d": [100, 100, 505, 600]}]'  # for the true box [10, 8, 50.5, 48] in a picture of 100 x 80
WRONG = '[{"bbox_2d": [600, 600, 900, 900]}]'


def body(text, finish="stop", model="m", **message):
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"model": model, "choices": [choice], "usage": usage}


KINDS = {
    "right": body(RIGHT),
    "wrong": body(WRONG),
    "thought": body(None, reasoning_content=RIGHT),
    "apart": body(RIGHT, reasoning_content=WRONG),
    "parts": body([{"type": "text", "text": RIGHT}]),
    "cut": body(WRONG, "length"),
    "empty": body(""),
    "none": body("no box"),
    "aborted": body(RIGHT, "abort"),
    "filtered": body("", "content_filter"),
    "nothing": {"choices": []},
    "error200": {"error": {"message": "busy"}},
    "half": "half",
    "busy": 429,
    "failing": 500,
}
ANSWERS = {"right", "wrong", "thought", "apart", "parts", "cut", "empty", "none"}
CORRECT = {"right", "thought", "apart", "parts"}


def question_of(asked):
    return asked["messages"][0]["content"][1]["text"]


def brute_force(out):
    """Compute the macro mean from the stored rows without the project's scoring: the last row of a question counts."""
    last = {(r["file"], r["line"]): r for r in read_rows(out)}
    files = {}
    for row in last.values():
        if row["outcome"] == "error":
            return None
        text = row["text"] if (row["text"] or "").strip() else (row["reasoning"] or "")
        files.setdefault(row["file"], []).append(text == RIGHT)
    return sum(sum(f) / len(f) for f in files.values()) / len(files)


@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(sorted(KINDS)), min_size=3, max_size=9))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.timeout(400)
def test_the_macro_is_that_of_the_answers_or_there_is_none(dataset, tmp_path_factory, chance: random.Random, kinds):
    out = tmp_path_factory.mktemp("out")
    servers = [Server(), Server()]
    try:
        for server in servers:
            server.plan = lambda n, asked: KINDS[chance.choice(kinds)]
        summary = None
        for _ in range(3):  # a run may stop early; the next one continues with its answers
            try:
                summary = go(
                    evaluation(dataset, *(s.url for s in servers), out=str(out), retry_errors=True, attempts=2)
                )
            except EgmError:
                summary = read_summary(out)
            found = brute_force(out) if summary.done == summary.total else None
            if summary.macro is None:
                assert summary.reason
            else:
                assert summary.macro == pytest.approx(found) and not summary.reason and summary.errors == 0
            assert summary.done + summary.errors <= summary.total
    finally:
        for server in servers:
            server.close()


def test_an_abort_is_asked_again(dataset, server):
    seen = set()

    def plan(n, asked):
        first = question_of(asked) not in seen
        seen.add(question_of(asked))
        return KINDS["aborted" if first and n % 3 == 0 else "right"]

    server.plan = plan
    summary = go(evaluation(dataset, server.url))
    assert summary.macro == 1.0 and summary.errors == summary.unparsed == 0


def test_what_always_ends_otherwise_is_an_error_by_name(dataset, server):
    bad = {f"thing {i}" for i in (3, 4)}
    server.plan = lambda n, asked: body(
        RIGHT, "content_filter" if any(f"{b}," in question_of(asked) for b in bad) else "stop"
    )
    summary = go(evaluation(dataset, server.url, attempts=2))
    assert summary.macro is None and summary.errors == 4 and "content_filter" in summary.problems[0].what
    counted = go(evaluation(dataset, server.url, attempts=2, max_errors=4))
    assert counted.macro == pytest.approx(44 / 48) and "4 failed requests count as wrong" in counted.notes
    assert go(evaluation(dataset, server.url, attempts=2, max_errors=3)).macro is None


def test_an_ending_of_every_answer_is_counted_named_and_shown(dataset, server, capsys):
    server.plan = lambda n, asked: body("left left left left", "repetition")
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", str(dataset / "ends"), "--limit", "8", "--attempts", "1"]
    assert command_line(words) == 1
    shown = capsys.readouterr()
    said = "the server ended 8 of 8 requests (100.00 %) by 'repetition'"
    assert said in shown.out and "8 x the server aborted the request with the finish reason 'repetition'" in shown.out
    summary = json.loads((dataset / "ends" / "summary.json").read_text())
    assert summary["endings"] == [{"finish_reason": "repetition", "rows": 8, "share": 1.0}]
    assert (summary["macro"], summary["errors"], summary["unparsed"]) == (None, 8, 0)
    assert command_line(["report", str(dataset / "ends")]) == 0
    assert said.replace("'", "&#39;").replace("the", "The", 1) in (dataset / "ends/report/index.html").read_text()
    assert command_line([*words, "--errors-as-wrong"]) == 0 and said in capsys.readouterr().out


def test_the_error_of_a_run_without_a_mean_says_what_came(dataset, server, capsys):
    server.plan = lambda n, asked: "garbage"
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", str(dataset / "page"), "--attempts", "1", "--limit"]
    for rows in ("3", "8", "20"):  # 8 failures end a run early; 3 are fewer and 20 more
        assert command_line([*words, rows]) == 1
        assert (
            "status 200, but not JSON (text/plain): '<html>hello</html>'"
            in capsys.readouterr().err.partition("Continue with")[0]
        )


def test_what_a_server_gave_up_becomes_an_answer_if_a_later_version_reads_it_so(dataset, server, monkeypatch):
    from grounding.evaluate.results import writer

    server.plan = lambda n, asked: body(RIGHT if n % 2 else WRONG, "eos_token")
    first = go(evaluation(dataset, server.url, attempts=1, limit=4))
    rows = list(read_rows(dataset / "out"))
    assert first.errors == 8 and {r["partial"] for r in rows} == {RIGHT, WRONG} and {r["text"] for r in rows} == {None}
    monkeypatch.setattr(writer, "FINISHED", ("stop", "length", "eos_token"))
    asked = server.count
    again = go(evaluation(dataset, server.url, limit=4, rescore=True))
    assert (again.errors, again.done, again.endings, server.count) == (0, 8, (), asked)
    assert again.macro == brute_force(dataset / "out") == 0.5


def test_a_thought_without_an_answer_is_read_and_said(dataset, server):
    server.plan = lambda n, asked: KINDS["thought"]
    summary = go(evaluation(dataset, server.url))
    assert summary.macro == 1.0 and summary.from_reasoning == 48
    assert any("reasoning-parser" in note for note in summary.notes)


def test_an_empty_answer_is_counted_apart(dataset, server):
    server.plan = lambda n, asked: KINDS["empty"]
    summary = go(evaluation(dataset, server.url))
    assert (summary.macro, summary.empty, summary.unparsed) == (0.0, 48, 0)
    assert summary.notes == ("48 of 48 answers have no text",)


def test_empty_answers_say_what_their_replies_hold_instead(dataset, server):
    server.plan = lambda n, asked: body(
        None, **({"thoughts": RIGHT, "name": "x"} if n % 2 else {"refusal": "I cannot"})
    )
    (note,) = go(evaluation(dataset, server.url)).notes
    assert note.startswith("48 of 48 answers have no text; their replies contain '") and "'thoughts'" in note
    assert {json.loads(r["rest"]).get("thoughts") for r in read_rows(dataset / "out")} == {None, RIGHT}


def test_one_empty_answer_of_many_needs_no_note(dataset, server):
    server.plan = lambda n, asked: KINDS["empty" if "thing 3," in question_of(asked) else "right"]
    assert go(evaluation(dataset, server.url)).notes == ()


def test_another_model_is_noted_and_a_gate_can_refuse_it(dataset, server, capsys):
    server.plan = lambda n, asked: body(RIGHT, model="Qwen/Other")
    words = [
        "eval",
        "--files",
        str(dataset / "refcoco_val.jsonl"),
        "--images",
        str(dataset / "images"),
        "--model",
        "EGM-8B",
    ]
    words += ["--endpoint", server.url, "--out", str(dataset / "named")]
    assert command_line(words) == 0 and "answers as 'Qwen/Other'" in capsys.readouterr().out
    assert command_line([*words, "--strict"]) == 1
    rows = list(read_rows(dataset / "named"))
    assert {r["served_model"] for r in rows} == {"Qwen/Other"} and {r["model"] for r in rows} == {"EGM-8B"}


def test_endpoints_that_serve_different_models_stop_the_run(dataset, server):
    other = Server()
    try:
        server.plan, other.plan = (lambda n, asked: body(RIGHT, model="a")), (lambda n, asked: body(RIGHT, model="b"))
        with pytest.raises(UserError, match="different models"):
            go(evaluation(dataset, server.url, other.url))
    finally:
        other.close()


@pytest.mark.parametrize("tokens", [2**31, -(2**40), 2**64 - 1, "many", 1.5])
def test_an_odd_count_ends_nothing_and_the_folder_opens_again(dataset, server, tokens):
    odd = body(RIGHT)
    odd["usage"] = {"prompt_tokens": tokens, "completion_tokens": tokens}
    server.plan = lambda n, asked: odd
    assert go(evaluation(dataset, server.url)).macro == 1.0
    assert go(evaluation(dataset, server.url)).macro == 1.0 and server.count == 48
    assert read_answers(dataset / "out").correct.all()


@pytest.mark.parametrize(
    "change", [{"completion_tokens": 2**31}, {"iou": "x"}, {"bbox": [1e308] * 4}, {"text": 5}, {"latency_s": "fast"}]
)
def test_a_stored_row_with_anything_in_it_does_not_lock_the_folder(dataset, server, change):
    server.plan = lambda n, asked: KINDS["right"]
    go(evaluation(dataset, server.url))
    part = next((dataset / "out" / "results").glob("part-*.jsonl"))
    lines = part.read_text().splitlines()
    part.write_text("\n".join([json.dumps(json.loads(lines[0]) | change), *lines[1:]]) + "\n")
    assert go(evaluation(dataset, server.url)).macro == 1.0


def test_two_samplings_in_one_folder_are_two_evaluations(dataset, server):
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", str(dataset / "two")]
    server.plan = lambda n, asked: KINDS["right"]
    assert command_line(words) == 0
    server.plan = lambda n, asked: KINDS["wrong"]
    assert command_line([*words, "--max-tokens", "2048", "--limit", "4"]) == 0
    found = read_answers(dataset / "two")
    assert len(found) == 4 and not found.correct.any() and found.left_out == 24


def test_rescoring_changes_scores_and_nothing_else(dataset, server, capsys):
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", str(dataset / "once"), "--mode", "latency", "--concurrency", "2"]
    server.plan = lambda n, asked: KINDS["apart"]
    assert command_line(words) == 0
    out = dataset / "once"
    config, before = (out / "run_config.json").read_text(), json.loads((out / "summary.json").read_text())
    assert command_line(["rescore", str(out)]) == 0
    after = json.loads((out / "summary.json").read_text())
    assert (out / "run_config.json").read_text() == config and after == before
    assert command_line(["rescore", str(out), "--scoring", "egm-reward"]) == 0
    assert json.loads((out / "run_config.json").read_text())["scoring"] == "egm-reward"
    capsys.readouterr()
    fewer = [
        "eval",
        "--files",
        str(dataset / "refcoco_val.jsonl"),
        "--model",
        "m",
        "--out",
        str(out),
        "--limit",
        "6",
        "--rescore",
    ]
    assert command_line(fewer) == 2 and "would be lost" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["total"] == 24
    asked = server.count
    assert command_line([*words, "--scoring", "egm"]) == 0 and server.count == asked  # a latency run can be continued


def test_refused_latencies_stay_refused_when_nothing_is_left_to_ask(dataset, server, monkeypatch):
    from grounding.evaluate import run as module

    server.plan = lambda n, asked: KINDS["right"]
    late = evaluation(dataset, server.url, mode="latency")
    monkeypatch.setattr(module.Lag, "p99", lambda self: 0.5)
    first = go(late)
    monkeypatch.setattr(module.Lag, "p99", lambda self: 0.0)
    again = go(late)
    assert first.latency_refused and again.latency_refused == first.latency_refused
    assert all(f.latency_p50 is None for f in again.files)


def test_a_server_that_loads_is_waited_for(dataset, server):
    server.plan = lambda n, asked: 503 if n < 8 else KINDS["right"]
    summary = go(evaluation(dataset, server.url, wait_s=60.0, refusals=2))
    # the time of waiting for a server does not lower the rate
    assert Progress(48, asked=48, seconds=100.0, waited=98.0).per_second == 24.0
    assert summary.macro == 1.0 and summary.errors == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"bbox_2d": [0.1, 0.1, 0.505, 0.6]}]', "lie in 0..1; if read as fractions, Acc@0.5 would be 100.00"),
        ('[{"bbox_2d": [100, 100, 505, 600]}]', ""),
        (
            '<think>[{"bbox_2d": [600, 600, 900, 900]}]</think>[{"bbox_2d": [100, 100, 505, 600]}]',
            "have a box after </think> that differs",
        ),
    ],
)
def test_the_doctor_speaks_beside_the_score(dataset, server, text, words):
    server.plan = lambda n, asked: body(text)
    summary = go(evaluation(dataset, server.url))
    said = "\n".join(summary.notes)
    assert words in said if words else not said
    assert summary.doctor.answers == 48 and go(evaluation(dataset, server.url)).doctor == summary.doctor


def test_only_truncated_answers_are_asked_again_with_more_tokens(dataset, server, capsys):
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", str(dataset / "cut"), "--max-tokens", "100"]
    long, longer, lost = (f"thing {i}," for i in (3, 4, 5))

    def plan(n, asked):
        question, tokens = question_of(asked), asked["max_tokens"]
        if tokens > 100 and lost in question:
            return KINDS["filtered"]
        least = {long: 200, longer: 400, lost: 200}
        return KINDS["cut" if any(w in question and tokens < n for w, n in least.items()) else "right"]

    server.plan = plan
    assert command_line(words) == 0
    first = read_summary(dataset / "cut")
    assert first.truncated == 3 and server.count == 24 and not first.notes
    assert (
        command_line([*words, "--retry-truncated", "100"]) == 2 and "not more than the 100" in capsys.readouterr().err
    )
    assert command_line([*words, "--retry-truncated", "200", "--attempts", "1"]) == 0 and server.count == 27
    second = read_summary(dataset / "cut")
    assert (second.truncated, second.errors, second.done) == (2, 0, 24)
    assert second.macro == pytest.approx(22 / 24)
    assert second.notes == (
        "2 truncated answers were asked again with 200 tokens",
        "truncated answers that are kept because asking again failed: 1",
    )
    assert command_line([*words, "--retry-truncated", "200", "--attempts", "1"]) == 0 and server.count == 28
    assert command_line([*words, "--retry-truncated", "400", "--attempts", "1"]) == 0 and server.count == 30
    rows = {r["sent"]: r for r in read_rows(dataset / "cut")}
    one, two, three = rows["thing 3"], rows["thing 4"], rows["thing 5"]
    assert (one["max_tokens"], two["max_tokens"], three["max_tokens"]) == (200, 400, None)
    digests = {r["settings"] for r in (one, two, three)}
    assert len(digests) == 3 and one["evaluation"] == two["evaluation"] == three["settings"]
    assert [r["correct"] for r in (one, two, three)] == [True, True, False]
    found = read_answers(dataset / "cut")
    assert len(found) == 24 and found.correct.sum() == 23 and found.left_out == 0
    assert command_line(["rescore", str(dataset / "cut")]) == 0
    again = read_summary(dataset / "cut")
    assert again.notes == ("2 truncated answers were asked again with 200 and 400 tokens",)
    assert command_line(words) == 0 and server.count == 30


def finished(dataset, server, *more):
    """Evaluate one file by the command line; return the arguments and the folder."""
    out = dataset / "finished"
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", str(out), "--attempts", "1", *more]
    assert command_line(words) == 0
    return words, out


def test_scoring_again_keeps_what_was_allowed_and_what_was_left_out(dataset, server, capsys):
    rows = (dataset / "refcoco_val.jsonl").read_text().splitlines()
    rows[3] = rows[3].replace('"width": 100', '"width": 101')
    (dataset / "refcoco_val.jsonl").write_text("\n".join(rows) + "\n")
    server.plan = lambda n, asked: body(RIGHT, "content_filter" if "thing 5," in question_of(asked) else "stop")
    _, out = finished(dataset, server, "--errors-as-wrong", "--skip-broken", "1")
    before = json.loads((out / "summary.json").read_text())
    assert before["macro"] == pytest.approx(22 / 23) and (before["left_out"], before["errors_as_wrong"]) == (1, 1)
    assert command_line(["rescore", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text()) == before
    assert command_line(["rescore", str(out), "--strict"]) == 1 and "count" in capsys.readouterr().err


def test_scoring_again_keeps_the_note_on_another_model(dataset, server, capsys):
    server.plan = lambda n, asked: body(RIGHT, model="other")
    _, out = finished(dataset, server)
    before = (out / "summary.json").read_bytes()
    config = json.loads((out / "run_config.json").read_text())
    for known in (True, False):  # an earlier version did not store the name
        (out / "run_config.json").write_text(json.dumps({k: v for k, v in config.items() if known or k != "asked_as"}))
        assert command_line(["rescore", str(out), "--strict"]) == 1 and "'other'" in capsys.readouterr().err
        assert (out / "summary.json").read_bytes() == before
    assert command_line(["compare", str(out), str(out), "--strict"]) == 1


@pytest.mark.parametrize("field", ['{"n": 2}', '{"stream": true}', '{"messages": []}', "[1]", "{top_k: 1}"])
def test_a_field_that_is_the_evaluations_own_is_refused(dataset, server, capsys, field):
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    assert command_line([*words, "--endpoint", server.url, "--out", str(dataset / "o"), "--extra-body", field]) == 2
    assert "--extra-body" in capsys.readouterr().err and server.count == 0


@pytest.mark.parametrize(
    "forgotten",
    [["--prompt", "grounding"], ["--max-tokens", "99"], ["--system", "Be brief."], ["--model", "other"], ["FILE"]],
)
def test_a_forgotten_flag_does_not_wipe_a_finished_summary(dataset, server, capsys, forgotten):
    server.plan = lambda n, asked: KINDS["right"]
    _, out = finished(dataset, server)
    kept = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    file = "refcoco+_testA.jsonl" if forgotten == ["FILE"] else "refcoco_val.jsonl"
    words = ["eval", "--files", str(dataset / file), "--out", str(out), "--rescore", "--model", "m"]
    assert command_line([*words, *(forgotten if len(forgotten) > 1 else [])]) == 2
    assert "has 24 answers, of which only 0 belong to these rows" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()} == kept


def test_releases_that_differ_stay_a_note_when_nothing_is_asked(dataset, server):
    def serve(release):
        server.pages = {"/server_info": {"version": release}, "/v1/models": {"data": [{"id": "m"}]}}

    server.plan = lambda n, asked: KINDS["right"]
    serve("0.5.11")
    go(evaluation(dataset, server.url, engine="sglang", limit=4))
    serve("0.5.12")
    both = go(evaluation(dataset, server.url, engine="sglang"))
    said = "the endpoints run different releases of the engine: 0.5.11, 0.5.12"
    again = go(evaluation(dataset, server.url, engine="sglang"))
    assert said in both.notes and again.notes == both.notes and again.servers == both.servers


JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {{name: allowed}}
spec:
  model: {{source: hf://a/model}}
  endpoints: [{url}]
  maxErrors: {allowed}
  data: {{files: [refcoco_val.jsonl], images: [images]}}
"""


@pytest.mark.parametrize(("allowed", "macro"), [(0, None), (1, 23 / 24)])
def test_a_job_may_count_a_request_that_is_refused_for_ever_as_wrong(dataset, server, monkeypatch, allowed, macro):
    monkeypatch.chdir(dataset)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    server.plan = lambda n, asked: 400 if "thing 5," in question_of(asked) else KINDS["right"]
    (dataset / "job.yaml").write_text(JOB.format(url=server.url, allowed=allowed))
    if macro is None:
        with pytest.raises(Failure, match="1 of 24 requests failed"):
            evaluate_role(dataset / "job.yaml", dataset / "data", dataset / "job")
    else:
        evaluate_role(dataset / "job.yaml", dataset / "data", dataset / "job")
    summary = read_summary(dataset / "job")
    assert summary.macro == (None if macro is None else pytest.approx(macro))
    assert any("counts as wrong" in note for note in summary.notes) == (allowed == 1)


def test_an_own_prompt_sampling_and_fields_reach_the_server(dataset, server):
    def several(n, asked):
        whole = body(RIGHT)
        whole["choices"] = [
            {"index": i, "message": {"content": f"[{i}] {RIGHT}"}, "finish_reason": "stop"} for i in range(asked["n"])
        ]
        return whole

    server.plan = several
    prompt = 'Locate every object that matches "{sent}". Answer as {"bbox_2d": [...]}.'
    flags = ["--prompt", prompt, "--system", "Be exact.", "--temperature", "0.7", "--top-p", "0.8", "--top-k", "-1"]
    flags += [
        "--seed",
        "3",
        "--samples",
        "2",
        "--extra-body",
        '{"thinking_token_budget": 64, "repetition_penalty": null}',
    ]
    finished(dataset, server, *flags, "--limit", "2")
    for asked in server.bodies:
        system, question = asked["messages"]
        assert system == {"role": "system", "content": "Be exact."} and "repetition_penalty" not in asked
        assert question["content"][1]["text"] in {prompt.replace("{sent}", f"thing {i}") for i in range(2)}
        wanted = {"temperature": 0.7, "top_p": 0.8, "top_k": -1, "seed": 3, "n": 2, "thinking_token_budget": 64}
        assert wanted.items() <= asked.items()


def test_the_command_waits_for_a_server_that_loads(dataset, server):
    server.plan = lambda n, asked: 503 if n < 6 else KINDS["right"]
    _, out = finished(dataset, server, "--wait", "60", "--limit", "4")
    assert json.loads((out / "summary.json").read_text())["macro"] == 1.0


@pytest.mark.parametrize("form", ["lmms", "refer", "vlm-r1"])
def test_rows_of_a_public_form_are_imported_and_answered_right(dataset, server, form, capsys):
    rows = [json.loads(line) for line in (dataset / "refcoco_val.jsonl").read_text().splitlines()][:8]
    for row in rows:
        row["image"] = row["image"].lstrip("/")
    box = [10, 8, 40.5, 40]  # x, y, width, height
    if form == "lmms":
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = dataset / "val-00000-of-00001.parquet"
        pictures = {r["image"]: (dataset / "images" / r["image"]).read_bytes() for r in rows}
        made = [
            {
                "question_id": str(i),
                "image": {"bytes": pictures[r["image"]], "path": r["image"]},
                "question": "",
                "answer": [r["sent"]],
                "segmentation": [0.0],
                "bbox": box,
                "iscrowd": 0,
                "file_name": r["image"],
            }
            for i, r in enumerate(rows)
        ]
        pq.write_table(pa.Table.from_pylist(made), source)
    elif form == "refer":
        import pickle

        source = dataset / "refs(unc).p"
        refs = [
            {
                "ref_id": i,
                "ann_id": i,
                "image_id": i,
                "split": "val",
                "file_name": r["image"],
                "category_id": 1,
                "sent_ids": [i],
                "sentences": [{"sent": r["sent"], "raw": r["sent"], "sent_id": i, "tokens": []}],
            }
            for i, r in enumerate(rows)
        ]
        source.write_bytes(pickle.dumps(refs))
        size = {"width": 100, "height": 80}
        instances = {"images": [{"id": i, "file_name": r["image"], **size} for i, r in enumerate(rows)]}
        instances["annotations"] = [{"id": i, "image_id": i, "bbox": box, "category_id": 1} for i in range(len(rows))]
        (dataset / "instances.json").write_text(json.dumps(instances | {"categories": []}))
    else:
        source = dataset / "vlmr1.json"
        made = [
            {
                "image": r["image"],
                "problem": "",
                "normal_caption": r["sent"],
                "solution": r["bbox"],
                "width": 100,
                "height": 80,
            }
            for r in rows
        ]
        source.write_text(json.dumps(made))
    out = dataset / "imported"
    assert command_line(["data", "import", str(source), "--images", str(dataset / "images"), "--out", str(out)]) == 0
    (file,) = out.glob("*.jsonl")
    pictures = out / "images" if (out / "images").is_dir() else dataset / "images"
    server.plan = lambda n, asked: KINDS["right"]
    words = ["eval", "--files", str(file), "--images", str(pictures), "--model", "m", "--endpoint", server.url]
    assert command_line([*words, "--out", str(dataset / "measured")]) == 0
    summary = json.loads((dataset / "measured/summary.json").read_text())
    assert (summary["done"], summary["macro"]) == (8, 1.0)
    assert {tuple(r["bbox"]) for r in read_rows(dataset / "measured")} == {(10.0, 8.0, 50.5, 48.0)}
