"""How many tokens a pack may have, and which layers recompute their activations, from the memory that a GPU has left. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from grounding.models.architecture import TextSizes

ENOUGH_TOKENS = 16384
"""Matrix products are as fast as they get from about this size, so larger packs gain nothing."""
FEW_TOKENS = 6144
"""Below this size recomputing some layers costs less than small matrix products do."""
SMALLEST = 1024
"""A pack has at least so many tokens, whatever is estimated: a smaller one does not save what would be missing."""
STOCK = 1.45
"""What transformers' own norms and activations keep of a layer, as a multiple of what Liger's keep: measured at 4B on an H200."""
_RESERVE = 14 << 30  # logits of a chunk, the pictures' activations, what the allocator loses to fragments


@dataclass(frozen=True)
class Plan:
    """`tokens` a pack; the first `recomputed` layers recompute their activations in the backward pass."""

    tokens: int
    recomputed: int


def activation_bytes(text: TextSizes, number: int = 2) -> tuple[int, int]:
    """Return the bytes a token leaves in a layer for the backward pass: (kept, recomputed).

    `number` is the bytes of a number in the precision that is computed in.
    """
    queries, keys = text.heads * text.head_size, text.key_value_heads * text.head_size
    return number * (6 * text.hidden + 4 * queries + 6 * keys + 3 * text.intermediate), number * 2 * text.hidden


def state_bytes(weights: int, trained: int, ranks: int, *, masters: bool) -> int:
    """Return what weights, gradients, AdamW and, if there are, float32 masters take on each of `ranks` GPUs."""
    if masters:
        return 2 * weights + 16 * trained
    gathered = 0 if ranks == 1 else 4 * weights // 20  # the layers of a sharded model that are whole at a time
    return (4 * weights + 12 * trained) // ranks + gathered


def plan(
    text: TextSizes, free: int, tokens: int | None, recompute: bool | None, *, fused: bool, number: int = 2
) -> Plan:
    """Choose a plan for `free` bytes. What the job says (`tokens`, `recompute`) is taken as it is.

    Recomputing costs more time than a smaller pack, so layers are recomputed only if a pack would have less than FEW_TOKENS otherwise.
    """
    layers = text.layers
    kept, short = activation_bytes(text, number)
    kept = kept if fused else int(STOCK * kept)
    room = max(0, free - _RESERVE)
    if recompute is not None:
        return Plan(
            _bounded(room // (layers * (short if recompute else kept))) if tokens is None else tokens,
            layers if recompute else 0,
        )
    if tokens is None and room // (layers * kept) >= FEW_TOKENS:
        return Plan(_bounded(room // (layers * kept)), 0)
    wanted = FEW_TOKENS if tokens is None else tokens
    can_keep = (room - wanted * layers * short) // (wanted * (kept - short))
    recomputed = layers - min(layers, max(0, can_keep))
    if tokens is None and recomputed == layers:
        return Plan(_bounded(room // (layers * short)), layers)
    return Plan(wanted, recomputed)


def _bounded(tokens: int) -> int:
    return max(SMALLEST, min(tokens, ENOUGH_TOKENS))
