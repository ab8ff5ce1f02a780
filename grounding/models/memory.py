"""Choose the tokens of a pack, and the layers that recompute their activations, by the free memory of a GPU. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from grounding.models.architecture import TextSizes

ENOUGH_TOKENS = 16384
"""Tokens of a pack from which matrix products reach full speed, so that larger packs gain nothing."""
FEW_TOKENS = 6144
"""Tokens of a pack below which recomputing some layers costs less than small matrix products."""
SMALLEST = 1024
"""Minimum tokens of a pack, whatever the estimate is, because a smaller pack would hardly save memory."""
STOCK = 1.45
"""Bytes that transformers' own norms and activations keep of a layer, as a multiple of Liger's. Measured at 4B on an H200."""
_RESERVE = 14 << 30  # for logits of a chunk, activations of the pictures, and fragmentation


@dataclass(frozen=True)
class Plan:
    """A pack has `tokens` tokens; the first `recomputed` layers recompute their activations in the backward pass."""

    tokens: int
    recomputed: int


def activation_bytes(text: TextSizes, number: int = 2) -> tuple[int, int]:
    """Return the bytes per token that a layer keeps for the backward pass: (if all is kept, if it is recomputed).

    `number` is the number of bytes of a value in the computing precision.
    """
    queries, keys = text.heads * text.head_size, text.key_value_heads * text.head_size
    return number * (6 * text.hidden + 4 * queries + 6 * keys + 3 * text.intermediate), number * 2 * text.hidden


def state_bytes(weights: int, trained: int, ranks: int, *, masters: bool) -> int:
    """Return the bytes that weights, gradients, AdamW and, with `masters`, float32 masters take on each of `ranks` GPUs."""
    if masters:
        return 2 * weights + 16 * trained
    gathered = 0 if ranks == 1 else 4 * weights // 20  # the layers of a sharded model that are unsharded at a time
    return (4 * weights + 12 * trained) // ranks + gathered


def plan(
    text: TextSizes, free: int, tokens: int | None, recompute: bool | None, *, fused: bool, number: int = 2
) -> Plan:
    """Choose a plan for `free` bytes. Values that the job sets (`tokens`, `recompute`) are not changed.

    Recomputing costs more time than a smaller pack, so layers are recomputed only if a pack would otherwise have fewer than FEW_TOKENS tokens.
    """
    layers = text.layers
    kept, short = activation_bytes(text, number)
    kept = kept if fused else int(STOCK * kept)
    usable = max(0, free - _RESERVE)
    if recompute is not None:
        return Plan(
            _bounded(usable // (layers * (short if recompute else kept))) if tokens is None else tokens,
            layers if recompute else 0,
        )
    if tokens is None and usable // (layers * kept) >= FEW_TOKENS:
        return Plan(_bounded(usable // (layers * kept)), 0)
    wanted = FEW_TOKENS if tokens is None else tokens
    can_keep = (usable - wanted * layers * short) // (wanted * (kept - short))
    recomputed = layers - min(layers, max(0, can_keep))
    if tokens is None and recomputed == layers:
        return Plan(_bounded(usable // (layers * short)), layers)
    return Plan(wanted, recomputed)


def _bounded(tokens: int) -> int:
    return max(SMALLEST, min(tokens, ENOUGH_TOKENS))
