"""Random replies over several servers and restarts: the macro mean equals that of a brute-force scorer, or a reason is
given.

The scorer shares no code with the project: it reads the lines of the results as JSON, and knows which texts are right.
"""

import json
import random
from collections import defaultdict
from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_server import CLOSE, RESET, OddServer, http
from PIL import Image

from grounding.errors import EgmError, UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.run import run
from grounding.evaluate.summary_model import read_summary

FILES, ROWS = ("refcoco_val", "refcoco+_testA"), 8
RIGHT, WRONG = '[{"bbox_2d": [100, 100, 505, 600]}]', '[{"bbox_2d": [600, 600, 900, 900]}]'


def completion(content, finish="stop", model="m", **message):
    return {"model": model, "choices": [{"message": {"content": content, **message}, "finish_reason": finish}]}


ANSWERS = {
    "right": completion(RIGHT),
    "wrong": completion(WRONG),
    "reasoning only": completion(None, reasoning_content=RIGHT),
    "reasoning only, wrong": completion("", reasoning=WRONG),
    "both": completion(RIGHT, reasoning_content=WRONG),
    "truncated": completion("a long thought", "length"),
    "truncated, but right": completion(RIGHT, "length"),
    "empty": completion(""),
    "no box": completion("on the left"),
}
OTHERS = {
    "of another model": completion(RIGHT, model="other"),
    "of another model, wrong": completion(WRONG, model="other"),
}
FAILURES = {
    "aborted": http(completion(RIGHT, "abort")),
    "filtered": http(completion(RIGHT, "content_filter")),
    "null": http(completion(RIGHT, None)),
    "garbage": http("<html>"),
    "nothing": http({"choices": []}),
    "busy": http("busy", 429),
    "failing": http("no", 500),
    "refused": http("no", 400),
    "half": [http(completion(RIGHT))[:-30], RESET],
    "closed": [CLOSE],
}
KINDS = [*ANSWERS, *OTHERS, *FAILURES]


class Start:
    """One start of the evaluation: the replies of its servers, and its options."""

    def __init__(self, kinds, paths, mixed, allowed, lives):
        self.kinds, self.paths, self.mixed, self.allowed, self.lives = kinds, paths, mixed, allowed, lives

    def __repr__(self):
        return f"Start({vars(self)})"


STARTS = st.builds(
    Start,
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6).map(
        lambda kinds: ["right", "right", "wrong", *kinds]
    ),
    paths=st.lists(st.sampled_from(["/m", "/m", "/m", "/other"]), min_size=1, max_size=3),
    mixed=st.sampled_from([False, False, True]),
    allowed=st.sampled_from([0, 0, 2, 99]),
    lives=st.sampled_from([None, None, 3, 9]),
)
"""`allowed`: number of failed rows that count as wrong. `lives`: number of replies after which all servers reset every connection"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interleaved")
    for i in range(4):
        Image.new("RGB", (100, 80), (60 * i, 10, 10)).save(folder / f"{i}.png")
    box = {"bbox": [10, 8, 50.5, 48], "width": 100, "height": 80}
    for name in FILES:
        rows = [{"image": f"{i % 4}.png", "sent": f"{name} {i}"} | box for i in range(ROWS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def rows_of(out):
    """Return the last stored row of each key."""
    rows = {}
    for part in sorted((out / "results").glob("part-*.jsonl")):
        for line in part.read_text().splitlines():
            row = json.loads(line)
            rows[row["key"]] = row
    return list(rows.values())


def scored_text(row):
    return row["text"] if row["text"].strip() else row["reasoning"] or row["text"]


def brute_force(rows, allowed):
    """Return the macro mean, or None if a row is missing or more than `allowed` rows have failed."""
    failed = [r for r in rows if r["outcome"] == "error"]
    if len(rows) < len(FILES) * ROWS or len(failed) > allowed:
        return None
    hits = defaultdict(list)
    for row in rows:
        hits[row["file"]].append(row["outcome"] != "error" and scored_text(row) == RIGHT)
    return sum(sum(h) / len(h) for h in hits.values()) / len(hits)


def same_model(one, other):
    names = ("served_model", "served_id", "served_path")
    return all(None in (one[n], other[n]) or one[n] == other[n] for n in names)


@given(st.integers(0, 2**32), st.lists(STARTS, min_size=2, max_size=4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.timeout(900)
def test_the_macro_is_a_brute_force_scorers_or_why_not_is_said(data, tmp_path_factory, seed, starts):
    out, chance = tmp_path_factory.mktemp("out") / "out", random.Random(seed)
    sent, servers, state = set(), [], {}

    def reply(question, n):
        state["left"] -= 1
        if state["left"] < 0:
            return [RESET]
        kind = chance.choice(state["kinds"])
        if kind in FAILURES:
            return FAILURES[kind]
        whole = (ANSWERS | OTHERS)[kind]
        choice = whole["choices"][0]
        said = choice["message"]
        thought = said.get("reasoning_content") or said.get("reasoning")
        sent.add((question, said["content"] or "", thought, choice["finish_reason"], whole["model"]))
        return http(whole)

    try:
        ever_mixed = False
        for start in starts:
            while len(servers) < len(start.paths):
                servers.append(OddServer(reply))
            here = servers[: len(start.paths)]
            for server, path in zip(here, start.paths, strict=True):
                server.pages["/v1/models"], server.pages["/model_info"] = {"data": [{"id": "m"}]}, {"model_path": path}
            state |= {"kinds": start.kinds, "left": 10**9 if start.lives is None else start.lives}
            client = Options(
                tuple(s.url for s in here),
                Request("m", "{sent}"),
                concurrency=4,
                attempts=2,
                refusals=3,
                backoff_s=0.005,
                timeout_s=20.0,
                unreachable_s=0.05,
                mixed=start.mixed,
            )
            files = tuple(data / f"{name}.jsonl" for name in FILES)
            e = Evaluation(
                files, (data,), out, "m", client, retry_errors=True, max_errors=start.allowed, engine="sglang"
            )
            problem = None
            try:
                summary = run(e, plan(e))
            except EgmError as error:
                problem = error
                summary = read_summary(out)
            rows = rows_of(out) if (out / "results").is_dir() else []
            answered = [r for r in rows if r["outcome"] != "error"]

            found = brute_force(rows, start.allowed)
            assert summary.macro == (None if found is None else pytest.approx(found))
            assert (summary.macro is None) == bool(summary.reason)
            failed = len(rows) - len(answered)
            assert summary.errors == failed and summary.total == len(FILES) * ROWS
            assert summary.done == len(answered) + (failed if failed <= start.allowed else 0)
            if found is not None and failed:
                assert any("as wrong" in note for note in summary.notes)
            for row in answered:  # every answer was sent by a server, complete and finished, for this question
                text = row["text"], row["reasoning"], row["finish_reason"], row["served_model"]
                assert (row["sent"], *text) in sent
                assert bool(row["correct"]) == (scored_text(row) == RIGHT)
            ever_mixed |= start.mixed
            if not all(same_model(a, b) for a, b in combinations(answered, 2)):
                assert ever_mixed and any("different models" in note for note in summary.notes)
            if isinstance(problem, UserError):
                assert not start.mixed and (
                    "different models" in problem.message or "the answers so far" in problem.message
                )
    finally:
        for server in servers:
            server.close()
