"""The conditions of the answers in a folder, and the differences between two folders."""

from __future__ import annotations

import pytest

from grounding.evaluate.results.conditions import (
    Conditions,
    served_alike,
    served_differently,
    settings_differences,
    settings_of,
)
from grounding.evaluate.served import ServedModel

DRAWN = {"max_tokens": 4096, "temperature": 0.0, "top_p": 1.0, "top_k": 20, "presence_penalty": 0.0}
DRAWN |= {"repetition_penalty": 1.0, "seed": None}
NOW = {"sampling": DRAWN, "system": "", "body": {}, "method": {}, "send_images": "data"}


def test_results_of_the_first_release_say_the_same_settings() -> None:
    first = {"request": {"max_tokens": 4096, "temperature": 0.0, "top_p": 1.0}}
    assert settings_differences(settings_of(first), settings_of(NOW)) == []
    assert settings_differences(settings_of({"request": {"max_tokens": 100}}), settings_of(NOW)) == [
        "sampling.max_tokens is 100 in A and 4096 in B"
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"sampling": DRAWN | {"temperature": 0.7, "seed": 3}},
            ["sampling.seed is not set", "sampling.temperature is"],
        ),
        ({"system": "Be brief."}, ["system message is not set in A and Be brief. in B"]),
        ({"body": {"top_k": None}}, ["request field top_k is not set in A and left out in B"]),
        ({"body": {"thinking": {"tokens": 5}}}, ["request field thinking is not set in A and {'tokens': 5} in B"]),
        ({"method": {"samples": 4}}, ["method samples is not set in A and 4 in B"]),
        ({"method": {"max_pixels": 5000}}, ["method max_pixels is not set in A and 5000 in B"]),
        ({"send_images": "png"}, ["pictures sent as is data in A and png in B"]),
        ({"endpoints": ["http://b"], "concurrency": 3, "limit": 9}, []),
    ],
)
def test_a_difference_is_named(changes: dict[str, object], says: list[str]) -> None:
    found = settings_differences(settings_of(NOW), settings_of(NOW | changes))
    assert len(found) == len(says) and all(f.startswith(s) for f, s in zip(found, says, strict=True))


def test_what_is_not_known_is_said_only_if_the_other_is() -> None:
    assert settings_of({}) is None and settings_differences(None, None) == []
    assert settings_differences(None, settings_of(NOW)) == ["those of A are unknown"]
    assert settings_differences(settings_of(NOW), None) == ["those of B are unknown"]


M = ServedModel(id="m", path="/a", weight_version="1")


@pytest.mark.parametrize(
    ("one", "other", "alike", "apart"),
    [
        (M, M, True, False),
        (M._replace(reply="x"), M._replace(reply="y"), True, True),  # the servers only repeat the name in the request
        (M, M._replace(path="/b"), False, True),
        (M, M._replace(weight_version="2"), False, True),
        (M, M._replace(path=None), False, False),
        (ServedModel(reply="x"), ServedModel(reply="x"), False, False),
        (ServedModel(path="/a"), ServedModel(path="/a"), True, False),
    ],
)
def test_models_are_alike_apart_or_neither(one: ServedModel, other: ServedModel, alike: bool, apart: bool) -> None:
    a, b = Conditions(served=(one,)), Conditions(served=(other,))
    assert (served_alike(a, b) is not None) == alike and (served_differently(a, b) is not None) == apart
    assert served_alike(a, Conditions()) is None and served_differently(Conditions(), b) is None
