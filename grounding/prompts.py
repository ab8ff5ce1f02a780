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


_AMODAL = ("qwen3_amodal", "amodal")


def asks_for_whole(name: str) -> bool:
    """Return whether a prompt asks for the whole object, hidden parts included: a template that says so, or one of the user's own that does."""
    return name in _AMODAL or (PLACE in name and "amodal" in name.lower())


PLACE = "{sent}"
"""What stands for the expression in a template of the user's own"""


def render(name: str, sent: str) -> str:
    """Return the question about the expression `sent`, word for word as the evaluation asks it.

    `name` is the name of a template, or a template itself: a text with `{sent}` in it, of which every occurrence is replaced and no
    other brace means anything. Raises `UserError` for an unknown name.
    """
    if PLACE in name:
        return sent.join(name.split(PLACE))
    parts = _TEMPLATES.get(name)
    if parts is None:
        hint = f"Known prompts: {', '.join(NAMES)}. A template of your own has {PLACE} in the place of the expression."
        raise UserError(f"unknown prompt {name!r}", hint=hint)
    return parts[0] + sent + parts[1]


def render_sft(name: str, sent: str) -> str:
    """Return the question as supervised fine-tuning asks it: the evaluation's, ended by a full stop. Raises `UserError` as `render` does."""
    return render(name, sent).rstrip() + "."
