"""Which model belongs to which family, before anything is loaded."""

from pathlib import Path

import pytest

from grounding.errors import UserError
from grounding.train import families


def _model(folder: Path, kind: str) -> Path:
    (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    return folder


@pytest.mark.parametrize(("family", "kind"), [("qwen3-vl", "qwen3_vl"), ("internvl", "internvl")])
def test_native_layouts_are_taken(family: str, kind: str, tmp_path: Path) -> None:
    families.check(family, _model(tmp_path, kind))


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("qwen3-vl", "internvl", r"Set spec\.model\.family to internvl"),
        ("internvl", "internvl_chat", r"native one\n.*-hf"),
        ("qwen3-vl", "llama", r"of type 'llama', the job says qwen3-vl\nKnown are"),
    ],
)
def test_others_are_refused_with_the_way(family: str, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        families.check(family, _model(tmp_path, kind))


def test_a_model_that_is_not_there_is_another_s_complaint(tmp_path: Path) -> None:
    families.check("internvl", tmp_path / "absent")
    families.check("qwen3-vl", "tiny://")
