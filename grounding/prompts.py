"""Prompt templates by name: the sentence that asks a model for the box of an expression.

The models were trained on exactly these words, so changing a character changes results. Job files and `--prompt` use these names.
"""

from __future__ import annotations

from types import MappingProxyType

from grounding.errors import UserError

# Text before and after the expression. They are concatenated, so that braces in an expression are not interpreted.
_TEMPLATES = MappingProxyType(
    {
        "qwen3": ("Locate ", ", output its bbox coordinates using JSON format"),
        "qwen3_amodal": ("Locate ", " amodally, output its bbox coordinates using JSON format"),
        # the evaluation's prompt ends with a space; training data has none
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
"""The template names that `render` accepts"""


_AMODAL = ("qwen3_amodal", "amodal")


def asks_for_whole(name: str) -> bool:
    """Return whether a prompt (a template's name or the user's own text) asks for the whole object, including hidden parts."""
    return name in _AMODAL or (PLACE in name and "amodal" in name.lower())


PLACE = "{sent}"
"""Placeholder of the expression in a user's own template"""


def render(name: str, sent: str) -> str:
    """Return the evaluation's exact question about the expression `sent`.

    `name` is the name of a template, or the user's own template: a text in which every `{sent}` is replaced and other braces are literal.
    Raises `UserError` for an unknown name.
    """
    if PLACE in name:
        return sent.join(name.split(PLACE))
    parts = _TEMPLATES.get(name)
    if parts is None:
        hint = f"Known prompts: {', '.join(NAMES)}. Your own template must contain {PLACE} in place of the expression."
        raise UserError(f"unknown prompt {name!r}", hint=hint)
    return parts[0] + sent + parts[1]


def render_sft(name: str, sent: str) -> str:
    """Return the question for supervised fine-tuning: that of the evaluation with a full stop. Raises `UserError` like `render`."""
    return render(name, sent).rstrip() + "."
