"""Several settings in one run: folders, resuming, the order of pictures, and the division of time."""

import itertools
import json
import time
from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from grounding.errors import Failure, UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.costs import Hardware
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.method import Method
from grounding.evaluate.plan import plan
from grounding.evaluate.results.reader import read_answers
from grounding.evaluate.results.writer import read_rows
from grounding.evaluate.run import run
from grounding.evaluate.summary_model import read_summary
from grounding.evaluate.sweep import Axes, is_sweep, read_sweep, run_sweep, sweep_table

CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "model_type": "qwen3",
}
AXES = Axes(thinking_budgets=(0, 6), samples=(1, 2))
METHODS = AXES.methods()


def completion(text, tokens, finish="stop"):
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 7, "completion_tokens": tokens},
    }


def thinker(n, body):
    """Reply as a model that thinks longer than any budget, and whose box is better after a longer thought."""
    last = body["messages"][-1]
    if last["role"] == "user":
        return completion("word " * body["max_tokens"], body["max_tokens"], "length")
    right = "word" in last["content"]
    return completion(f'[{{"bbox_2d": [100, 100, {500 if right else 120}, 600]}}]', 5)


def evaluation(dataset, server, out="out", **changes):
    chosen, sampling = get_engine("transformers"), Sampling(temperature=0.5)
    options = {"concurrency": 4, "attempts": 2, "backoff_s": 0.01, "timeout_s": 10.0, "unreachable_s": 0.3}
    client = Options(
        (server.url,),
        Request("m", "qwen3", chosen.request_extras(sampling)),
        served_by=chosen,
        sampling=sampling,
        **options,
    )
    files = (dataset / "refcoco+_testA.jsonl", dataset / "refcoco_val.jsonl")
    return Evaluation(files, (dataset / "images",), dataset / out, "m", client, sampling, **changes)


def test_the_product_of_the_axes_each_once():
    assert [m.name for m in METHODS] == ["think-0", "think-0_samples-2", "think-6", "think-6_samples-2"]
    assert Axes(samples=(1, 1, 2)).methods(Method(thinking_budget=3)) == (Method(1, 3), Method(2, 3))
    assert Axes().methods() == (Method(),)


def test_each_setting_has_results_of_its_own_that_anything_else_can_read(dataset, server):
    server.plan = thinker
    summary = run_sweep(evaluation(dataset, server), METHODS)
    assert (summary.done, summary.total, summary.reason) == (192, 192, None)
    out = dataset / "out"
    assert is_sweep(out) and read_summary(out).settings == summary.settings
    settings = read_sweep(out)
    assert [s.method for s in settings] == list(METHODS)
    macro = {}
    for s in settings:
        rows = list(read_rows(s.folder))
        assert len(rows) == 48 and len(read_answers(s.folder)) == 48
        assert {r["reasoning_tokens"] for r in rows} == {s.method.samples * s.method.thinking_budget}
        assert {len(r.get("samples") or [0]) for r in rows} == {s.method.samples}
        macro[s.name] = json.loads((s.folder / "summary.json").read_bytes())["macro"]
        assert (s.folder / "results.parquet").is_file()
    assert macro["think-0"] == macro["think-0_samples-2"] < macro["think-6"] == macro["think-6_samples-2"]
    assert [s.macro for s in summary.settings] == list(macro.values())
    assert sweep_table(summary).row_count == 4


def test_a_setting_alone_gives_the_same_rows(dataset, server):
    server.plan = thinker
    run_sweep(evaluation(dataset, server), METHODS)
    e = evaluation(dataset, server, out="alone")
    e = replace(e, client=replace(e.client, method=METHODS[3]))
    run(e, plan(e))

    def steady(folder):
        return {r["key"]: (r["text"], r["iou"], r["reasoning"], r["settings"]) for r in read_rows(folder)}

    assert steady(dataset / "alone") == steady(dataset / "out/settings/think-6_samples-2")


def test_a_picture_is_asked_about_by_all_settings_before_the_next_one(dataset, server):
    server.plan = thinker
    pictures = []
    server.metrics = lambda: ""

    def plan_(n, body):
        pictures.append(body["messages"][0]["content"][0]["image_url"]["url"])
        return thinker(n, body)

    server.plan = plan_
    e = evaluation(dataset, server)
    e = replace(e, client=replace(e.client, concurrency=1))
    run_sweep(e, METHODS)
    changes = sum(a != b for a, b in itertools.pairwise(pictures))
    assert changes == len(set(pictures)) - 1 == 5


@pytest.mark.parametrize("stop", [7, 60])
def test_it_goes_on_where_it_was_stopped(dataset, server, stop):
    def breaks(n, body):
        return 500 if n >= stop else thinker(n, body)

    server.plan = breaks
    with pytest.raises(Failure):
        run_sweep(evaluation(dataset, server), METHODS)
    before = {s.name: Counter(r["key"] for r in read_rows(s.folder) if r["text"]) for s in read_sweep(dataset / "out")}
    assert 0 < sum(map(len, before.values())) < 192
    server.plan = thinker
    summary = run_sweep(evaluation(dataset, server, retry_errors=True), METHODS)
    assert (summary.done, summary.errors, summary.reason) == (192, 0, None)
    for s in read_sweep(dataset / "out"):
        asked = Counter(r["key"] for r in read_rows(s.folder) if r["text"])
        assert len(asked) == 48 and set(asked.values()) == {1}  # 48 questions, each of which was asked once
    whole = run_sweep(evaluation(dataset, server, out="whole"), METHODS)
    costless = [[s.model_copy(update={"costs": None}) for s in each.settings] for each in (whole, summary)]
    assert costless[0] == costless[1]


def test_gpu_time_is_divided_and_adds_up(dataset, server):
    server.plan, server.delay = thinker, 0.01
    start = time.monotonic()
    run_sweep(evaluation(dataset, server, hardware=Hardware(gpus=4)), METHODS)
    wall = time.monotonic() - start
    found = [read_summary(s.folder).costs for s in read_sweep(dataset / "out")]
    total = sum(c.gpu_seconds for c in found)
    assert total <= 4 * wall and total == pytest.approx(4 * sum(c.serving_seconds for c in found), rel=0.01)
    assert found[0].gpu_seconds < found[3].gpu_seconds  # one request per question instead of four
    assert found[0].generated_tokens == 5 and found[3].generated_tokens == 22 and found[3].thought_tokens == 12


def test_gpu_seconds_of_all_settings_are_the_wall_time_of_all_gpus(dataset, server):
    """The costs are within 2 % of the server's own measurement; the test tries six times, because the machine may stall."""
    seen, delay = [], 0.05

    def timed(n, body):
        seen.append(time.monotonic())
        return thinker(n, body)

    server.plan, server.delay = timed, delay
    for number in range(6):
        seen.clear()
        e = evaluation(dataset, server, out=f"out{number}", hardware=Hardware(gpus=4, price_per_gpu_hour=2.0))
        run_sweep(replace(e, files=e.files[:1]), METHODS)
        out, wall = dataset / f"out{number}", seen[-1] - seen[0] + delay
        found = _costs(out)
        counted = sum(c.gpu_seconds for c in found)
        if counted == pytest.approx(4 * wall, rel=0.02):
            break
    assert wall > 1 and counted == pytest.approx(4 * wall, rel=0.02)
    assert sum(c.money for c in found) == pytest.approx(2.0 * counted / 3600)
    for c, s in zip(found, read_sweep(out), strict=True):
        rows = pq.read_table(s.folder / "results.parquet", columns=["gpu_seconds", "flops"]).to_pydict()
        assert sum(rows["gpu_seconds"]) == pytest.approx(c.gpu_seconds, rel=1e-3)
        assert rows["flops"] == [None] * 24


def test_gpu_seconds_of_a_run_that_was_stopped_are_counted_too(dataset, server):
    server.plan, server.delay = lambda n, body: 500 if n >= 20 else thinker(n, body), 0.02
    e = evaluation(dataset, server, hardware=Hardware(gpus=4), retry_errors=True)
    with pytest.raises(Failure):
        run_sweep(e, METHODS)
    before = sum(c.gpu_seconds for c in _costs(dataset / "out"))
    server.plan = thinker
    run_sweep(e, METHODS)
    assert 0 < before < sum(c.gpu_seconds for c in _costs(dataset / "out"))


def _costs(out):
    return [read_summary(s.folder).costs for s in read_sweep(out)]


def test_a_setting_that_cannot_work_stops_before_anything_is_asked(dataset, server):
    e = evaluation(dataset, server)
    with pytest.raises(UserError, match="temperature 0"):
        run_sweep(replace(e, sampling=Sampling()), METHODS)
    assert server.count == 0 and not (dataset / "out").exists()


def test_smaller_pictures_are_a_picture_each(dataset, server):
    summary = run_sweep(evaluation(dataset, server), Axes(max_pixels=(1024, 4000)).methods())
    assert summary.done == 96
    sent = {b["messages"][0]["content"][0]["image_url"]["url"] for b in server.bodies}
    assert len(sent) == 12  # six pictures in two sizes


def test_a_job_with_a_sweep_leaves_every_setting_and_what_its_servers_cost(dataset, server, monkeypatch):
    from grounding.evaluate.role import evaluate_role

    server.plan = thinker
    model = dataset / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    job = {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingEvalJob",
        "metadata": {"name": "sweep"},
        "spec": {
            "model": {"source": str(model)},
            "engine": "sglang",
            "gpusPerServer": 2,
            "data": {"files": [str(dataset / "refcoco_val.jsonl")], "images": [str(dataset / "images")]},
            "sampling": {"temperature": 0.5, "maxTokens": 64},
            "sweep": {"thinkingBudgets": [0, 6], "samples": [2]},
            "pricePerGpuHour": 2.0,
            "concurrency": 4,
        },
    }
    (dataset / "job.yaml").write_text(json.dumps(job))
    monkeypatch.setenv("EGM_ENDPOINTS", server.url)
    out = dataset / "run" / "sweep"
    evaluate_role(dataset / "job.yaml", dataset / "data", out)
    assert [s.name for s in read_sweep(out)] == ["think-0_samples-2", "think-6_samples-2"]
    for s in read_sweep(out):
        costs = read_summary(s.folder).costs
        assert costs.questions == 24 and costs.flops > 0
        flops = pq.read_table(s.folder / "results.parquet").column("flops").to_pylist()
        assert sum(flops) / 24 == pytest.approx(costs.flops)
        assert costs.gpu_seconds == pytest.approx(2 * costs.serving_seconds, abs=0.01)
        assert costs.money == pytest.approx(costs.gpu_seconds / 1800)
    # two of the requests check that the server continues messages
    assert {b["max_tokens"] for b in server.bodies[2:]} == {6, 64}
