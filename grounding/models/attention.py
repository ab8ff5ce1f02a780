"""Attention without padding: the rows of a batch follow one another, and each token attends only within its own row.

A causal mask for packed rows is a dense square over all tokens of the pack, and torch's `sdpa` then computes the whole square. A
variable-length kernel takes the ends of the rows instead and computes only the blocks within rows. `use()` registers this attention with
transformers under `NAME`, and a model built with `attn_implementation=NAME` uses it. On a CPU, and for float32, `sdpa` computes each row
separately. That gives the same sums, and the kernels are tested against it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5_moe
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as qwen3_vl_moe

from grounding.models import PACKED_ROWS

NAME = PACKED_ROWS

WITHOUT_KERNEL = (
    "no variable-length kernel (it needs a GPU of compute capability 8.0 and torch 2.11, or flash-attn): packed rows are computed with a dense "
    "mask, whose cost grows with the square of tokensPerGpu; at 25,200 tokens it was 6 times slower on an H200. Set tokensPerGpu to 8192 or less."
)


@dataclass(frozen=True)
class Rows:
    """The rows of a pack. `ends` is (rows + 1,) int32, the ends of the rows with a leading 0; `longest` is the length of the longest row in
    tokens.
    """

    ends: torch.Tensor
    longest: int


@lru_cache(maxsize=1)
def kernel() -> str:
    """Return the variable-length kernel that this machine can use: `flash-attn` or `torch`; empty if there is none."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return ""
    if importlib.util.find_spec("flash_attn"):
        return "flash-attn"
    return "torch" if importlib.util.find_spec("torch.nn.attention.varlen") else ""


def choose() -> str:
    """Return transformers' name of the attention for training on packed rows. If this GPU has no kernel for it, print a warning."""
    if torch.cuda.is_available() and not kernel():
        print(f"attention: {WITHOUT_KERNEL}", file=sys.stderr, flush=True)  # noqa: T201
        return "sdpa"
    return NAME


def rows_of(positions: torch.Tensor) -> Rows:
    """Return the rows of a pack, given its text positions (1, tokens). A row begins at each position that does not follow its predecessor.

    The result is cached on the tensor, because all layers of a model get the same tensor, and reading the ends waits for the GPU.
    """
    known: Rows | None = getattr(positions, "_egm_rows", None)
    if known is None:
        flat = positions.reshape(-1)
        starts = torch.ones_like(flat, dtype=torch.bool)
        starts[1:] = flat[1:] != flat[:-1] + 1
        ends = torch.nn.functional.pad(starts.nonzero().reshape(-1), (0, 1), value=flat.numel()).int()
        known = Rows(ends, int(ends.diff().max()))
        positions._egm_rows = known
    return known


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, *, scale: float, causal: bool
) -> torch.Tensor:
    """Return attention within rows, in the shape of `query`: (tokens, heads, width). `key` and `value` may have fewer heads."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    found = kernel() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else ""
    if found == "flash-attn":
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

        ends, longest = rows.ends, rows.longest
        out: torch.Tensor = flash_attn_varlen_func(
            query, key, value, ends, ends, longest, longest, softmax_scale=scale, causal=causal
        )
        return out
    if found == "torch":
        from torch.nn.attention.varlen import varlen_attn

        ends, longest, window = rows.ends, rows.longest, (-1, 0 if causal else -1)
        out = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=window)
        return out
    lengths = rows.ends.diff().tolist()
    parts = []
    for one, keys, values in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        batch = (one.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
        found_row = scaled_dot_product_attention(*batch, None, 0.0, causal, scale=scale, enable_gqa=True)
        parts.append(found_row[0].transpose(0, 1))
    return torch.cat(parts)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    rows: Rows | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return a layer's attention, with transformers' interface. `query` is (batch, heads, tokens, width), the result (batch, tokens, heads, width).

    A single batch entry with positions is a pack of rows. All else (padded batches, generation with a cache) is computed by transformers' sdpa.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    packed = query.shape[0] == 1 and attention_mask is None and key.shape[2] == query.shape[2]
    if not causal:
        rows = None  # the argument describes the rows of the language model, not those of the vision tower
    if packed and rows is None and position_ids is not None and position_ids.shape[-1] == query.shape[2]:
        rows = rows_of(position_ids)
    if not packed or rows is None or dropout:
        dense = _dense_mask(attention_mask, query.shape[2], key.shape[2], causal)
        out, _weights = sdpa_attention_forward(
            module, query, key, value, dense, dropout=dropout, scaling=scale, is_causal=causal and dense is None
        )
        return out, None
    one, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(one, keys, values, rows, scale=scale, causal=causal)[None], None


def _dense_mask(mask: torch.Tensor | None, queries: int, keys: int, causal: bool) -> torch.Tensor | None:
    """Return sdpa's mask for a padded batch, (batch, 1, queries, keys): True if the query attends to the key."""
    if mask is None or mask.dim() == 4:
        return mask
    seen = mask[:, None, None, :].bool()
    if not causal:
        return seen
    last = torch.arange(keys - queries, keys, device=mask.device)
    within = torch.arange(keys, device=mask.device)[None, :] <= last[:, None]
    # a padding token attends to itself, because the softmax of an empty row is NaN
    itself = torch.arange(keys, device=mask.device)[None, :] == last[:, None]
    return (seen & within) | itself


def _mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **_: Any
) -> torch.Tensor | None:
    """Return the mask of a padded batch, (batch, tokens); None if nothing is padded."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:]
    return None if bool(mask.all()) else mask


VISION: dict[type[torch.nn.Module], Callable[..., torch.Tensor]] = {
    kind: kind.forward
    for kind in (
        qwen2_5_vl.Qwen2_5_VLVisionAttention,
        qwen3_vl.Qwen3VLVisionAttention,
        qwen3_vl_moe.Qwen3VLMoeVisionAttention,
        qwen3_5.Qwen3_5VisionAttention,
        qwen3_5_moe.Qwen3_5MoeVisionAttention,
    )
}
"""The vision attention of each of Qwen's towers, with transformers' own function for it. They are all alike, except that Qwen2.5-VL's rows
are windows
"""


def _vision(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rotary_pos_emb: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Compute vision attention over all pictures at once. transformers' own function calls sdpa once for each picture."""
    if self.config._attn_implementation != NAME or position_embeddings is None:
        return VISION[type(self)](self, hidden_states, cu_seqlens, rotary_pos_emb, position_embeddings, **kwargs)
    patches = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1).unbind(1)
    query, key = qwen3_vl.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    pictures: Rows | None = getattr(cu_seqlens, "_egm_rows", None)
    if pictures is None:
        pictures = Rows(cu_seqlens, int(cu_seqlens.diff().max()))
        cu_seqlens._egm_rows = pictures
    out = attend(query, key, value, pictures, scale=self.scaling, causal=False)
    found: torch.Tensor = self.proj(out.reshape(patches, -1))
    return found


def use() -> None:
    """Register `NAME` with transformers in this process. Models with another attention do not change."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    for kind in VISION:
        kind.forward = _vision
