"""Compute the number of floating-point operations of a question, by a documented formula from the model's config.json. Pure.

A multiplication and an addition count as two operations. Only matrix products are counted; norms, activations and the softmax are not.

    token  = 2 L (d Hh + 2 d Kh + Hh d + m d f)          one token through the language model
    attend = 4 L Hh t                                     its attention over t tokens, itself included
    head   = 2 d V                                        the next token's scores, once per generated token
    vision = 2 P (c d' + Lv (4 d'^2 + 2 d' f')) + 4 Lv d' P^2 + 2 (P / s) (1 + S) (s^2 d'^2 + s d' d)

L layers of width d; H heads of h channels; K key-value heads; an MLP of width f with m matrices (for a mixture of experts, the experts that
a token uses and the router are counted); a vocabulary of V tokens. Lv, d' and f' are the same for the vision tower, P is the number of
patches, each of c numbers, s the number of patches for each picture token, and S the number of deepstack mergers. Thanks to the engine's
key-value cache, the prompt is computed once for all answers, and a thought is not computed again for its answer. An engine without that
cache (transformers) computes more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grounding.errors import UserError

FORMULA = "matrix products of prompt (once), picture and generated tokens, from config.json; docs/thinking.md"


@dataclass(frozen=True)
class Tower:
    """A vision tower like Qwen3-VL's, and how it divides pictures into patches."""

    depth: int
    width: int
    inner: int
    patch: int
    """Side of a patch in pixels"""
    merge: int
    """Side of a picture token in patches"""
    numbers: int
    """Number of values in a patch"""
    out: int
    deepstack: int
    min_pixels: int
    max_pixels: int

    def tokens(self, width: int, height: int) -> int:
        """Return the number of tokens of a picture. Its sides in pixels are rounded to multiples of a token's side, within the limits on
        pixels.
        """
        side = self.patch * self.merge
        w, h = max(side, round(width / side) * side), max(side, round(height / side) * side)
        if w * h > self.max_pixels:
            scale = math.sqrt(width * height / self.max_pixels)
            w, h = (max(side, math.floor(v / scale / side) * side) for v in (width, height))
        elif w * h < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (width * height))
            w, h = (math.ceil(v * scale / side) * side for v in (width, height))
        return w * h // side**2

    def flops(self, tokens: int) -> float:
        """Return the operations for a picture with this many tokens."""
        share = self.merge**2
        patches = tokens * share
        block = 4 * self.width**2 + 2 * self.width * self.inner
        merger = (share * self.width) ** 2 + share * self.width * self.out
        linear = 2.0 * patches * (self.numbers * self.width + self.depth * block)
        return linear + 4.0 * self.depth * self.width * patches**2 + 2.0 * tokens * (1 + self.deepstack) * merger


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, as needed by the formula. `tower` is None if the formula does not cover the kind of vision tower."""

    layers: int
    width: int
    heads: int
    key_heads: int
    channels: int
    inner: int
    """Width of the MLP that a token passes through; for a mixture of experts, the sum over the experts that it uses"""
    matrices: int
    router: int
    vocabulary: int
    tower: Tower | None

    @property
    def token(self) -> float:
        """Return the operations for one token, without attention and head."""
        d, hh, kh = self.width, self.heads * self.channels, self.key_heads * self.channels
        return 2.0 * self.layers * (2 * d * hh + 2 * d * kh + self.matrices * d * self.inner + d * self.router)

    @property
    def parameters(self) -> float:
        """Return the number of the language model's parameters that a token uses, including the head. The report draws it as the size of a
        bubble.
        """
        return self.token / 2 + self.width * self.vocabulary

    def generated(self, before: int, count: float) -> float:
        """Return the operations for generating `count` tokens after `before` others."""
        attended = count * before + count * (count + 1) / 2
        return count * (self.token + 2.0 * self.width * self.vocabulary) + self._attend(attended)

    def prompt(self, tokens: int) -> float:
        """Return the operations for a prompt of `tokens` tokens. The logits of the first generated token are counted with that token."""
        return tokens * self.token + self._attend(tokens * (tokens + 1) / 2)

    def picture(self, width: int, height: int) -> float:
        """Return the operations of the vision tower for a picture of this size in pixels; 0 if the tower is unknown."""
        return 0.0 if self.tower is None else self.tower.flops(self.tower.tokens(width, height))

    def _attend(self, pairs: float) -> float:
        return 4.0 * self.layers * self.heads * self.channels * pairs


def shape_of(config: Mapping[str, Any], processor: Mapping[str, Any] | None = None) -> Shape:
    """Return the dimensions of a model. `processor` is its preprocessor_config.json or processor_config.json. Raises `UserError` if a value
    is missing.
    """
    text = config.get("text_config") or config
    try:
        heads, width = int(text["num_attention_heads"]), int(text["hidden_size"])
        experts = int(text.get("num_experts") or 0)
        inner = (
            int(text["moe_intermediate_size"]) * int(text["num_experts_per_tok"])
            if experts
            else int(text["intermediate_size"])
        )
        return Shape(
            layers=int(text["num_hidden_layers"]),
            width=width,
            heads=heads,
            key_heads=int(text.get("num_key_value_heads") or heads),
            channels=int(text.get("head_dim") or width // heads),
            inner=inner,
            matrices=3,
            router=experts,
            vocabulary=int(text["vocab_size"]),
            tower=_tower(config, processor or {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the formula for operations needs {error}", field="config.json") from None


def _tower(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Tower | None:
    vision = config.get("vision_config") or {}
    if not str(config.get("model_type", "")).startswith(("qwen3_vl", "qwen3_5")) or "spatial_merge_size" not in vision:
        return None
    pictures = processor.get("image_processor") or processor
    size = pictures.get("size") or {}
    width, patch = int(vision["hidden_size"]), int(vision["patch_size"])
    return Tower(
        depth=int(vision["depth"]),
        width=width,
        inner=int(vision["intermediate_size"]),
        patch=patch,
        merge=int(vision["spatial_merge_size"]),
        numbers=int(vision.get("in_channels") or 3) * int(vision.get("temporal_patch_size") or 2) * patch**2,
        out=int(vision["out_hidden_size"]),
        deepstack=len(vision.get("deepstack_visual_indexes") or ()),
        min_pixels=int(pictures.get("min_pixels") or size.get("shortest_edge") or 65536),
        max_pixels=int(pictures.get("max_pixels") or size.get("longest_edge") or 16777216),
    )
