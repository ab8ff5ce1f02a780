"""Estimate what a job needs before it runs: steps, tokens, memory of a GPU by part, disk and hours. Pure; `egm plan` prints it.

Memory follows from the model's sizes and from what the trainers keep. Hours follow from measured rates, and the comment of each rate says
how it was measured. Tests compare the memory of SFT at 4B and 8B with measurements on an H200.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from grounding.api.resolved import ResolvedEvalJob, ResolvedJob, ResolvedTrainJob, RlJob, SftJob
from grounding.jsontypes import JsonObject
from grounding.models import architecture, memory
from grounding.models.architecture import Architecture

GIB = 1 << 30
KNOWN = Path(__file__).with_name("known_models.json")
"""File with the sizes of the presets' models, so that no network is needed"""

# ---- measured ----
H200 = 139.8
"""Memory in GiB of an H200, on which SFT and RL's update were measured"""
PEAK = 788e12
"""Best measured rate of bfloat16 matrix products on an H200, in floating point operations per second"""
_MEASURED_TRAINED = 4.05e9
"""Number of weights trained in the measurements at 4B, with a frozen vision tower"""
SFT_SHARE, SFT_SHARE_SHARED = 0.43, 0.27
"""Measured shares of PEAK: with packs of 8,192 tokens at 4B on one GPU with transformers' kernels (0.59 with Liger's), and at 8B on two
GPUs
"""
ROW_TOKENS = 207
"""Tokens of an SFT row with a picture of 640 x 480 at maxPixels 50176 and 30 to 80 words of reasoning"""
UPDATE_A, UPDATE_B = 6.63e-5, 1.0303e-8
"""RL's update at 4B takes A + B x (tokens at once) seconds per token (with `sdpa`: 6,542 tokens/s at 8,400 tokens, 3,068 at 25,200)"""
ANSWERS = 49.85
"""Answers of 100 tokens per second on one H100: vLLM 0.24.0, sizes of Qwen3-VL-4B, pictures of 640 x 480 (99.7 on two GPUs)"""
_ANSWER_TOKENS, _SERVED = 100, 4.44e9
PROMPT_TOKENS = 360
"""Tokens of a question: 300 for a picture of 640 x 480, and about 60 for text"""
LOSS = 3 << 30
"""Bytes of a chunk of logits in the loss of SFT: in float32, and again in the computing precision"""
EVALUATION_ROWS = 57_457
"""Number of rows in the eight files of RefCOCO, RefCOCO+ and RefCOCOg"""


@dataclass(frozen=True)
class Part:
    """A part of the memory or of the disk. `note` says what it consists of."""

    name: str
    bytes: float
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """The memory of one GPU in a phase of the work."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        """Return the bytes of all parts together."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Estimate:
    """What a job needs. A value is None if it depends on something unknown, which `assumptions` names."""

    steps: int | None
    step: tuple[Part, ...]
    """Rows, tokens and answers of one step. Here, the field `bytes` of a part is a count, not a size"""
    phases: tuple[Phase, ...]
    pod_memory: tuple[Part, ...]
    disk: tuple[Part, ...]
    hours: float | None
    assumptions: tuple[str, ...]
    architecture: Architecture | None = None


@dataclass(frozen=True)
class Given:
    """The inputs of an estimate in addition to the job. `rows` is the number of training rows; None if it is unknown."""

    architecture: Architecture | None
    rows: int | None = None
    answer_tokens: int = _ANSWER_TOKENS
    gpu_gib: float = H200


@lru_cache(maxsize=1)
def _known() -> Mapping[str, Any]:
    found: JsonObject = orjson.loads(KNOWN.read_bytes())
    return found


def known(source: str) -> Architecture | None:
    """Return the architecture of a hub model that is in the table of known models; None for any other."""
    entry = _known().get(source.partition("@")[0])
    if entry is None:
        return None
    return known(entry["as"]) if "as" in entry else architecture.read(entry["config"])


def known_names() -> tuple[str, ...]:
    """Return the names of the models in the table."""
    return tuple(_known())


def steps(job: ResolvedTrainJob, rows: int | None) -> int | None:
    """Return the optimizer steps (RL: batches) of a job; None if they depend on an unknown number of rows."""
    h = job.spec.hyperparameters
    if h.max_steps is not None:
        return h.max_steps
    if rows is None:
        return None
    # SFT trains on the rest of an epoch as a smaller batch; verl leaves it out
    return h.epochs * (rows // h.batch_size if isinstance(job, RlJob) else -(-rows // h.batch_size))


def estimate(job: ResolvedJob, given: Given) -> Estimate:
    """Return the estimate of what a job needs."""
    if isinstance(job, SftJob):
        return _sft(job, given)
    if isinstance(job, RlJob):
        return _rl(job, given)
    assert isinstance(job, ResolvedEvalJob)
    return _evaluation(job, given)


def trained_weights(job: ResolvedTrainJob, arch: Architecture) -> int:
    """Return the number of weights that a job trains. If it uses adapters, only these are trained."""
    h = job.spec.hyperparameters
    if h.lora is not None:
        return arch.adapter_weights(h.lora.rank, h.lora.targets, h.freeze_vision)
    return arch.trained(h.freeze_vision)


def _equivalent_weights(job: ResolvedTrainJob, arch: Architecture) -> float:
    """Return the number of trained weights that would take the same time. A token costs 2 operations per weight forward and 2 per gradient.

    With adapters, the gradients of the model's own weights are not computed, which saves a third of the operations.
    """
    h = job.spec.hyperparameters
    if h.lora is None:
        return arch.trained(h.freeze_vision)
    return 2 / 3 * arch.trained(h.freeze_vision) + trained_weights(job, arch)


def _gpus(job: ResolvedTrainJob) -> int:
    return job.spec.resources.nodes * job.spec.resources.gpus_per_node


def _activations(text: architecture.TextSizes, tokens: float, recomputed: bool, residual: int) -> Part:
    """Return the activations for `tokens` at once. `residual` is the number of bytes of a value between the layers."""
    layer, _ = memory.activation_bytes(text)
    if recomputed:
        size = tokens * (text.layers * residual * text.hidden + layer)
        return Part("activations", size, f"{tokens:,.0f} tokens; the input of each layer, and one layer recomputed")
    return Part("activations", tokens * text.layers * layer, f"{tokens:,.0f} tokens, all layers")


def _unknown_steps(job: ResolvedTrainJob) -> str:
    h = job.spec.hyperparameters
    return (
        f"steps are rows x {h.epochs} / {h.batch_size}: the rows are not on this machine; give their number with --rows"
    )


_NO_SIZES = "the model's sizes are not known here, so memory, disk and hours are not estimated"


def _sft(job: SftJob, given: Given) -> Estimate:
    h, gpus, count = job.spec.hyperparameters, _gpus(job), steps(job, given.rows)
    row_tokens = min(ROW_TOKENS, h.max_length)
    step = (
        Part("rows", h.batch_size),
        Part("tokens", h.batch_size * row_tokens, f"{row_tokens} a row, measured on rows of reasoning and a box"),
    )
    notes = [] if count is not None else [_unknown_steps(job)]
    arch, ranks = given.architecture, max(1, gpus)
    if arch is None:
        return Estimate(count, step, (), (), (), None, (*notes, _NO_SIZES))
    phases: tuple[Phase, ...] = ()
    hours = None
    trained = trained_weights(job, arch)
    if gpus:
        phases = (Phase("training", _sft_memory(job, arch, ranks, row_tokens, given.gpu_gib)),)
        share = SFT_SHARE if ranks == 1 else SFT_SHARE_SHARED
        rate = share * PEAK / (6 * _equivalent_weights(job, arch)) * ranks
        hours = count * h.batch_size * row_tokens / rate / 3600 if count is not None else None
        notes.append(
            f"{rate:,.0f} tokens/s: {share:.0%} of {PEAK / 1e12:.0f} TFLOP/s, measured on an H200 (docs/benchmarks.md)"
        )
    saved = arch.parameters if h.lora is None or ranks > 1 else trained
    return Estimate(count, step, phases, (), _disk(job, arch, 4 * saved + 8 * trained), hours, tuple(notes), arch)


def _sft_memory(job: SftJob, arch: Architecture, ranks: int, row_tokens: int, gpu_gib: float) -> tuple[Part, ...]:
    """Return the memory of a GPU in SFT.

    One GPU has bfloat16 weights with float32 masters; several GPUs share float32 weights. The pack has the size that the role would choose.
    """
    h, text = job.spec.hyperparameters, arch.text
    trained = trained_weights(job, arch)
    number, masters = 4 if h.dtype == "float32" else 2, ranks == 1 and h.dtype == "bfloat16"
    free = 0.95 * gpu_gib * GIB - memory.state_bytes(arch.parameters, trained, ranks, masters=masters)
    packs = memory.plan(text, int(free), h.tokens_per_gpu, h.gradient_checkpointing, fused=True, number=number)
    rows = h.batch_size // ranks if h.micro_batch_size is None else min(h.micro_batch_size, h.batch_size // ranks)
    tokens = min(packs.tokens, max(1, rows) * row_tokens)
    kept, short = memory.activation_bytes(text, number)
    size = tokens * ((text.layers - packs.recomputed) * kept + packs.recomputed * short + bool(packs.recomputed) * kept)
    shared = f", shared by {ranks} GPUs" if ranks > 1 else ""
    parts = [
        Part(
            "weights",
            (2 if masters else 4) * arch.parameters / ranks,
            f"{'bfloat16' if masters else 'float32'}{shared}",
        ),
        Part("gradients", 4 * trained / ranks, f"float32{shared}"),
        Part(
            "optimizer",
            (12 if masters else 8) * trained / ranks,
            f"AdamW's two moments{' and float32 weights' if masters else ''}{shared}",
        ),
        Part(
            "activations", size, f"{tokens:,.0f} tokens at once; {packs.recomputed} of {text.layers} layers recomputed"
        ),
        Part("loss", LOSS + number * text.vocabulary * text.hidden, "a chunk of logits, the output matrix's gradient")
        if h.lora is None
        else Part("loss", LOSS, "a chunk of logits"),
    ]
    if ranks > 1:
        parts.append(Part("gathered", number * _gathered(arch), "two layers, embedding and output in one piece"))
    elif not masters and number == 2:
        parts.append(Part("copies", 2 * arch.parameters, f"weights in {h.dtype}, for the products"))
    return tuple(parts)


def _gathered(arch: Architecture) -> int:
    """Return the number of weights that a rank of a sharded model holds unsharded at a time: two layers, the embedding and the output
    matrix.
    """
    whole = {name: math.prod(shape) for name, shape in arch.tensors.items()}
    layer = sum(size for name, size in whole.items() if name.startswith("model.language_model.layers.0."))
    return 2 * layer + whole["model.language_model.embed_tokens.weight"] + whole.get("lm_head.weight", 0)


def _rl(job: RlJob, given: Given) -> Estimate:
    h, gpus, count = job.spec.hyperparameters, _gpus(job), steps(job, given.rows)
    answers, answer = h.batch_size * h.rollouts, min(given.answer_tokens, h.response_length)
    tokens = answers * (min(PROMPT_TOKENS, h.prompt_length) + answer)
    step = (
        Part("prompts", h.batch_size),
        Part("answers", answers, f"{h.rollouts} a prompt"),
        Part("tokens", tokens, f"{PROMPT_TOKENS} a prompt, {answer} an answer (--answer-tokens)"),
        Part("updates", h.batch_size // h.mini_batch_size, f"of {h.mini_batch_size} prompts"),
    )
    notes = [] if count is not None else [_unknown_steps(job)]
    arch = given.architecture
    if arch is None:
        return Estimate(count, step, (), (), (), None, (*notes, _NO_SIZES))
    trained = trained_weights(job, arch)
    saved = arch.parameters if h.lora is None else trained
    disk = _disk(job, arch, 4 * saved + 8 * trained)
    if not gpus:
        return Estimate(count, step, (), (), disk, None, tuple(notes), arch)
    phases = (_rollout(job, arch, given.gpu_gib), _update(job, arch, gpus))
    # the model without its adapters is the reference model
    copies = 1 + (h.kl_coefficient > 0 and h.lora is None)
    held = 4 * arch.parameters * copies if h.offload_parameters else 0
    held += 8 * trained if h.offload_optimizer else 0
    nodes = job.spec.resources.nodes
    pod = (Part("offloaded", held / nodes, "parameters and optimizer in the CPU's memory"),) if held else ()
    hours = count * _step_seconds(job, arch, tokens, answers * answer, gpus) / 3600 if count is not None else None
    notes.append(
        "rates: update with sdpa and rollouts by vLLM, measured at 4B on an H200 and an H100 (docs/benchmarks.md), "
        "scaled by the model's weights; validation and checkpoints are not in it"
    )
    share = share_without_offloading(job, arch, gpus, given.gpu_gib, answers * (PROMPT_TOKENS + answer))
    if share is not None:
        notes.append(
            "the GPUs' memory suffices without offloading, which makes a step faster (docs/benchmarks.md): "
            f"offloadParameters: false, offloadOptimizer: false, gpuMemoryUtilization: {share:g}"
        )
    return Estimate(count, step, phases, pod, disk, hours, tuple(notes), arch)


def share_without_offloading(
    job: RlJob, arch: Architecture, gpus: int, gpu_gib: float, step_tokens: int
) -> float | None:
    """Return the `gpuMemoryUtilization` with which nothing needs to be offloaded, in steps of 0.05, or None.

    None if the job offloads nothing, or if the memory does not suffice for the update or for the KV cache of a step's `step_tokens` tokens.
    Measured: a 4B model on one H200 with 0.4 used 115.2 of 139.8 GiB.
    """
    h, whole = job.spec.hyperparameters, gpu_gib * GIB
    if not any((h.offload_parameters, h.offload_optimizer)):
        return None
    with_reference = h.kl_coefficient > 0 and h.lora is None
    reference = 4 * arch.parameters / gpus if with_reference else 0
    update = _update(job, arch, gpus).bytes + reference + _IDLE_ENGINE
    held = reference + sum(part.bytes for part in _held_by_actor(job, arch))
    share = math.floor(20 * (whole - held - _SPARE) / whole) / 20
    cache = step_tokens / gpus * _cache_bytes(arch.text)
    if update > whole - _IDLE_ENGINE or share * whole < _engine_weights(job, arch).bytes + cache + _IDLE_ENGINE:
        return None
    return min(share, h.gpu_memory_utilization)


_IDLE_ENGINE = 4 * GIB
"""Memory that the rollout engine keeps while it sleeps (measured at 4B: 2.9 GiB), or needs for activations and graphs"""
_SPARE = 16 * GIB
"""Memory left free beside the trained model during rollouts, for the transfer of weights and two processes' CUDA contexts"""


def _step_seconds(job: RlJob, arch: Architecture, tokens: int, answered: int, gpus: int) -> float:
    """Return the seconds of a step of RL: rollouts, log-probabilities (a third of a full update each) and the update."""
    h = job.spec.hyperparameters
    scale = arch.trained(h.freeze_vision) / _MEASURED_TRAINED
    passes = _equivalent_weights(job, arch) / arch.trained(h.freeze_vision) + (1 + (h.kl_coefficient > 0)) / 3
    update = tokens * passes * (UPDATE_A + UPDATE_B * h.tokens_per_gpu) * scale / gpus
    return answered / (ANSWERS * _ANSWER_TOKENS * gpus) * scale + update


def _rollout(job: RlJob, arch: Architecture, gpu_gib: float) -> Phase:
    """Return the memory of a GPU while answers are sampled. vLLM takes its share, whatever the model needs."""
    h, weights = job.spec.hyperparameters, _engine_weights(job, arch)
    share = h.gpu_memory_utilization * gpu_gib * GIB
    token = _cache_bytes(arch.text) / h.tensor_parallel
    cache = max(0.0, share - weights.bytes)
    parts = [
        weights,
        Part("KV cache", cache, f"{cache / token:,.0f} tokens; gpuMemoryUtilization {h.gpu_memory_utilization:g}"),
    ]
    actor, optimizer = _held_by_actor(job, arch)
    if not h.offload_parameters:
        parts.append(actor)
    if not h.offload_optimizer:
        parts.append(optimizer)
    return Phase("rollouts", tuple(parts))


def _engine_weights(job: RlJob, arch: Architecture) -> Part:
    """Return the weights of the rollout engine on a GPU."""
    h = job.spec.hyperparameters
    size = (4 if h.dtype == "float32" else 2) * arch.parameters / h.tensor_parallel
    return Part("weights", size, f"{h.dtype}, of the rollout engine")


def _held_by_actor(job: RlJob, arch: Architecture) -> tuple[Part, Part]:
    """Return a GPU's share of the trained weights and of the optimizer, which stay there during rollouts unless they are offloaded."""
    gpus = _gpus(job)
    return (
        Part("actor", 4 * arch.parameters / gpus, "float32, its share"),
        Part("optimizer", 8 * trained_weights(job, arch) / gpus, "AdamW's two moments, its share"),
    )


def _cache_bytes(text: architecture.TextSizes) -> int:
    """Return the bytes that one token takes in the KV cache."""
    return 2 * 2 * text.layers * text.key_value_heads * text.head_size


def _update(job: RlJob, arch: Architecture, gpus: int) -> Phase:
    """Return the memory of a GPU in verl's update: float32 weights under FSDP, computing in `dtype`, `tokensPerGpu` tokens at once."""
    h, text = job.spec.hyperparameters, arch.text
    trained = trained_weights(job, arch)
    number = 4 if h.dtype == "float32" else 2
    parts = (
        Part("weights", 4 * arch.parameters / gpus, f"float32, shared by {gpus} GPUs"),
        Part("gradients", 4 * trained / gpus, f"float32, shared by {gpus} GPUs"),
        Part("optimizer", 8 * trained / gpus, "AdamW's two moments, shared likewise"),
        Part("gathered", number * _gathered(arch), "two layers, embedding and output in one piece"),
        _activations(text, h.tokens_per_gpu, h.gradient_checkpointing, residual=number),
        Part("logits", 2 * number * h.tokens_per_gpu * text.vocabulary, "and their gradient"),
    )
    return Phase("update", parts)


def _disk(job: ResolvedTrainJob, arch: Architecture, checkpoint: float) -> tuple[Part, ...]:
    h = job.spec.hyperparameters
    number = 4 if h.dtype == "float32" else 2
    best = 1 if h.keep_best is not None else 0
    kept = f"{h.keep_checkpoints} kept, {'the best one, ' if best else ''}one being written"
    return (
        Part("checkpoints", checkpoint * (h.keep_checkpoints + best + 1), kept),
        Part("model", number * arch.parameters, f"{h.dtype}, at the end"),
    )


def _evaluation(job: ResolvedEvalJob, given: Given) -> Estimate:
    spec, arch = job.spec, given.architecture
    rows = given.rows
    answers = spec.answers_by_setting
    settings = f"{len(answers)} settings, " if len(answers) > 1 else ""
    several = f"{settings}{sum(answers)} answers to each" if sum(answers) > 1 else ""
    step = (Part("questions", rows, several),) if rows is not None else ()
    notes = [] if rows is not None else ["the number of questions is not known here; give it with --rows"]
    if arch is None or not spec.gpus_per_server or spec.endpoints:
        return Estimate(None, step, (), (), (), None, (*notes, *([_NO_SIZES] if arch is None else [])), arch)
    weights, token = 2 * arch.parameters / spec.tensor_parallel, _cache_bytes(arch.text) / spec.tensor_parallel
    cache = max(0.0, 0.9 * given.gpu_gib * GIB - weights)
    parts = (
        Part("weights", weights, "bfloat16"),
        Part("KV cache", cache, f"{cache / token:,.0f} tokens, if the engine takes 0.9 of the memory"),
    )
    rate = ANSWERS * (_SERVED / arch.parameters) * (_ANSWER_TOKENS / given.answer_tokens)
    rate *= spec.servers * spec.copies
    notes.append(
        f"{rate:,.0f} answers/s of {given.answer_tokens} tokens: vLLM on an H100 at 4B (docs/benchmarks.md), scaled"
    )
    hours = sum(answers) * rows / rate / 3600 if rows is not None else None
    return Estimate(None, step, (Phase("serving", parts),), (), (), hours, tuple(notes), arch)
