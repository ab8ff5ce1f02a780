"""Declare the model families. Pure; the parts that need torch are in `grounding/models/families.py`.

A family consists of the models of all sizes that share a chat format, a picture processor and a convention for boxes. To add a family,
declare it here, add a tiny random model of it to `models/tiny.py`, and run `tests/stack/test_families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

FamilyName = Literal["qwen3-vl", "qwen3.5", "qwen2.5-vl", "internvl"]


@dataclass(frozen=True)
class Family:
    """Everything that the pipeline needs to know about a family."""

    name: FamilyName
    covers: str
    """Names of the family's models, as shown to users"""
    model_types: tuple[str, ...]
    """`model_type` in the configurations of its models: dense, then mixture of experts"""
    tiny: tuple[str, ...]
    """Kinds of tiny random models (`tiny://KIND`); `tiny://` is the first one"""
    patch: int
    """Side of a patch of the vision tower, in pixels"""
    boxes: Literal["relative", "resized"] = "relative"
    """Space of the boxes in answers: 0..1000 of the picture, or pixels of the picture as resized by its processor"""
    pixels: bool = True
    """Whether `minPixels` and `maxPixels` limit the size of resized pictures; if not, pictures are cut into tiles"""
    packs: bool = True
    """Whether a pack may contain several rows. False if a layer carries state from token to token, because the state would leak into the
    next row
    """

    @property
    def grid(self) -> int:
        """Return the number of pixels of which the sides of a resized picture are multiples: two patches, because 2 x 2 patches form a
        token.
        """
        return 2 * self.patch


FAMILIES: MappingProxyType[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                "qwen3-vl",
                "Qwen3-VL dense and MoE, EGM",
                ("qwen3_vl", "qwen3_vl_moe"),
                ("qwen3-vl", "qwen3-vl-moe"),
                16,
            ),
            Family(
                "qwen3.5",
                "Qwen3.5 and Qwen3.6, dense and MoE",
                ("qwen3_5", "qwen3_5_moe"),
                ("qwen3.5", "qwen3.5-moe"),
                16,
                packs=False,
            ),
            Family("qwen2.5-vl", "Qwen2.5-VL", ("qwen2_5_vl",), ("qwen2.5-vl",), 14, boxes="resized"),
            Family(
                "internvl",
                "InternVL3 and InternVL3.5 in the native layout",
                ("internvl",),
                ("internvl", "internvl3.5"),
                14,
                pixels=False,
            ),
        )
    }
)
"""All families by name"""

DEFAULT: FamilyName = "qwen3-vl"
"""The family of a job that gives none"""


def of_type(model_type: str) -> Family | None:
    """Return the family of models with this `model_type`; None if there is none."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)


def of_tiny(kind: str) -> Family | None:
    """Return the family of a kind of tiny model; None if there is none."""
    return next((family for family in FAMILIES.values() if kind in family.tiny), None)


TINY = "tiny://"
"""URI scheme of models that are built when they are needed"""
TINY_SMALL = f"{TINY}small"
"""A model of the family's first kind with a quarter of the weights"""


def tiny_sources() -> tuple[str, ...]:
    """Return the sources of all models that are built when they are needed."""
    return (TINY, TINY_SMALL, *(TINY + kind for family in FAMILIES.values() for kind in family.tiny))


def tiny_kind(source: str, family: str) -> str | None:
    """Return the kind of tiny model for a source; None if the source is not a tiny model. A source without a kind means the family's first
    kind.
    """
    if not source.startswith(TINY):
        return None
    return FAMILIES[family].tiny[0] if source in (TINY, TINY_SMALL) else source.removeprefix(TINY)
