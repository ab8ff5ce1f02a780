"""The documentation of fields, which is made from the models."""

from typing import Any

import pytest
from pydantic import BaseModel

from grounding.api import KINDS
from grounding.api.explain import explain
from grounding.api.manifest import submodel
from grounding.errors import UserError


def _paths(model: type[BaseModel], prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, field in model.model_fields.items():
        path = f"{prefix}.{field.alias or name}"
        found.append((path, field))
        inner = submodel(field.annotation)
        found += _paths(inner, path) if inner else []
    return found


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.__name__)
def test_every_field_is_documented_and_can_be_explained(kind: Any) -> None:
    for path, field in _paths(kind, kind.short_name):
        assert field.description, f"{path} has no description"
        assert path.rsplit(".", 1)[1] in explain(path)


def test_what_a_reader_sees() -> None:
    text = explain("gtj.spec.reward")
    assert "KIND:       GroundingTrainJob" in text and "default: 0.5" in text
    assert "one of: mix, sigmoid, normalized_exp, penalty, eval" in text
    assert max(map(len, explain("gej.spec", width=80).splitlines())) <= 80
    assert "learningRate" in explain("GroundingTrainJob", recursive=True)


@pytest.mark.parametrize(
    ("path", "words"),
    [("gtx.spec", "not a kind"), ("gtj.spec.rewards", "Did you mean reward"), ("gtj.spec.seed.x", "has no fields")],
)
def test_a_path_that_leads_nowhere(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        explain(path)
