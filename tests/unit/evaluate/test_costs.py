"""The costs of an evaluation: properties of the formula, the content of a summary, and the division of time in a sweep."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.api.base import read_known
from grounding.errors import UserError
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.costs import Hardware, read_shape
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.flops import shape_of
from grounding.evaluate.method import Method
from grounding.evaluate.plan import plan
from grounding.evaluate.run import run
from grounding.evaluate.summary_model import Costs, Summary

CONFIG = {
    "model_type": "qwen3_vl",
    "text_config": {
        "hidden_size": 8,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 3,
        "vocab_size": 50,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 4,
        "intermediate_size": 6,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "out_hidden_size": 8,
        "deepstack_visual_indexes": [0],
    },
}


def test_the_formula_by_hand():
    shape = shape_of(CONFIG)
    # per layer: q 8x6, k and v 8x3 each, o 6x8, three matrices 8x20
    assert shape.token == 2 * 2 * (48 + 24 + 24 + 48 + 480)
    assert shape.generated(0, 1) == shape.token + 2 * 8 * 50 + 4 * 2 * 6 * 1
    assert shape.generated(9, 1) - shape.generated(0, 1) == 4 * 2 * 6 * 9
    assert shape.parameters == 2 * 624 + 400
    patches, token = 4, 1
    assert shape.tower.flops(token) == 2 * patches * (
        3 * 2 * 256 * 4 + 4 * 16 + 2 * 24
    ) + 4 * 4 * patches**2 + 2 * 2 * (16**2 + 16 * 8)


@given(st.integers(0, 5000), st.integers(0, 500), st.integers(0, 500))
def test_tokens_cost_the_same_in_one_go_and_in_two(before, a, b):
    shape = shape_of(CONFIG)
    assert shape.generated(before, a + b) == pytest.approx(shape.generated(before, a) + shape.generated(before + a, b))
    assert shape.generated(0, a) == pytest.approx(shape.prompt(a) + a * 2 * 8 * 50)


def test_a_mixture_of_experts_counts_the_experts_that_a_token_uses():
    text = CONFIG["text_config"] | {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    dense, sparse = shape_of(CONFIG), shape_of(CONFIG | {"text_config": text})
    assert sparse.token - dense.token == 2 * 2 * 8 * 16  # both use the same width per token; only the router is added


def test_a_model_that_the_formula_does_not_know_has_no_tower_and_a_broken_one_is_an_error():
    shape = shape_of(CONFIG | {"model_type": "internvl"})
    assert shape.tower is None and shape.picture(640, 480) == 0.0
    with pytest.raises(UserError, match="num_attention_heads"):
        shape_of({})


def answered(dataset, server, hardware=None, method=None, out="out", **changes):
    sampling = Sampling(temperature=0.5)
    chosen = get_engine("transformers")
    client = Options(
        (server.url,),
        Request("m", "qwen3", chosen.request_extras(sampling)),
        4,
        method=method or Method(),
        served_by=chosen,
        sampling=sampling,
    )
    files = (dataset / "refcoco+_testA.jsonl", dataset / "refcoco_val.jsonl")
    e = Evaluation(
        files, (dataset / "images",), dataset / out, "m", client, sampling, hardware=hardware or Hardware(), **changes
    )
    return run(e, plan(e))


def test_a_summary_holds_what_it_cost(dataset, server, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shape = read_shape(tmp_path)
    hardware = Hardware(8, 3.0, "EUR", shape)
    server.delay = 0.01
    summary = answered(dataset, server, hardware)
    costs = summary.costs
    assert isinstance(costs, Costs) and costs.questions == summary.done == 48
    assert (costs.prompt_tokens, costs.generated_tokens, costs.thought_tokens, costs.answer_tokens) == (
        7,
        5,
        None,
        None,
    )
    assert costs.flops == pytest.approx(shape.prompt(7) + shape.generated(7, 5) + shape.picture(100, 80))
    assert costs.serving_seconds == summary.wall_seconds > 0.1
    assert costs.gpu_seconds == pytest.approx(8 * summary.wall_seconds, rel=0.02)
    assert costs.money == pytest.approx(costs.gpu_seconds / 3600 * 3.0) and costs.currency == "EUR"
    assert costs.concurrency == 4
    assert 0.01 <= costs.latency_p50 <= costs.latency_p90 <= costs.latency_p99


def test_what_nobody_has_said_is_not_known(dataset, server):
    costs = answered(dataset, server).costs
    assert (costs.flops, costs.gpu_seconds, costs.money, costs.parameters) == (None, None, None, None)
    assert (
        read_known(Summary, {"costs": {"questions": 3}}).costs is None
        and read_known(Summary, {"costs": 5}).costs is None
    )


def test_all_answers_to_a_question_count(dataset, server):
    costs = answered(dataset, server, method=Method(samples=3)).costs
    assert (costs.prompt_tokens, costs.generated_tokens) == (7, 15)


def test_time_that_was_served_before_counts_too(dataset, server):
    first = answered(dataset, server, limit=6)
    again = answered(dataset, server)
    assert again.costs.serving_seconds > first.costs.serving_seconds
