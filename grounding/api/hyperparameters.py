"""Typed hyperparameters of SFT and RL. All are optional: a preset fills what is absent."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from grounding.api.base import Fraction, Model, Override

_Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
_NonNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Rate = Annotated[float, Field(gt=0, lt=1)]


class Hyperparameters(Model):
    """Typed hyperparameters of SFT and RL. What is absent is filled by the preset; engineOverrides reach the rest."""

    learning_rate: _Rate | None = Field(None, description="Peak learning rate.")
    schedule: Literal["cosine", "constant", "linear"] | None = Field(
        None, description="Learning rate schedule after the warm-up (linear: SFT only)."
    )
    warmup_steps: _NonNegative | None = Field(None, description="Warm-up in optimizer steps; wins over warmupRatio.")
    warmup_ratio: Fraction | None = Field(None, description="Warm-up as a share of all steps (SFT).")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="AdamW weight decay.")
    adam_beta2: _Rate | None = Field(None, description="AdamW's second beta.")
    max_grad_norm: Annotated[float, Field(ge=0)] | None = Field(None, description="Gradient norm clip.")
    epochs: _Positive | None = Field(None, description="Passes over the data.")
    max_steps: _Positive | None = Field(None, description="Optimizer steps; wins over epochs.")
    batch_size: _Positive | None = Field(
        None, description="Rows (SFT) or prompts (RL) an optimizer step, over all GPUs."
    )
    mini_batch_size: _Positive | None = Field(
        None, description="RL: prompts an optimizer step inside a batch; equal to batchSize is on-policy."
    )
    micro_batch_size: _Positive | None = Field(
        None, description="SFT: rows a GPU at once; the rest is gradient accumulation."
    )
    rollouts: Annotated[int, Field(ge=2, le=1024)] | None = Field(
        None, description="RL: answers a prompt, the group that advantages are normalised in."
    )
    prompt_length: _Positive | None = Field(None, description="RL: longest prompt, tokens, image tokens included.")
    response_length: _Positive | None = Field(None, description="RL: longest answer, tokens.")
    max_length: _Positive | None = Field(None, description="SFT: longest row, tokens; a longer one is refused by name.")
    min_pixels: _Positive | None = Field(None, description="SFT: smallest picture after resizing, pixels in all.")
    max_pixels: _Positive | None = Field(None, description="SFT: largest picture after resizing, pixels in all.")
    temperature: Annotated[float, Field(gt=0)] | None = Field(None, description="RL: sampling temperature of rollouts.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="RL: nucleus of rollouts.")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="RL: top-k of rollouts; -1 is off."
    )
    kl_coefficient: Annotated[float, Field(ge=0)] | None = Field(
        None, description="RL: weight of the KL loss to the starting model; 0 is off and saves the reference model."
    )
    kl_type: Literal["low_var_kl", "kl", "abs", "mse", "full"] | None = Field(
        None, description="RL: estimator of the KL loss."
    )
    entropy_coefficient: Annotated[float, Field(ge=0)] | None = Field(
        None, description="RL: weight of the entropy bonus."
    )
    loss: Literal["gspo", "vanilla", "clip_cov", "kl_cov", "gpg", "geo_mean", "cispo", "sapo"] | None = Field(
        None, description="RL: policy loss, by verl's name."
    )
    loss_aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] | None = Field(
        None, description="RL: how token losses become one; seq-mean-token-mean reproduces the reference's GSPO."
    )
    tokens_per_gpu: _Positive | None = Field(None, description="RL: tokens a GPU at once (dynamic batches).")
    gradient_checkpointing: bool | None = Field(None, description="Recompute activations: less memory, more time.")
    offload_parameters: bool | None = Field(None, description="RL: keep parameters in CPU memory between phases.")
    offload_optimizer: bool | None = Field(None, description="RL: keep the optimizer in CPU memory between phases.")
    gpu_memory_utilization: _Rate | None = Field(None, description="RL: share of GPU memory for the rollout engine.")
    tensor_parallel: _Positive | None = Field(None, description="RL: GPUs that share one rollout engine.")
    save_every: _Positive | None = Field(None, description="Steps between checkpoints: what a kill can cost.")
    validate_every: _Positive | None = Field(None, description="RL: steps between validations.")
    validate_before_train: bool | None = Field(None, description="RL: validate once before the first step.")
    keep_checkpoints: _Positive | None = Field(None, description="Checkpoints that stay; older ones are removed.")
    freeze_vision: bool | None = Field(
        None, description="Freeze the vision tower but for its merger. RL without it: InternVL's alone."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of training and rollouts on a GPU."
    )
    engine_overrides: Annotated[list[Override], Field(max_length=256)] = Field(
        default_factory=list, description="RL: verl (Hydra) overrides key=value, applied last."
    )
