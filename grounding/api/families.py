"""Model families, each described by one small declaration. Pure; the parts that need torch are in `grounding/models/families.py`.

A family consists of all models with the same chat format, picture processor and box convention, of any size. To add one, declare it here,
give `models/tiny.py` a tiny random model of it, and run `tests/stack/test_families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

FamilyName = Literal["qwen3-vl", "qwen3.5", "qwen2.5-vl", "internvl"]


@dataclass(frozen=True)
class Family:
    """Everything that the pipeline must know about a family."""

    name: FamilyName
    covers: str
    """Names of its models for users"""
    model_types: tuple[str, ...]
    """`model_type` of its configurations: dense, then mixture of experts"""
    tiny: tuple[str, ...]
    """Kinds of tiny random models (`tiny://KIND`); the first one is `tiny://`"""
    patch: int
    """Side of a patch of the vision tower, pixels"""
    boxes: Literal["relative", "resized"] = "relative"
    """How its answers write boxes: 0..1000 of the picture, or pixels of the picture as its processor resizes it"""
    pixels: bool = True
    """Whether `minPixels` and `maxPixels` limit the size of resized pictures; otherwise pictures are cut into tiles"""
    packs: bool = True
    """Whether a pack may contain several rows. False if a layer carries a state from token to token, which would reach the next row"""

    @property
    def grid(self) -> int:
        """Return the number of pixels that the sides of a resized picture are multiples of, since two by two patches become one token."""
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
"""Every family by name"""

DEFAULT: FamilyName = "qwen3-vl"
"""The family of a job that names none"""


def of_type(model_type: str) -> Family | None:
    """Return the family of a configuration's `model_type`, or None."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)


def of_tiny(kind: str) -> Family | None:
    """Return the family of a kind of tiny model, or None."""
    return next((family for family in FAMILIES.values() if kind in family.tiny), None)


TINY = "tiny://"
"""Scheme of a model that is built when it is needed"""
TINY_SMALL = f"{TINY}small"
"""The family's first kind with a quarter of the weights"""


def tiny_sources() -> tuple[str, ...]:
    """Return every source that is built when it is needed."""
    return (TINY, TINY_SMALL, *(TINY + kind for family in FAMILIES.values() for kind in family.tiny))


def tiny_kind(source: str, family: str) -> str | None:
    """Return the kind of tiny model that a source asks for, the family's first one if it names none; None for any other source."""
    if not source.startswith(TINY):
        return None
    return FAMILIES[family].tiny[0] if source in (TINY, TINY_SMALL) else source.removeprefix(TINY)
