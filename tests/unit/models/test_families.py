"""The family of a model is known before anything is loaded."""

from pathlib import Path

import pytest

from grounding.api import ManifestError, ModelRef, ResolvedJob, RlJob, SftJob, parse
from grounding.api.families import FAMILIES
from grounding.errors import UserError
from grounding.models import families


def _model(folder: Path, kind: str) -> Path:
    (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    return folder


@pytest.mark.parametrize(("family", "kind"), [(f.name, kind) for f in FAMILIES.values() for kind in f.model_types])
def test_native_layouts_are_taken(family: str, kind: str, tmp_path: Path) -> None:
    families.check(family, _model(tmp_path, kind))


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("qwen3-vl", "internvl", r"Set spec\.model\.family to internvl"),
        ("internvl", "internvl_chat", r"native layout\n.*-hf"),
        ("qwen3-vl", "qwen3_5_moe", r"Set spec\.model\.family to qwen3\.5"),
        ("qwen3-vl", "qwen2_5_vl", r"Set spec\.model\.family to qwen2\.5-vl"),
        ("qwen2.5-vl", "qwen2_vl", r"Use Qwen2\.5-VL or a newer model"),
        (
            "qwen3-vl",
            "llama",
            r"of type 'llama', but the job says qwen3-vl\nThis is a language model without a vision tower",
        ),
        (
            "qwen3-vl",
            "gemma3",
            r"of type 'gemma3', but the job says qwen3-vl\nThese families can be trained: qwen3-vl \(.*can be evaluated",
        ),
    ],
)
def test_others_are_refused_with_the_way(family: str, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        families.check(family, _model(tmp_path, kind))


def test_a_model_that_is_not_there_is_another_s_complaint(tmp_path: Path) -> None:
    families.check("internvl", tmp_path / "absent")
    families.check("qwen3-vl", "tiny://")


@pytest.mark.parametrize(
    ("model", "family", "kind"),
    [
        ({"source": "tiny://"}, "qwen3-vl", "qwen3-vl"),
        ({"source": "tiny://", "family": "qwen2.5-vl"}, "qwen2.5-vl", "qwen2.5-vl"),
        ({"source": "tiny://qwen3.5-moe"}, "qwen3.5", "qwen3.5-moe"),
        ({"source": "tiny://small"}, "qwen3-vl", "qwen3-vl"),
        ({"source": "tiny://small", "family": "qwen3.5"}, "qwen3.5", "qwen3.5"),
        ({"source": "qwen3.5-moe"}, "qwen3-vl", None),
        ({"source": "hf://Qwen/Qwen3.5-9B", "family": "qwen3.5"}, "qwen3.5", None),
        ({"trainJob": "a"}, "qwen3-vl", None),
    ],
)
def test_the_family_of_a_job(model: dict[str, str], family: str, kind: str | None) -> None:
    found = ModelRef.model_validate(model)
    assert (found.family_name, found.tiny_kind) == (family, kind)


@pytest.mark.parametrize(
    ("source", "family", "words"),
    [("tiny://qwen9", "", "no such tiny model"), ("tiny://internvl", "qwen3.5", "tiny://qwen3.5-moe")],
)
def test_a_tiny_model_of_another_kind_is_refused(source: str, family: str, words: str) -> None:
    text = f"""
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {{name: a}}
spec:
  preset: tiny-sft
  model: {{source: "{source}"{", family: " + family if family else ""}}}
  data: {{shapes: {{}}}}
"""
    with pytest.raises(ManifestError, match=words):
        parse(text)


def test_families_follow_through_to_hyperparameters() -> None:
    text = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: a}
spec: {method: METHOD, model: {source: /m, family: FAMILY}, data: {shapes: {}}}
"""

    def of(method: str, family: str) -> ResolvedJob:
        return parse(text.replace("METHOD", method).replace("FAMILY", family))[0]

    for name, family in FAMILIES.items():
        sft, rl = of("sft", name), of("rl", name)
        assert isinstance(sft, SftJob) and isinstance(rl, RlJob)
        assert (sft.spec.hyperparameters.max_pixels is not None) == family.pixels
        assert rl.spec.hyperparameters.freeze_vision == (name == "internvl")
