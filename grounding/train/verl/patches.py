"""Patches of verl and Ray that every process of a run needs: `PATCHES` lists them, `apply` applies them (`plugin.py`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
import torch
import verl.experimental.agent_loop.agent_loop as verl_agent_loop
import verl.models.transformers.qwen2_vl as verl_qwen2_vl
import verl.utils.tensordict_utils as verl_tensordict
import verl.utils.torch_functional as verl_functional
import verl.workers.engine.base as verl_engine
import verl.workers.engine.fsdp.transformer_impl as verl_fsdp
import verl.workers.engine_workers as verl_engine_workers
import verl.workers.utils.losses as verl_losses
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import offload_fsdp_model_to_cpu
from verl.utils.metric import AggregationType, Metric
from verl.utils.model import convert_weight_keys
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from grounding.jsontypes import JsonObject
from grounding.models import attention, families
from grounding.models.fused import use_fused_kernels
from grounding.runtime.environment import RlEnvironment
from grounding.train import loopback
from grounding.train.checkpoints import own_disks
from grounding.train.finite import all_finite
from grounding.train.verl import on_policy, pictures, schedule
from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches


def position_ids_by_length(ids: torch.Tensor) -> torch.Tensor:
    """Return nested mRoPE position ids of shape (4, length) per sample, with the length as the ragged dimension.

    TransferQueue nests samples by `torch.nested.as_nested_tensor`, which treats dimension 1 as the ragged one if all samples have the same
    length. The values then have the shape (samples * 4, length), but verl 0.9.1 assumes (4, sum of lengths) and fails with "split_with_sizes
    expects split_sizes to sum exactly". This ends a run at the first step in which all responses reach the length limit.
    """
    values, offsets = ids.values(), ids.offsets()
    # 3 or 4 rows: time, height, width and perhaps text
    if values.shape[0] <= 4 and int(offsets[-1]) == values.shape[1]:
        ids._ragged_idx = 2
        return ids
    samples = len(offsets) - 1
    by_length = values.view(samples, -1, values.shape[1]).transpose(0, 1).reshape(-1, samples * values.shape[1])
    ends = torch.arange(samples + 1, device=offsets.device) * values.shape[1]
    return torch.nested.nested_tensor_from_jagged(by_length, offsets=ends, jagged_dim=2)


def fix_3d_position_ids(data: Any) -> None:
    """Set the ragged dimension of position ids by their values, which verl's function does not check."""
    ids = data.get("position_ids", None)
    if isinstance(ids, torch.Tensor) and ids.is_nested and ids.dim() == 3:
        data["position_ids"] = position_ids_by_length(ids)


_CHUNK_BYTES = 1 << 28


def logprobs_by_chunks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each label, in single precision (double stays double).

    `logits` has the shape (..., vocabulary), labels and result (...). It is computed in chunks of 256 MB (of single precision).
    """
    width = logits.shape[-1]
    rows = max(1, _CHUNK_BYTES // (4 * width))
    parts = []
    for some, wanted in zip(logits.reshape(-1, width).split(rows), labels.reshape(-1).split(rows), strict=True):
        exact = some if some.dtype == torch.float64 else some.float()
        parts.append(exact.gather(-1, wanted[:, None]).squeeze(-1) - exact.logsumexp(-1))
    return torch.cat(parts).view(labels.shape) if parts else logits.new_zeros(labels.shape, dtype=torch.float32)


def warn_of_dense_attention(module: Any) -> None:
    """Print a warning about the cost if a model on a GPU processes packed rows with a dense mask."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if torch.cuda.is_available() and chosen in ("sdpa", "eager"):
        print(f"rl: attention {chosen}: {attention.WITHOUT_KERNEL}", file=sys.stderr, flush=True)  # noqa: T201


_build_module = verl_fsdp.FSDPEngine._build_module


def _module(self: Any) -> Any:
    module = _build_module(self)
    warn_of_dense_attention(module)
    use_fused_kernels(module)
    if RlEnvironment.from_environ(os.environ).freeze_vision:
        families.freeze_vision(module)
    return module


def merged_parameters(self: Any) -> Any:
    """Yield name and value of every weight with the adapters merged in, in the training precision, without changing the model."""
    module = self.module
    scale = next(m.scaling["default"] for m in module.modules() if isinstance(m, LoraLayer) and "default" in m.scaling)
    state = {name.removeprefix("base_model.model."): value for name, value in module.state_dict().items()}
    down = {
        n.removesuffix(".lora_A.default.weight"): v for n, v in state.items() if n.endswith(".lora_A.default.weight")
    }
    up = {n.removesuffix(".lora_B.default.weight"): v for n, v in state.items() if n.endswith(".lora_B.default.weight")}
    weights = {
        name.replace(".base_layer.", "."): (value, name.removesuffix(".base_layer.weight"))
        for name, value in state.items()
        if ".lora_" not in name
    }
    try:
        for name, (value, layer) in convert_weight_keys(weights, module).items():
            whole = _whole(value)
            if layer in down:
                whole = whole + (scale * (_whole(up[layer]).float() @ _whole(down[layer]).float())).to(whole.dtype)
            yield name, whole
    finally:
        if self._is_offload_param:
            offload_fsdp_model_to_cpu(self.module)


def _whole(value: Any) -> torch.Tensor:
    """Return the complete tensor of all ranks, on the computing device."""
    placed = value.to(get_device_id(), non_blocking=True)
    found: torch.Tensor = placed.full_tensor() if isinstance(placed, DTensor) else placed
    return found.detach()


_save_checkpoint = verl_fsdp.FSDPEngine.save_checkpoint


def _checked_save(self: Any, *args: Any, **kwargs: Any) -> Any:
    found: list[Any] = [all_finite(list(self.module.parameters()))]
    if torch.distributed.is_initialized():  # all ranks must raise, otherwise one would wait for the others forever
        mine, found = found[0], [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
    if not all(found):
        raise RuntimeError("the weights are not finite numbers; this checkpoint is not used")
    return _save_checkpoint(self, *args, **kwargs)


_load_checkpoint = verl_fsdp.FSDPEngine.load_checkpoint


def _restored_load(self: Any, local_path: str, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint like verl. If the pods share no folder, first download the files of this rank."""
    if uri := RlEnvironment.from_environ(os.environ).shared_output:
        own_disks.bring_rank(uri, Path(local_path).parent, torch.distributed.get_rank())
    return _load_checkpoint(self, local_path, *args, **kwargs)


_prepare_outputs = verl_fsdp.FSDPEngineWithLMHead.prepare_model_outputs


def _outputs_with_entropy(
    self: Any, output: Any, output_args: JsonObject, micro_batch: Any, logits_processor_func: Any
) -> JsonObject:
    """Prepare a model's outputs like verl. If the batch's old policy is the new one, add the entropy of each token, without gradients.

    verl's own entropy is part of the loss's graph: it would keep more tensors of the logits' size for the backward pass.
    """
    found: JsonObject = _prepare_outputs(self, output, output_args, micro_batch, logits_processor_func)
    if not get_non_tensor_data(data=micro_batch, key=on_policy.FLAG, default=False):
        return found
    entropy = (
        found["entropy"].detach().values()
        if "entropy" in found
        else self._gather_and_unpad_packed(
            on_policy.entropy_by_chunks(
                _whole_logits(output.logits).squeeze(0),
                None if output_args.get("temperature_is_one", False) else output_args["temperature_rmpad"],
            ),
            output_args["pad_size"],
        )
    )
    found[on_policy.ENTROPY] = torch.nested.nested_tensor_from_jagged(entropy, micro_batch["input_ids"].offsets())
    return found


def _whole_logits(logits: torch.Tensor) -> torch.Tensor:
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


_loss = verl_losses.ppo_loss


def _on_policy_loss(config: Any, model_output: JsonObject, data: Any, dp_group: Any = None) -> Any:
    """Compute verl's loss. If the batch's old policy is the new one, use the new log-probabilities, detached, as the old ones."""
    if not get_non_tensor_data(data=data, key=on_policy.FLAG, default=False):
        return _loss(config, model_output, data, dp_group)
    data = data.copy()
    data["old_log_probs"] = response_from_nested(model_output["log_probs"].detach(), data["response_mask"])
    loss, metrics = _loss(config, model_output, data, dp_group)
    mask = data.select("response_mask").to_padded_tensor()["response_mask"]
    entropy = no_padding_2_padding(model_output[on_policy.ENTROPY], data)
    total, count = on_policy.entropy_parts(entropy, mask, config.loss_agg_mode)
    metrics[on_policy.ENTROPY_SUM] = Metric(AggregationType.SUM, total)
    metrics[on_policy.ENTROPY_COUNT] = Metric(AggregationType.SUM, count)
    metrics[on_policy.ENTROPY_WIDTH] = Metric(AggregationType.MAX, mask.shape[-1])
    return loss, metrics


_ray_init = ray.init


def _patient_init(*args: Any, **kwargs: Any) -> Any:
    for left in (2, 1, 0):
        try:
            return _ray_init(*args, **kwargs)
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            print("rl: Ray did not start within 30 s; trying again", flush=True)  # noqa: T201
            ray.shutdown()
    raise AssertionError("unreachable")


PATCHES = (
    Patch(
        FSDPCheckpointManager,
        "load_checkpoint",
        schedule.load_checkpoint,
        "After a resume, the job's learning rate must apply; verl restores the old one with the scheduler.",
        "verl applies the configured rate after a resume.",
        "6f75218097c5",
    ),
    Patch(
        verl_tensordict,
        "maybe_fix_3d_position_ids",
        fix_3d_position_ids,
        "If all samples of a step have the same length, verl picks the wrong ragged dimension and the run ends.",
        "tests/stack/test_verl_fixes.py::test_verl_still_needs_it fails.",
        "dc8fa9819080",
        also=(verl_engine, verl_engine_workers),
    ),
    Patch(
        verl_functional,
        "logprobs_from_logits_v2",
        logprobs_by_chunks,
        "Without FlashAttention, verl computes one token at a time, and a step consists mostly of kernel launches.",
        "tests/stack/test_verl_fixes.py::test_verl_still_goes_token_by_token fails.",
        "1074be97faf3",
    ),
    Patch(
        verl_qwen2_vl,
        "qwen2_vl_attn_forward",
        Qwen2_5_VLAttention.forward,
        "For Qwen2.5-VL, verl calls FlashAttention 2, which has no wheels on PyPI; transformers' own forward uses the configured attention.",
        "verl calls the configured attention.",
        "f7121547e481",
        wanted=lambda: not hasattr(verl_qwen2_vl, "flash_attn_varlen_func"),
    ),
    Patch(
        verl_fsdp.FSDPEngine,
        "_build_module",
        _module,
        "No code of verl reads `actor.freeze_vision_tower`, so the job's freezeVision is applied to the loaded model. Liger's kernels are used "
        "like in SFT (verl's `use_liger` does not replace the MLP's activation (SwiGLU) of Qwen3-VL, and fails without Liger).",
        "verl reads that key, and its `use_liger` replaces the MLP's activation of Qwen3-VL.",
        "3935df3e22bb",
    ),
    Patch(
        verl_fsdp.FSDPEngine,
        "_merged_lora_per_tensor_param",
        merged_parameters,
        "At every step, verl copies the whole base to CPU memory, merges in place, restores it, and rounds to bfloat16 in any precision.",
        "verl merges weight by weight in the job's precision.",
        "a477342f996f",
    ),
    Patch(
        verl_fsdp.FSDPEngine,
        "save_checkpoint",
        _checked_save,
        "Weights that are not finite numbers must not replace a good checkpoint.",
        "verl itself checks the weights.",
        "33610c18a6a2",
    ),
    Patch(
        verl_fsdp.FSDPEngine,
        "load_checkpoint",
        _restored_load,
        "If the pods share no folder, a rank's files are only in the job's output, and Ray decides which pod has which rank.",
        "verl loads checkpoints from a store.",
        "0053b000be57",
    ),
    Patch(
        verl_fsdp.FSDPEngineWithLMHead,
        "prepare_model_outputs",
        _outputs_with_entropy,
        "If old log-probabilities need no separate pass (`hooks.py`), the update measures the entropy, without gradients.",
        "The patch of `_compute_old_log_prob` is removed.",
        "5239f536e8f6",
    ),
    Patch(
        verl_losses,
        "ppo_loss",
        _on_policy_loss,
        "If old log-probabilities need no separate pass (`hooks.py`), the loss uses the new ones, detached.",
        "The patch of `_compute_old_log_prob` is removed.",
        "d7c0f8772b44",
        also=(verl_engine_workers,),
    ),
    Patch(
        verl_agent_loop.AgentLoopWorker,
        "_compute_multi_modal_inputs",
        pictures.compact_inputs,
        "Every row with its picture goes through TransferQueue several times a step, in float32, although the model computes in bfloat16.",
        "verl stores pictures in the model's precision.",
        "c1bf0d04b739",
    ),
    Patch(
        ray,
        "init",
        _patient_init,
        "Ray gives its daemons 30 s to start, which is too short on a busy machine.",
        "Ray has a setting for that time.",
        "724ef7006c04",
    ),
    Patch(
        loopback.torch_modules()[0],
        "TCPStore",
        loopback.store,
        "torch's stores listen on all addresses, whatever address they are given.",
        "tests/unit/train/test_loopback.py::test_torch_still_needs_it fails.",
        "",
        also=loopback.torch_modules()[1:],
    ),
)


def apply() -> None:
    """Apply all patches, and make packed attention known to transformers in this process (`attn_implementation: packed_rows`)."""
    attention.use()
    apply_patches(PATCHES)
