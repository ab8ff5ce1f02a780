"""The plan of a GPU's memory: real sizes, limits, and the error if the memory runs out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.models.architecture import TextSizes
from grounding.models.memory import ENOUGH_TOKENS, FEW_TOKENS, SMALLEST, Plan, activation_bytes, plan, state_bytes
from grounding.train.monitoring.speed import peak_flops
from grounding.train.sft import run

FOUR = TextSizes(151_936, 2560, 9728, 36, 32, 8, 128, tied=True, normed_heads=True, biased=False)
WEIGHTS, TRAINED = 4_437_815_808, 4_049_739_776
H200 = int(0.95 * 150_110_011_392)


def _free(memory: int, ranks: int = 1) -> int:
    return memory - state_bytes(WEIGHTS, TRAINED, ranks, masters=ranks == 1)


@pytest.mark.parametrize(
    ("free", "tokens", "recompute", "fused", "recomputed", "least", "most"),
    [
        (_free(H200), None, None, True, 0, 10_000, 12_000),  # the measured optimum is 11,000
        (_free(H200), None, None, False, 0, 7_000, 8_192),  # stock kernels: 8,192 took 129.5 GB
        (_free(H200), None, True, True, 36, ENOUGH_TOKENS, ENOUGH_TOKENS),
        (_free(H200), 4096, False, True, 0, 4096, 4096),
        (_free(H200), 4096, None, True, 0, 4096, 4096),
        (_free(85 * 10**9), None, None, True, 36, SMALLEST, SMALLEST),  # the 80 GiB of an H100 leave no choice
        (_free(H200, 8), None, None, True, 0, ENOUGH_TOKENS, ENOUGH_TOKENS),
    ],
)
def test_plans_of_a_4b_model(
    free: int, tokens: int | None, recompute: bool | None, fused: bool, recomputed: int, least: int, most: int
) -> None:
    found = plan(FOUR, free, tokens, recompute, fused=fused)
    assert found.recomputed == recomputed and least <= found.tokens <= most


@given(st.integers(0, 200 * 10**9), st.none() | st.integers(1, 40_000), st.none() | st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_what_the_job_says_is_taken_and_the_rest_fits(
    free: int, tokens: int | None, recompute: bool | None, fused: bool
) -> None:
    found = plan(FOUR, free, tokens, recompute, fused=fused)
    assert 0 <= found.recomputed <= 36 and found.tokens >= 1
    assert tokens is None or found.tokens == tokens
    assert recompute is None or found.recomputed == (36 if recompute else 0)
    kept, short = activation_bytes(FOUR)
    least = found.tokens * (found.recomputed * short + (36 - found.recomputed) * kept)
    if tokens is None and found.tokens > SMALLEST:
        assert least <= free
    if found.recomputed and recompute is None and tokens is None:
        assert FEW_TOKENS * 36 * kept > free - (14 << 30) or not fused  # layers are recomputed only if memory is short


def test_the_states_of_a_model_by_precision_and_ranks() -> None:
    assert state_bytes(1000, 800, 1, masters=True) == 2 * 1000 + 16 * 800
    assert state_bytes(1000, 800, 1, masters=False) == 4 * 1000 + 12 * 800
    assert state_bytes(1000, 800, 4, masters=False) == (4 * 1000 + 12 * 800) // 4 + 200


def test_out_of_memory_names_the_value_to_change() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22.26 GiB.\nmore")
    found = run._out_of_memory(Plan(16_384, 0), 7, error)
    assert isinstance(found, UserError)
    text = str(found)
    assert "step 7 with packs of 16384 tokens: CUDA out of memory. Tried to allocate 22.26 GiB." in text
    assert "tokensPerGpu to 8192" in text and "continues from the newest checkpoint" in text
    assert "Use more GPUs" in str(run._out_of_memory(Plan(1500, 36), 1, error))


def test_the_peak_is_that_of_the_gpu_s_own_name() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("Quadro T400") is None
