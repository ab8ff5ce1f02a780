"""The effort for one question: the budget for thought, the number of answers and the size of the picture. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grounding.errors import UserError

CLOSE = "\n</think>\n\n"
"""The text that ends a thought of Qwen3-VL and of the models that this project trains"""
END = "</think>"
MOST_SAMPLES = 64
MOST_PIXELS = 1 << 26
"""Pictures are not scaled up to more pixels than this"""


@dataclass(frozen=True)
class Method:
    """The effort for one question. By default, there is one answer with unlimited thought, and the picture is sent as stored."""

    samples: int = 1
    """Number of answers to each question"""
    thinking_budget: int | None = None
    """Maximum number of tokens of thought; 0: no thought; None: no limit"""
    max_pixels: int | None = None
    """Maximum pixels of a picture: a larger one is scaled down; None: no limit"""
    min_pixels: int | None = None
    """Minimum pixels of a picture: a smaller one is scaled up; None: no limit"""

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise UserError(f"expected 1 to {MOST_SAMPLES} answers, found {self.samples}", field="--samples")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise UserError(f"expected 0 or more tokens, found {self.thinking_budget}", field="--thinking-budget")
        if self.max_pixels is not None and self.max_pixels < 1024:
            raise UserError(f"expected 1024 pixels or more, found {self.max_pixels}", field="--max-pixels")
        most = MOST_PIXELS if self.max_pixels is None else self.max_pixels
        if self.min_pixels is not None and self.min_pixels > most:
            text = f"the minimum of {self.min_pixels} pixels is above the maximum of {most}"
            raise UserError(text, field="--min-pixels")

    def settings(self) -> dict[str, int]:
        """Return the values that differ from the defaults. They are part of an answer's identity, which unused settings do not change."""
        found = {"thinking_budget": self.thinking_budget, "max_pixels": self.max_pixels, "min_pixels": self.min_pixels}
        used = {name: value for name, value in found.items() if value is not None}
        return used if self.samples == 1 else {"samples": self.samples, **used}

    @property
    def name(self) -> str:
        """Return a name for messages and folders, such as `think-32_samples-4_pixels-50176`; `free` for the defaults."""
        parts = [] if self.thinking_budget is None else [f"think-{self.thinking_budget}"]
        parts += [f"samples-{self.samples}"] if self.samples > 1 else []
        parts += [f"pixels-{self.max_pixels}"] if self.max_pixels is not None else []
        parts += [f"from-{self.min_pixels}"] if self.min_pixels is not None else []
        return "_".join(parts) or "free"

    @property
    def title(self) -> str:
        """Return the setting in words."""
        budget = self.thinking_budget
        parts = [] if budget is None else [f"up to {budget:,} tokens of thought" if budget else "no thought"]
        if self.samples > 1 or budget is None:
            parts += [f"{self.samples} answers" if self.samples > 1 else "one answer"]
        parts += [f"up to {self.max_pixels:,} pixels"] if self.max_pixels is not None else []
        parts += [f"at least {self.min_pixels:,} pixels"] if self.min_pixels is not None else []
        return ", ".join(parts)


def method_of(settings: Mapping[str, Any] | None) -> Method:
    """Return the method whose `settings` are given. Raises `UserError` if they are invalid."""
    try:
        return Method(**dict(settings or {}))
    except TypeError as error:
        raise UserError(f"method: {error}") from None


def check(method: Method, temperature: float, scoring: str) -> None:
    """Raise `UserError` if the method does not work with this temperature or scoring profile."""
    if method.samples > 1 and temperature <= 0:
        raise UserError(
            f"{method.samples} answers at temperature 0 would all be the same",
            field="--samples",
            hint="Set a temperature too, such as --temperature 0.7 (sampling.temperature of a job).",
        )
    if (method.max_pixels or method.min_pixels) and scoring.endswith(("-pixels", "-resized")):
        raise UserError(
            "if a model answers in pixels, changing the picture's size moves its boxes",
            field="--max-pixels" if method.max_pixels else "--min-pixels",
            hint="Leave the option out, or score with a profile for coordinates in 0..1000.",
        )
