"""Each typed hyperparameter of SFT is read by the code that trains."""

from __future__ import annotations

import ast
from pathlib import Path

from grounding.api.resolved import SftHyperparameters

TRAIN = Path(__file__).parents[4] / "grounding" / "train"
BY_OTHERS = {"keep_best": ("grounding/api/validation.py", "keep_best")}
"""Fields that training code reads through a function: the file and the text"""


def _read() -> set[str]:
    """Return the names of all attributes that the modules of SFT, and those that they share with RL, read."""
    files = [*TRAIN.glob("sft/*.py"), *TRAIN.glob("checkpoints/*.py"), TRAIN / "lora.py"]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_no_typed_hyperparameter_of_sft_is_without_a_reader() -> None:
    for file, text in BY_OTHERS.values():
        assert text in (TRAIN.parents[1] / file).read_text()
    assert sorted(set(SftHyperparameters.model_fields) - _read() - set(BY_OTHERS)) == []
