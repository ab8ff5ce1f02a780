"""The settings of accelerate for a sharded model."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from accelerate import FullyShardedDataParallelPlugin  # noqa: E402

from grounding.train.sft import sharding  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accelerate_takes_the_policy_of_a_gpus_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate accepts our policy of mixed precision for a 16-bit dtype, and keeps its three dtypes."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = SimpleNamespace(fsdp_plugin_args={"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"})
    sharding.tune(arguments, dtype)
    policy = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args).mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)


def test_float32_needs_no_policy() -> None:
    arguments = SimpleNamespace(fsdp_plugin_args={})
    sharding.tune(arguments, torch.float32)
    assert arguments.fsdp_plugin_args == {}
