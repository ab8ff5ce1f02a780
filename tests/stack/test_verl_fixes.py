"""Faults of the pinned verl: what it does, and what ours does."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch


def _nested(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """As TransferQueue hands them over."""
    samples = [torch.arange(4 * n).view(4, n) + 1000 * i for i, n in enumerate(lengths)]
    try:
        return samples, torch.nested.as_nested_tensor(samples, layout=torch.jagged)
    except RuntimeError:
        from verl.utils.tensordict_utils import nested_tensor_from_tensor_list

        return samples, nested_tensor_from_tensor_list(samples, ragged_idx=2)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 4], [8, 8], [7], [4], [3, 5, 9]])
def test_position_ids_are_ragged_by_length(lengths: list[int]) -> None:
    from grounding.train.verl_fixes import position_ids_by_length

    samples, nested = _nested(lengths)
    fixed = position_ids_by_length(nested)
    assert all(torch.equal(a, b) for a, b in zip(fixed.unbind(), samples, strict=True))
    assert fixed._ragged_idx == 2


def test_verl_still_needs_it() -> None:
    """Fails once verl has mended this itself: then `verl_fixes` may go."""
    import verl.utils.tensordict_utils as verl_tensordict
    from tensordict import TensorDict

    verl_tensordict = importlib.reload(verl_tensordict)
    _, nested = _nested([5, 5, 5])
    data = TensorDict({"position_ids": nested}, batch_size=[3])
    verl_tensordict.maybe_fix_3d_position_ids(data)
    with pytest.raises((RuntimeError, AssertionError)):
        data["position_ids"].unbind()


def test_ray_gets_another_chance_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from grounding.train import verl_fixes

    tries = []

    def slow(**_: object) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Exception("The current node timed out during startup. This could happen")
        return "started"

    monkeypatch.setattr(verl_fixes, "_ray_init", slow)
    assert ray.init is verl_fixes._patient_init
    assert ray.init(num_cpus=1) == "started" and len(tries) == 3


def test_another_error_of_ray_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from grounding.train import verl_fixes

    def broken(**_: object) -> None:
        raise ValueError("num_cpus")

    monkeypatch.setattr(verl_fixes, "_ray_init", broken)
    with pytest.raises(ValueError, match="num_cpus"):
        verl_fixes._patient_init()


def _as_verl_has_it() -> ModuleType:
    import verl.utils.torch_functional as mended

    spec = importlib.util.spec_from_file_location("verl_torch_functional_again", mended.__file__)
    assert spec and spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1), (0,)])
def test_log_probabilities_by_blocks_are_verl_s(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch) -> None:
    import verl.utils.torch_functional as mended

    from grounding.train import verl_fixes

    monkeypatch.setattr(verl_fixes, "_BLOCK", 3 * 11)  # three tokens a block
    assert mended.logprobs_from_logits_v2 is verl_fixes.logprobs_from_logits
    torch.manual_seed(1)
    logits = (8 * torch.randn(*shape, 11)).to(dtype)
    labels, weights = torch.randint(11, shape), torch.randn(shape)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = verl_fixes.logprobs_from_logits(ours, labels)
    if 0 in shape:
        assert found.shape == shape
        return
    expected = _as_verl_has_it().logprobs_from_logits_v2(theirs, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
