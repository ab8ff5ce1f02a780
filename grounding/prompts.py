"""Prompt templates by name: the sentence that asks a model for the box of an expression.

The words are what the models were trained on: a changed character is a changed result. Names are those of job files and of `--prompt`.
"""

from __future__ import annotations

from types import MappingProxyType

from grounding.errors import UserError

# text before and after the expression; concatenated, so that braces in an expression stay what they are
_TEMPLATES = MappingProxyType(
    {
        "qwen3": ("Locate ", ", output its bbox coordinates using JSON format"),
        "qwen3_amodal": ("Locate ", " amodally, output its bbox coordinates using JSON format"),
        # the blank at the end is part of the evaluation's prompt; training data has none
        "grounding": (
            "Please provide the bounding box coordinate of the region this sentence describes: <ref>",
            "</ref> ",
        ),
        "amodal": (
            "Please provide the amodal bounding box coordinate of the region this sentence describes: <ref>",
            "</ref>",
        ),
    }
)

NAMES: tuple[str, ...] = tuple(_TEMPLATES)
"""The names `render` knows."""


def render(name: str, sent: str) -> str:
    """The question about the expression `sent`, word for word as the evaluation asks it.

    Raises `UserError` for an unknown name.
    """
    parts = _TEMPLATES.get(name)
    if parts is None:
        raise UserError(f"unknown prompt {name!r}", hint="Known prompts: " + ", ".join(NAMES) + ".")
    return parts[0] + sent + parts[1]


def render_sft(name: str, sent: str) -> str:
    """The question as supervised fine-tuning asks it: the evaluation's, ended by a full stop. Raises `UserError` as `render` does."""
    return render(name, sent).rstrip() + "."
