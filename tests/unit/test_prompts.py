"""Prompts are correct word for word, and no expression can change the template."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding import prompts
from grounding.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", "Locate red cup, output its bbox coordinates using JSON format"),
        ("qwen3_amodal", "Locate red cup amodally, output its bbox coordinates using JSON format"),
        (
            "grounding",
            "Please provide the bounding box coordinate of the region this sentence describes: <ref>red cup</ref> ",
        ),
        (
            "amodal",
            "Please provide the amodal bounding box coordinate of the region this sentence describes: <ref>red cup</ref>",
        ),
    ],
)
def test_templates_word_for_word(name, expected):
    assert prompts.render(name, "red cup") == expected


def test_all_names_are_tested():
    assert set(prompts.NAMES) == {"qwen3", "qwen3_amodal", "grounding", "amodal"}


@given(st.sampled_from(prompts.NAMES), st.text() | st.sampled_from(["{sent}", "{0}", "{", "}}", "%s", "\\1"]))
def test_the_expression_stands_in_the_prompt_untouched(name, sent):
    before, after = prompts.render(name, "\0").split("\0")
    assert prompts.render(name, sent) == before + sent + after


def test_sft_ends_with_a_full_stop():
    assert prompts.render_sft("qwen3", "a {b}") == "Locate a {b}, output its bbox coordinates using JSON format."


def test_unknown_name_lists_the_names():
    with pytest.raises(UserError, match="qwen3_amodal") as e:
        prompts.render("qwen4", "x")
    assert "qwen4" in str(e.value)
