"""Patches of verl and of Ray's start: whether the pinned source still needs them, and what the patched functions do."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(autouse=True)
def applied() -> None:
    from grounding.train.verl import patches

    patches.apply()


def _nested(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the samples as TransferQueue passes them on."""
    samples = [torch.arange(4 * n).view(4, n) + 1000 * i for i, n in enumerate(lengths)]
    try:
        return samples, torch.nested.as_nested_tensor(samples, layout=torch.jagged)
    except RuntimeError:
        from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

        return samples, nested_tensor_from_tensor_list(samples, ragged_idx=2)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 4], [8, 8], [7], [4], [3, 5, 9]])
def test_position_ids_are_ragged_by_length(lengths: list[int]) -> None:
    from grounding.train.verl.patches import position_ids_by_length

    samples, nested = _nested(lengths)
    fixed = position_ids_by_length(nested)
    assert all(torch.equal(a, b) for a, b in zip(fixed.unbind(), samples, strict=True))
    assert fixed._ragged_idx == 2


def test_verl_still_needs_it() -> None:
    """This test fails once verl handles samples of equal length itself; then the patch can be removed."""
    import verl.utils.tensordict_utils as verl_tensordict
    from tensordict import TensorDict

    verl_tensordict = importlib.reload(verl_tensordict)
    _, nested = _nested([5, 5, 5])
    data = TensorDict({"position_ids": nested}, batch_size=[3])
    verl_tensordict.maybe_fix_3d_position_ids(data)
    with pytest.raises((RuntimeError, AssertionError)):
        data["position_ids"].unbind()


@pytest.fixture
def by_rows() -> Callable[..., torch.Tensor]:
    """Restore verl's own functions during the test, and yield verl's function for log-probabilities."""
    import verl.utils.torch_functional as verl_functional

    from grounding.train.verl import patches

    theirs = importlib.reload(verl_functional).logprobs_from_logits_v2
    verl_functional.logprobs_from_logits_v2 = patches.logprobs_by_chunks
    return theirs


@pytest.mark.parametrize("shape", [(7, 11), (2, 5, 11), (1, 11), (0, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_are_those_of_verl(
    shape: tuple[int, ...], dtype: torch.dtype, by_rows: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grounding.train.verl import patches

    monkeypatch.setattr(patches, "_CHUNK_BYTES", 4 * 11 * 3)  # room for three rows at a time
    torch.manual_seed(0)
    logits = (4 * torch.randn(shape)).to(dtype)
    labels = torch.randint(0, 11, shape[:-1])
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = patches.logprobs_by_chunks(one, labels)
    assert ours.shape == labels.shape and ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if not labels.numel():
        return
    theirs = by_rows(two, labels)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **close)
    weights = torch.randn(shape[:-1])
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, **close)


def test_verl_still_goes_token_by_token(by_rows: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """This test fails once verl no longer computes log-probabilities token by token; then `logprobs_by_chunks` can be removed."""
    calls, real = [], torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda *a, **k: calls.append(1) or real(*a, **k))
    by_rows(torch.randn(9, 5), torch.zeros(9, dtype=torch.long))
    assert len(calls) == 9


def test_verl_calls_ours_where_there_is_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import verl.utils.torch_functional as verl_functional

    from grounding.train.verl import patches

    assert verl_functional.logprobs_from_logits_v2 is patches.logprobs_by_chunks
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    found = verl_functional.logprobs_from_logits(torch.zeros(3, 8), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, torch.full((3,), -math.log(8)))


def test_ray_gets_another_chance_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from grounding.train.verl import patches

    tries = []

    def slow(**_: object) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Exception("The current node timed out during startup. This could happen")
        return "started"

    monkeypatch.setattr(patches, "_ray_init", slow)
    assert ray.init is patches._patient_init
    assert ray.init(num_cpus=1) == "started" and len(tries) == 3


def test_another_error_of_ray_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from grounding.train.verl import patches

    def broken(**_: object) -> None:
        raise ValueError("num_cpus")

    monkeypatch.setattr(patches, "_ray_init", broken)
    with pytest.raises(ValueError, match="num_cpus"):
        patches._patient_init()


def test_qwen2_5_vl_s_layers_ask_for_the_attention_that_is_chosen() -> None:
    """Without flash-attn, verl's own forward raises a NameError; that of transformers uses `attn_implementation`."""
    import verl.models.transformers.qwen2_vl as verl_qwen2_vl
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

    import grounding.train.verl.patches  # noqa: F401

    if hasattr(verl_qwen2_vl, "flash_attn_varlen_func"):
        pytest.skip("flash-attn is installed, and verl's forward works")
    assert not hasattr(verl_qwen2_vl, "_flash_use_top_left_mask"), (
        "verl now defines the function without flash-attn, so the patch can be removed"
    )
    assert verl_qwen2_vl.qwen2_vl_attn_forward is Qwen2_5_VLAttention.forward
