"""Prompt templates by name: the sentence that asks a model for the box of an expression.

The models were trained on exactly these words, so changing a character changes results. Names are those of job files and of `--prompt`.
"""

from __future__ import annotations

from types import MappingProxyType

from grounding.errors import UserError

# text before and after the expression; concatenated, so that braces in an expression are not interpreted
_TEMPLATES = MappingProxyType(
    {
        "qwen3": ("Locate ", ", output its bbox coordinates using JSON format"),
        "qwen3_amodal": ("Locate ", " amodally, output its bbox coordinates using JSON format"),
        # the space at the end is part of the evaluation's prompt; training data has none
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
    """Return whether a prompt asks for the whole object, hidden parts included: a template, or the user's own text, that says so."""
    return name in _AMODAL or (PLACE in name and "amodal" in name.lower())


PLACE = "{sent}"
"""Placeholder of the expression in a user's own template"""


def render(name: str, sent: str) -> str:
    """Return the evaluation's exact question about the expression `sent`.

    `name` is the name of a template, or a template itself: a text with `{sent}` in it, of which every occurrence is replaced; other braces
    are literal. Raises `UserError` for an unknown name.
    """
    if PLACE in name:
        return sent.join(name.split(PLACE))
    parts = _TEMPLATES.get(name)
    if parts is None:
        hint = f"Known prompts: {', '.join(NAMES)}. A template of your own has {PLACE} in the place of the expression."
        raise UserError(f"unknown prompt {name!r}", hint=hint)
    return parts[0] + sent + parts[1]


def render_sft(name: str, sent: str) -> str:
    """Return the question for supervised fine-tuning: the evaluation's, with a full stop. Raises `UserError` as `render` does."""
    return render(name, sent).rstrip() + "."
