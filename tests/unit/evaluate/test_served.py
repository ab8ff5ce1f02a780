"""The model as servers' pages describe it (SGLang 0.5.12 and vLLM 0.24), and servers that differ from each other."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.evaluate.engines import ENGINES, get_engine
from grounding.evaluate.reply import Reply, read_reply
from grounding.evaluate.served import LONGEST, UNKNOWN, ServedModel, difference, distinct, listed, misnamed

SGLANG = {
    "models": {
        "object": "list",
        "data": [
            {
                "id": "egm",
                "object": "model",
                "owned_by": "sglang",
                "root": "egm",
                "parent": None,
                "max_model_len": 32768,
            },
            {"id": "left", "object": "model", "root": "/adapters/left", "parent": "egm", "max_model_len": None},
        ],
    },
    "model": {"model_path": "/models/EGM-8B", "tokenizer_path": "/models/EGM-8B", "weight_version": "default"},
    "server": {"version": "0.5.12", "api_key": "sk-secret", "internal_states": [{}]},
}
VLLM = {
    "models": {
        "object": "list",
        "data": [
            {"id": "egm", "object": "model", "owned_by": "vllm", "root": "/models/EGM-8B", "parent": None},
            {"id": "egm-8b", "object": "model", "owned_by": "vllm", "root": "/models/EGM-8B", "parent": None},
            {"id": "left", "object": "model", "root": "/adapters/left", "parent": "egm"},
        ],
    },
    "version": {"version": "0.24.0"},
}


@pytest.mark.parametrize(
    ("engine", "pages", "asked_as", "found"),
    [
        ("sglang", SGLANG, "egm", ServedModel(None, "egm", "/models/EGM-8B", "default", "0.5.12")),
        ("sglang", SGLANG, "another", ServedModel(None, "egm", "/models/EGM-8B", "default", "0.5.12")),
        ("sglang", SGLANG, "egm:left", ServedModel(None, "egm:left", "/adapters/left", "default", "0.5.12")),
        ("sglang", SGLANG, "egm:right", ServedModel(None, "egm", "/models/EGM-8B", "default", "0.5.12")),
        ("sglang", {}, "egm", UNKNOWN),
        ("vllm", VLLM, "egm-8b", ServedModel(None, "egm-8b", "/models/EGM-8B", None, "0.24.0")),
        ("vllm", VLLM, "left", ServedModel(None, "left", "/adapters/left", None, "0.24.0")),
        ("vllm", VLLM, "another", ServedModel(None, "egm", "/models/EGM-8B", None, "0.24.0")),
        ("vllm", {"version": "0.24.0"}, "egm", UNKNOWN),
        ("openai", {"models": {"data": [{"id": "a"}, {"id": "b"}]}}, "b", ServedModel(id="b")),
        ("openai", {"models": {"data": [{"id": "a"}, {"id": "b"}]}}, "c", UNKNOWN),
        ("openai", {"models": {"data": [{"id": "a"}]}}, "c", ServedModel(id="a")),
        ("transformers", SGLANG, "egm", UNKNOWN),
    ],
)
def test_pages_are_read(engine, pages, asked_as, found):
    assert get_engine(engine).served(pages, asked_as) == found


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["data", "id", "root", "parent", "version"]), x)
    ),
    max_leaves=10,
)


@given(st.sampled_from(sorted(ENGINES)), _JSON, _JSON, _JSON, st.none() | st.text(max_size=3))
def test_any_page_says_something_or_nothing(engine, models, model, version, asked_as):
    pages = {"models": models, "model": model, "server": version, "version": version}
    found = get_engine(engine).served(pages, asked_as)
    assert all(v is None or (isinstance(v, str) and 0 < len(v) <= LONGEST) for v in found)
    assert str(found) and listed(models, asked_as).reply is None


_MODEL = st.builds(ServedModel, *[st.sampled_from([None, "a", "b"])] * 5)


@given(_MODEL, _MODEL)
def test_a_difference_is_one_from_either_side_and_needs_two_statements(one, other):
    found = difference(one, other)
    assert (found is None) == (difference(other, one) is None)
    facts = [(x, y) for x, y in zip(one[:4], other[:4], strict=True) if x is not None and y is not None]
    assert (found is None) == all(x == y for x, y in facts)
    assert difference(one, one.over(other)) is None and difference(one, UNKNOWN) is None


@given(st.lists(_MODEL, max_size=6))
def test_the_distinct_ones_contradict_each_other_and_leave_none_out(models):
    found = distinct(models)
    assert all(difference(a, b) for i, a in enumerate(found) for b in found[:i])
    assert all(m == UNKNOWN or any(difference(m, f) is None for f in found) for m in models)


def test_the_name_that_was_asked_for():
    assert misnamed(ServedModel("x", "x"), "x") is None and misnamed(ServedModel("x", "y"), None) is None
    assert misnamed(ServedModel("x", "y"), "x") == "y" and misnamed(ServedModel("y", "x"), "x") == "y"
    assert misnamed(UNKNOWN, "x") is None


def test_sglang_says_its_weight_version_in_each_reply():
    raw = {
        "model": "any name",
        "choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
        "metadata": {"weight_version": "step-200"},
    }
    reply, _ = read_reply(orjson.dumps(raw), 0.1)
    assert reply.served == ServedModel("any name", weight_version="step-200")
    for odd in (None, [], {"weight_version": 7}, {"weight_version": ""}):
        assert read_reply(orjson.dumps(raw | {"metadata": odd}), 0.1)[0].weight_version is None
    assert Reply("x").served == UNKNOWN
