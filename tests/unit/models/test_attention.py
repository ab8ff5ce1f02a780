"""Packed rows and the loss in chunks give the same sums as torch's own functions, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from grounding.models import attention, losses

LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=6)


def _rows(lengths: list[int]) -> attention.Rows:
    return attention.Rows(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), max(lengths))


def _tensors(tokens: int, heads: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, n, 8, dtype=dtype) for n in (heads, groups, groups)]


@given(LENGTHS, st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_row_in_a_pack_is_the_row_alone(lengths: list[int], shape: tuple[int, int], causal: bool) -> None:
    query, key, value = _tensors(sum(lengths), *shape, torch.float32)
    whole = attention.attend(query, key, value, _rows(lengths), scale=0.3, causal=causal)
    start = 0
    for length in lengths:
        row = slice(start, start + length)
        alone = attention.attend(query[row], key[row], value[row], _rows([length]), scale=0.3, causal=causal)
        assert torch.equal(whole[row], alone)
        start += length


@given(LENGTHS, st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_pack_is_sdpa_with_the_mask_of_its_rows(lengths: list[int], causal: bool) -> None:
    query, key, value = _tensors(sum(lengths), 4, 2, torch.float64)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = number[:, None] == number[None, :]
    if causal:
        seen = seen.tril()
    batch = [part.transpose(0, 1)[None] for part in (query, key, value)]
    expected = scaled_dot_product_attention(*batch, seen, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    found = attention.attend(query, key, value, _rows(lengths), scale=0.3, causal=causal)
    assert torch.allclose(found, expected, atol=1e-12)


@given(LENGTHS)
@settings(max_examples=50, deadline=None)
def test_rows_are_found_in_positions(lengths: list[int]) -> None:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = attention.rows_of(positions)
    assert torch.equal(found.ends, _rows(lengths).ends) and found.longest == max(lengths)
    assert attention.rows_of(positions) is found  # the result is computed once for all layers


@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_batch_is_computed_as_before(causal: bool) -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = causal, 1
    out, _ = attention.packed_attention(module, query, key, value, mask, scaling=0.3, is_causal=causal)
    seen = mask.bool()[:, None, None, :] & (torch.ones(6, 6).tril() if causal else torch.ones(6, 6)).bool()
    expected = scaled_dot_product_attention(query, key, value, seen, scale=0.3).transpose(1, 2)
    assert torch.allclose(out[0, :4], expected[0, :4], atol=1e-6) and torch.allclose(out[1], expected[1], atol=1e-6)


@given(st.integers(0, 40), st.integers(2, 30), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_loss_over_chunks_is_torch_s(tokens: int, vocabulary: int, rows: int) -> None:
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    expected = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_BYTES", 4 * vocabulary * rows)
        found = losses.linear_cross_entropy(hidden, weight, targets)
    got = torch.autograd.grad(found / 7, (hidden, weight))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)  # scores are float32
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))
