"""Typed hyperparameters of SFT and RL. All are optional, because a preset supplies absent ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from grounding.api.base import Fraction, Model, Override
from grounding.api.families import FamilyName

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegative = Annotated[int, Field(ge=0, le=2**31 - 1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Figure = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)?$", max_length=127)
]
Loss = Literal["gspo", "vanilla", "clip_cov", "kl_cov", "gpg", "geo_mean", "cispo", "sapo"]
LossAggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
RolloutEngine = Literal["vllm", "sglang"]
Advantage = Literal["grpo", "dr-grpo", "rloo"]
Algorithm = Literal["grpo", "gspo", "dr-grpo", "rloo"]


class ClipRange(Model):
    """How far the policy may move from the one that generated the answers: the ratio of probabilities is clipped to 1 - low ... 1 + high."""

    low: Rate = Field(0.2, description="The lower bound of the ratio is 1 - low.")
    high: Annotated[float, Field(gt=0, le=10)] = Field(
        0.2, description="The upper bound of the ratio is 1 + high; a value larger than low is DAPO's clip-higher."
    )


AdaptedLayer = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv",
    "linear_fc1",
    "linear_fc2",
    "projection_layer",
    "fc1",
    "fc2",
]
TEXT_LAYERS: tuple[AdaptedLayer, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of the language models of all families. The experts of a mixture are not linear layers."""
VISION_LAYERS: dict[FamilyName, tuple[AdaptedLayer, ...]] = {
    "qwen3-vl": ("qkv", "linear_fc1", "linear_fc2"),
    "qwen3.5": ("qkv", "linear_fc1", "linear_fc2"),
    "qwen2.5-vl": ("qkv", "gate_proj", "up_proj", "down_proj"),
    "internvl": ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"),
}
"""Linear layers of the vision tower of each family"""


class Lora(Model):
    """Low-rank adapters. Only they are trained; the weights of the model do not change. The exported model has them merged in."""

    rank: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Rank of an adapter's two matrices.")
    alpha: Annotated[int, Field(ge=1, le=65536)] = Field(
        32, description="An adapter's product is multiplied by alpha / rank."
    )
    targets: Annotated[list[AdaptedLayer], Field(min_length=1, max_length=13)] = Field(
        default_factory=lambda: list(TEXT_LAYERS),
        description="Linear layers that get an adapter, by the last part of their name. Absent: the seven layers of the language model. "
        "Layers of the vision tower get one only if freezeVision is false.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="SFT: share of an adapter's inputs that is set to 0 in training."
    )

    @property
    def scale(self) -> float:
        """Return the factor by which the product of an adapter's matrices is multiplied."""
        return self.alpha / self.rank


class Hyperparameters(Model):
    """Typed hyperparameters of SFT and RL. The preset fills absent ones; engineOverrides can set other values."""

    learning_rate: Rate | None = Field(None, description="Peak learning rate.")
    schedule: Literal["cosine", "constant", "linear"] | None = Field(
        None, description="Learning rate schedule after the warm-up (linear: SFT only)."
    )
    warmup_steps: NonNegative | None = Field(
        None, description="Warm-up in optimizer steps; takes precedence over warmupRatio."
    )
    warmup_ratio: Fraction | None = Field(None, description="Warm-up as a share of all steps (SFT).")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="AdamW weight decay.")
    adam_beta2: Rate | None = Field(None, description="AdamW's second beta.")
    max_grad_norm: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Maximum gradient norm; larger gradients are clipped."
    )
    epochs: Positive | None = Field(
        None,
        description="Number of passes over the data. If it is given without maxSteps, the preset's maxSteps is not used.",
    )
    max_steps: Positive | None = Field(None, description="Number of optimizer steps; takes precedence over epochs.")
    batch_size: Positive | None = Field(
        None, description="Rows in each optimizer step (SFT) or prompts in each batch (RL), over all GPUs."
    )
    mini_batch_size: Positive | None = Field(
        None,
        description="RL: prompts in each optimizer step of a batch; equal to batchSize is on-policy. "
        "If only batchSize is given: the same share of it as in the preset.",
    )
    micro_batch_size: Positive | None = Field(
        None,
        description="SFT: maximum number of rows that a GPU processes at once. Unset: only tokensPerGpu limits it.",
    )
    rollouts: Annotated[int, Field(ge=2, le=1024)] | None = Field(
        None,
        description="RL: number of answers to each prompt; they form the group in which advantages are normalised.",
    )
    prompt_length: Positive | None = Field(
        None, description="RL: maximum length of a prompt in tokens, including image tokens."
    )
    response_length: Positive | None = Field(None, description="RL: maximum length of an answer in tokens.")
    max_length: Positive | None = Field(
        None, description="SFT: maximum length of a row in tokens; a longer row is an error that names it."
    )
    min_pixels: Positive | None = Field(None, description="SFT: minimum number of pixels of a picture after resizing.")
    max_pixels: Positive | None = Field(None, description="SFT: maximum number of pixels of a picture after resizing.")
    temperature: Annotated[float, Field(gt=0)] | None = Field(None, description="RL: sampling temperature of rollouts.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="RL: nucleus of rollouts.")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="RL: top-k of rollouts; -1 is off."
    )
    kl_coefficient: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="RL: weight of the KL loss to the starting model; 0 turns it off, and no reference model is needed.",
    )
    kl_type: Literal["low_var_kl", "kl", "abs", "mse"] | None = Field(None, description="RL: estimator of the KL loss.")
    entropy_coefficient: Annotated[float, Field(ge=0)] | None = Field(
        None, description="RL: weight of the entropy bonus."
    )
    algorithm: Algorithm | None = Field(
        None,
        description="RL: sets loss, lossAggregation and advantage together; a value given for one of them takes precedence.",
    )
    advantage: Advantage | None = Field(
        None,
        description="RL: what an answer's reward is compared with. grpo: mean and deviation of its group; "
        "dr-grpo: only the mean; rloo: the mean of the other answers.",
    )
    clip_range: ClipRange | None = Field(None, description="RL: clipping of the policy's ratio.")
    loss: Loss | None = Field(None, description="RL: policy loss, by verl's name.")
    loss_aggregation: LossAggregation | None = Field(
        None,
        description="RL: how the losses of tokens are combined into one; seq-mean-token-mean reproduces the reference's GSPO, "
        "seq-mean-token-sum-norm (by a constant length) is Dr. GRPO's.",
    )
    tokens_per_gpu: Positive | None = Field(
        None,
        description="Tokens that a GPU processes at once; the rest of the batch is accumulated. SFT, unset: as many as the GPU's memory allows.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations: less memory, more time. SFT, unset: in as few layers as the GPU's memory allows.",
    )
    offload_parameters: bool | None = Field(None, description="RL: keep parameters in CPU memory between phases.")
    offload_optimizer: bool | None = Field(None, description="RL: keep the optimizer in CPU memory between phases.")
    rollout_engine: RolloutEngine | None = Field(
        None,
        description="RL: engine that generates the answers on GPUs; sglang needs an image that contains it. On a CPU, transformers is used.",
    )
    gpu_memory_utilization: Rate | None = Field(None, description="RL: share of GPU memory for the rollout engine.")
    tensor_parallel: Positive | None = Field(None, description="RL: GPUs that share one rollout engine.")
    save_every: Positive | None = Field(
        None, description="Steps between checkpoints; a killed training can lose this many steps."
    )
    validate_every: Positive | None = Field(
        None,
        description="Steps between validations; the last step is always validated. SFT: if the job has validation data.",
    )
    validate_before_train: bool | None = Field(None, description="Validate once before the first step.")
    keep_best: Figure | None = Field(
        None,
        description="Also keep the checkpoint with the best value of a metric, and export it. Give a metric (valAccuracy, valIou, "
        "valScore, valParsed; SFT: valLoss, valTokenAccuracy), a validation set's name (its valAccuracy or valLoss), or metric/set.",
    )
    keep_checkpoints: Positive | None = Field(
        None, description="Number of checkpoints to keep; older ones are removed."
    )
    freeze_vision: bool | None = Field(None, description="Freeze the vision tower except its merger.")
    lora: Lora | None = Field(
        None, description="Train low-rank adapters instead of the weights; if absent, the weights are trained."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of training and rollouts on a GPU."
    )
    engine_overrides: Annotated[list[Override], Field(max_length=256)] = Field(
        default_factory=list, description="RL: verl (Hydra) overrides key=value, applied last."
    )
