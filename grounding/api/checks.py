"""What cannot work, or has no effect, in a resolved train job: one table of checks. Pure.

The models check fields one by one; these checks see the run that the fields stand for. `manifest.read` calls them for every way into the
project. Each check names the field, the reason and the remedy; the value is found in the job.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from grounding.api.base import ROW_SUFFIXES
from grounding.api.families import FAMILIES
from grounding.api.hyperparameters import TEXT_LAYERS, VISION_LAYERS, ClipRange
from grounding.api.models import GroundingEvalJob, ModelRef
from grounding.api.resolved import ResolvedJob, ResolvedTrainJob, RlJob, SftJob, method_fields, required_fields
from grounding.api.validation import FIGURES, best_figure

J = TypeVar("J", bound=ResolvedTrainJob)
Found = str | None
"""The value that is wrong, as people read it; None if nothing is"""


@dataclass(frozen=True)
class Check(Generic[J]):
    """One check. `field`: below `spec`; `wrong`: returns the value that is wrong; `reason` and `remedy`: sentences."""

    field: str
    wrong: Callable[[J], Found]
    reason: str
    remedy: str


def _gpus(job: ResolvedTrainJob) -> int:
    return job.spec.resources.nodes * job.spec.resources.gpus_per_node


# ---- both ----
def _lora_targets(job: ResolvedTrainJob) -> Found:
    h, family = job.spec.hyperparameters, job.spec.model.family_name
    if h.lora is None:
        return None
    there = {*TEXT_LAYERS, *(() if h.freeze_vision else VISION_LAYERS[family])}
    idle = [name for name in h.lora.targets if name not in there]
    return f"{', '.join(idle)} of {family}" + (" with freezeVision true" if h.freeze_vision else "") if idle else None


def _sets(job: ResolvedTrainJob) -> Found:
    sets = job.spec.data.validation_sets
    files = [file for many in sets.values() for file in many]
    if odd := [name for name, of_set in sets.items() if not of_set or not _SET_NAME.fullmatch(name)]:
        return repr(odd[0])
    return next((file for file in files if files.count(file) > 1), None)


_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def _best(job: ResolvedTrainJob) -> Found:
    data, named, figure = job.spec.data, job.spec.hyperparameters.keep_best, best_figure(job)
    if named is None or figure is None:
        return None
    if job.spec.method == "sft" and not data.validation and not data.validation_sets:
        return f"{named} without data.validation"
    plain, _, name = figure.partition("/")
    known = data.prepared is not None or not name or name in data.validation_sets
    return None if plain in FIGURES[job.spec.method] and known else named


def _best_saved(job: ResolvedTrainJob) -> Found:
    h = job.spec.hyperparameters
    if h.keep_best is None or h.validate_every % h.save_every == 0:
        return None
    return f"{h.save_every} with validateEvery {h.validate_every}"


def _named_twice(job: ResolvedTrainJob) -> Found:
    data = job.spec.data
    return next((name for name in data.train if data.train.count(name) > 1), None)


def _trained_on(job: ResolvedTrainJob) -> Found:
    data = job.spec.data
    files = [*data.validation, *(file for many in data.validation_sets.values() for file in many)]
    return next((name for name in files if name in data.train), None)


def _rows_form(job: ResolvedTrainJob) -> Found:
    data = job.spec.data
    files = [*data.train, *data.validation, *(file for many in data.validation_sets.values() for file in many)]
    return next((name for name in files if not name.endswith(ROW_SUFFIXES)), None)


def _shape_fields(job: ResolvedTrainJob) -> Found:
    data = job.spec.data
    return data.images[0] if data.shapes is not None and data.images and not data.validation_sets else None


def _small(quantity: str | None) -> Found:
    """Return a quantity of memory if it is so little that its unit must be missing or wrong."""
    match = None if quantity is None else re.fullmatch(r"([0-9.]+)(m|k|Ki|M|Mi)?", quantity)
    if match is None:
        return None
    amount = float(match[1]) * {"m": 1e-3, "k": 1e3, "Ki": 2**10, "M": 1e6, "Mi": 2**20}.get(match[2], 1.0)
    return quantity if amount < _LEAST_MEMORY else None


_LEAST_MEMORY = 2**26
"""Bytes; with less no training is meant"""


def _wandb(job: ResolvedTrainJob) -> Found:
    wandb = job.spec.tracking.wandb
    url = wandb.base_url if wandb is not None else None
    return url if url is not None and not url.startswith(("http://", "https://")) else None


_UNIT = "Write the unit: 64Gi."
TRAIN: tuple[Check[ResolvedTrainJob], ...] = (
    Check(
        "data.train",
        _named_twice,
        "the file is named twice",
        "Name it once; data.weights says how often its rows are taken.",
    ),
    Check(
        "data.train",
        _rows_form,
        "rows are read from files of the forms " + ", ".join(ROW_SUFFIXES),
        "Convert the file (`egm data import` knows the public forms).",
    ),
    Check(
        "data.validation",
        _trained_on,
        "the file is trained on, so it says nothing about the model",
        "Name other files, or split this one.",
    ),
    Check(
        "data.images",
        _shape_fields,
        "data.shapes brings its own pictures, so this has no effect",
        "Leave it out.",
    ),
    *(
        Check[ResolvedTrainJob](field, wrong, "a training needs more; a quantity without a unit counts bytes", _UNIT)
        for field, wrong in (
            ("resources.memory", lambda job: _small(job.spec.resources.memory)),
            ("resources.sharedMemory", lambda job: _small(job.spec.resources.shared_memory)),
        )
    ),
    Check(
        "tracking.wandb.baseUrl",
        _wandb,
        "this is no address of a server",
        "Begin it with https:// or http://.",
    ),
    Check(
        "hyperparameters.keepBest",
        _best,
        "no validation of this job has such a figure",
        "Name one of data.validationSets, "
        + "; ".join(f"{method}: {', '.join(names)}" for method, names in FIGURES.items())
        + ", or one of these with a set's name behind a slash.",
    ),
    Check(
        "hyperparameters.saveEvery",
        _best_saved,
        "keepBest needs a checkpoint of every step that is validated",
        "Choose a divisor of validateEvery.",
    ),
    Check(
        "data.validationSets",
        _sets,
        "each set has a name of letters, digits, - and _, and files that belong to no other set",
        "Change the name, name a file, or leave the set out.",
    ),
    Check(
        "hyperparameters.lora.targets",
        _lora_targets,
        "the model has no such linear layer, or it is one of the vision tower, which is frozen",
        f"Choose among {', '.join(TEXT_LAYERS)}, or set freezeVision to false for those of the vision tower.",
    ),
)


# ---- SFT ----
def _sft_batch(job: SftJob) -> Found:
    h, processes = job.spec.hyperparameters, max(1, _gpus(job))
    if h.micro_batch_size is None:
        return f"{h.batch_size} on {processes} GPUs" if h.batch_size % processes else None
    share = h.micro_batch_size * processes
    return f"{h.batch_size} with microBatchSize {h.micro_batch_size} on {processes}" if h.batch_size % share else None


def _sft_pixels(job: SftJob) -> Found:
    low, high = job.spec.hyperparameters.min_pixels, job.spec.hyperparameters.max_pixels
    return f"{low} with maxPixels {high}" if low is not None and high is not None and low > high else None


def _sft_tiles(job: SftJob) -> Found:
    given = [job.spec.hyperparameters.min_pixels, job.spec.hyperparameters.max_pixels]
    asked = [str(v) for v in given if v is not None]
    return asked[0] if not job.spec.model.family_facts.pixels and asked else None


def _tiny_kind(job: ResolvedTrainJob) -> Found:
    model = job.spec.model
    return None if model.tiny_kind in (None, *model.family_facts.tiny) else str(model.source)


def _no_model(job: ResolvedTrainJob) -> Found:
    model = job.spec.model
    return "no entry" if model.source is None and model.train_job is None else None


_MODEL: Check[Any] = Check(
    "model", _no_model, "a training starts from a model", "Name it: source, or trainJob for what a job leaves."
)
_TINY = "no tiny model of that kind is in this family"
_KINDS = f"Known are {', '.join(f'tiny://{kind}' for family in FAMILIES.values() for kind in family.tiny)}."


def _sft_images(job: SftJob) -> Found:
    data = job.spec.data
    text_only = [name for name in data.train if name.endswith((".json", ".jsonl"))]
    return "no entry" if data.train and len(text_only) == len(data.train) and not data.images else None


def _sft_length(job: SftJob) -> Found:
    h, family = job.spec.hyperparameters, job.spec.model.family_facts
    if h.max_pixels is None or not family.pixels:
        return None
    picture = h.max_pixels // family.grid**2
    return f"{h.max_length} with maxPixels {h.max_pixels}" if h.max_length <= picture else None


SFT: tuple[Check[SftJob], ...] = (
    Check(
        "hyperparameters.maxLength",
        _sft_length,
        "a picture of that size alone takes as many tokens",
        "Raise maxLength or lower maxPixels.",
    ),
    _MODEL,
    Check("model.source", _tiny_kind, _TINY, _KINDS),
    Check(
        "hyperparameters.batchSize",
        _sft_batch,
        "the batch must be a multiple of the number of GPUs, times microBatchSize if that is given",
        "Change batchSize, microBatchSize or resources.",
    ),
    Check(
        "hyperparameters.minPixels",
        _sft_pixels,
        "the smallest picture would be larger than the largest",
        "Lower minPixels or raise maxPixels.",
    ),
    Check(
        "hyperparameters",
        _sft_tiles,
        "InternVL cuts pictures into tiles of one size, so minPixels and maxPixels have no effect",
        "Leave both out, or choose the tiles in the model's preprocessor_config.json (max_patches).",
    ),
    Check(
        "data.images",
        _sft_images,
        "the rows of JSON files name pictures and do not hold them",
        "Name the folders or tar files that hold the pictures.",
    ),
)


# ---- RL ----
def _rl_tokens(job: RlJob) -> Found:
    h = job.spec.hyperparameters
    if h.prompt_length + h.response_length <= h.tokens_per_gpu:
        return None
    return f"{h.response_length} with promptLength {h.prompt_length} and tokensPerGpu {h.tokens_per_gpu}"


def _rl_parallel(job: RlJob) -> Found:
    wanted, gpus = job.spec.hyperparameters.tensor_parallel, job.spec.resources.gpus_per_node
    return f"{wanted} of {gpus} GPUs" if gpus and gpus % wanted else None


def _rl_mini(job: RlJob) -> Found:
    h = job.spec.hyperparameters
    return f"{h.mini_batch_size} of batchSize {h.batch_size}" if h.batch_size % h.mini_batch_size else None


_CLIPPED = ("vanilla", "gspo", "clip_cov", "geo_mean", "cispo")
"""The policy losses of verl that read the clip range"""


def _rl_clip(job: RlJob) -> Found:
    h, default = job.spec.hyperparameters, ClipRange()  # type: ignore[call-arg]
    if h.clip_range == default or h.loss in _CLIPPED:
        return None
    return f"{h.clip_range.low:g} ... {h.clip_range.high:g} with loss {h.loss}"


def _rl_batch(job: RlJob) -> Found:
    h, gpus = job.spec.hyperparameters, _gpus(job)
    for size in (h.batch_size, h.mini_batch_size):
        if gpus and size * h.rollouts % gpus:
            return f"{gpus} GPUs with {size} prompts x {h.rollouts} rollouts"
    return None


def _rl_dropout(job: RlJob) -> Found:
    lora = job.spec.hyperparameters.lora
    return f"{lora.dropout:g}" if lora is not None and lora.dropout else None


_ALPHA = ("mix", "penalty")
"""The rewards that weigh passing against IoU"""


def _rl_alpha(job: RlJob) -> Found:
    reward = job.spec.reward
    return f"{reward.alpha:g} with type {reward.type}" if reward.alpha != 0.5 and reward.type not in _ALPHA else None


RL: tuple[Check[RlJob], ...] = (
    Check(
        "reward.alpha",
        _rl_alpha,
        "this reward does not weigh passing against IoU, so it has no effect",
        f"Leave it out, or choose the type {' or '.join(_ALPHA)}.",
    ),
    Check(
        "data.shapes.reasoning",
        lambda job: "true" if job.spec.data.shapes is not None and job.spec.data.shapes.reasoning else None,
        "rows of RL hold no answers, so it has no effect",
        "Leave it out.",
    ),
    _MODEL,
    Check("model.source", _tiny_kind, _TINY, _KINDS),
    Check(
        "hyperparameters.rolloutEngine",
        lambda job: "sglang" if job.spec.hyperparameters.rollout_engine == "sglang" and not _gpus(job) else None,
        "without GPUs transformers draws the answers",
        "Leave it out, or give the job GPUs.",
    ),
    Check(
        "hyperparameters.lora.dropout",
        _rl_dropout,
        "verl's adapters have no dropout, so it has no effect for method rl",
        "Leave it out.",
    ),
    Check(
        "hyperparameters.responseLength",
        _rl_tokens,
        "a prompt and its answer must fit into tokensPerGpu: verl ends at the first answer that does not",
        "Raise tokensPerGpu, or lower promptLength or responseLength.",
    ),
    Check(
        "hyperparameters.tensorParallel",
        _rl_parallel,
        "a rollout engine must have the same number of GPUs as the others of its node",
        "Choose a divisor of resources.gpusPerNode.",
    ),
    Check(
        "hyperparameters.schedule",
        lambda job: "linear" if job.spec.hyperparameters.schedule == "linear" else None,
        "verl has no linear schedule",
        "Choose cosine or constant.",
    ),
    Check(
        "hyperparameters.clipRange",
        _rl_clip,
        "this loss does not clip by a range, so it has no effect",
        f"Leave it out, or choose one of the losses {', '.join(_CLIPPED)}.",
    ),
    Check(
        "hyperparameters.miniBatchSize",
        _rl_mini,
        "a batch is split into mini batches of one size",
        "Choose a divisor of batchSize, or leave it out: it follows batchSize.",
    ),
    Check(
        "resources.gpusPerNode",
        _rl_batch,
        "the answers of a batch and of a mini batch are shared equally among the GPUs",
        "Change resources, batchSize, miniBatchSize or rollouts.",
    ),
)

# ---- verl's own keys ----
KEYS = Path(__file__).with_name("verl_keys.txt")
"""Every key of the pinned verl's configuration; `hack/docs/verl_keys.py` writes it"""
_STEPS = {
    "trainer.total_training_steps": "maxSteps",
    "trainer.total_epochs": "epochs",
    "data.train_batch_size": "batchSize",
    "data.gen_batch_size": "batchSize",
    "data.train_max_samples": "maxSteps",
    "trainer.val_only": "a GroundingEvalJob",
}
"""Key that changes the number of steps -> what to use for it"""
WITHOUT_READER = {
    "actor_rollout_ref.actor.freeze_vision_tower": "Use freezeVision instead.",
    "actor_rollout_ref.nccl_timeout": "Leave it out.",
    "actor_rollout_ref.rollout.multi_stage_wake_up": "Leave it out.",
    "actor_rollout_ref.rollout.multi_turn.num_repeat_rollouts": "Use rollouts instead.",
    "actor_rollout_ref.rollout.over_sample_rate": "Leave it out.",
    "data.return_raw_input_ids": "Leave it out.",
}
"""Keys that the pinned verl has and no one in it reads -> what to do; a test compares them with its source"""
_IGNORED = {
    "critic": "the advantages of this project's algorithms need no critic. Leave it out.",
    "custom_reward_function": "verl 0.9 reads reward.custom_reward_function. Use reward.file of the job instead.",
    "reward_model": "verl 0.9 reads reward.reward_model. Leave it out.",
    "reward.custom_reward_function": "the job's own reward would be lost. Use reward.file of the job instead.",
    "data.reward_fn_key": "the reward reads data_source whatever is set there. Leave it out.",
    "algorithm.kl_ctrl": "it is read with use_kl_in_reward only. Use klCoefficient instead.",
    "actor_rollout_ref.actor.clip_ratio": "the bounds below and above are given by themselves. Use clipRange instead.",
    "actor_rollout_ref.actor.ppo_micro_batch_size": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "batches are dynamic. Use tokensPerGpu instead.",
}
"""Keys and sections that verl reads and that have no effect in a job of this project -> why, and what to do"""
_OWN = {
    "actor_rollout_ref.actor.checkpoint": "the job resumes and exports what it saves. Leave it out.",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "Use tokensPerGpu instead.",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "Use miniBatchSize instead.",
    "actor_rollout_ref.model.path": "Use model.source instead.",
    "actor_rollout_ref.rollout.max_model_len": "It follows from promptLength and responseLength.",
    "actor_rollout_ref.rollout.n": "Use rollouts instead.",
    "actor_rollout_ref.rollout.name": "Use rolloutEngine instead.",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "Use tensorParallel instead.",
    "data.max_prompt_length": "Use promptLength instead.",
    "data.max_response_length": "Use responseLength instead.",
    "data.train_files": "Use data.train or data.prepared instead.",
    "data.val_files": "Use data.validation or data.prepared instead.",
    "trainer.checkpoint_callback_class": "it marks checkpoints as complete. Leave it out.",
    "trainer.default_local_dir": "the job looks for its checkpoints in its own folder. Leave it out.",
    "trainer.logger": "progress lines are made from the file logger. Use tracking instead.",
    "trainer.n_gpus_per_node": "Use resources.gpusPerNode instead.",
    "trainer.nnodes": "Use resources.nodes instead.",
    "trainer.resume_from_path": "the job finds its newest checkpoint itself. Leave it out.",
    "trainer.resume_mode": "the job finds its newest checkpoint itself. Leave it out.",
    "trainer.val_before_train": "Use validateBeforeTrain instead.",
}
"""Keys and sections that the job sets and reckons with -> what to do"""
_ENGINES = ("fsdp", "fsdp2")
_LORA = (
    "actor_rollout_ref.model.lora",
    "actor_rollout_ref.model.target_",
    "actor_rollout_ref.model.exclude_modules",
    "critic.model.lora",
)


@lru_cache(maxsize=1)
def verl_keys() -> frozenset[str]:
    """Return the keys of the pinned verl's configuration."""
    return frozenset(KEYS.read_text(encoding="utf-8").split())


def override_problem(text: str, *, cpu: bool = False) -> Found:
    """Return what is wrong with one of `engineOverrides`; None if nothing is. `cpu`: the job has no GPUs, so ranks may be set by hand."""
    name, equals, value = text.partition("=")
    key = name.lstrip("+~")
    if name.startswith("~"):
        return f"{key} would be removed, and whoever reads it in verl would fail. Give it another value instead."
    if not equals:
        return f"{key} has no value. Write {key}=VALUE."
    for place, why in _OWN.items():
        by_hand = cpu and place in ("trainer.n_gpus_per_node", "actor_rollout_ref.actor.checkpoint")
        if (key == place or key.startswith(f"{place}.")) and not by_hand:
            return f"{key} is the job's own. {why[0].upper()}{why[1:]}"
    if key.endswith(".strategy") and value not in _ENGINES:
        return f"{value} is not installed with this project. Choose {' or '.join(_ENGINES)}."
    if key in _STEPS:
        return f"{key} changes the number of steps, which the job counts itself. Use {_STEPS[key]} instead."
    if key.startswith(_LORA):
        return (
            f"{key} sets LoRA past the job, which would export the untrained model. Use hyperparameters.lora instead."
        )
    if key in WITHOUT_READER:
        return f"{key} has no effect: nobody in verl reads it. {WITHOUT_READER[key]}"
    for place, why in _IGNORED.items():
        if key == place or key.startswith(f"{place}."):
            return f"{key} has no effect: {why}"
    section = key.partition(".")[0]
    known = verl_keys()
    if key in known or (name.startswith("+") and section in known):
        return None
    near = difflib.get_close_matches(key, known, 1, 0.8)
    hint = f" Did you mean {near[0]}?" if near else " To add a key on purpose, write + before it."
    return f"verl has no key {key}.{hint}"


# ---- all of them ----
def check(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield the field (below spec) and a sentence for everything that cannot work or has no effect."""
    yield from _every(job)
    if isinstance(job, ResolvedTrainJob):
        yield from _run(TRAIN, job)
    if isinstance(job, SftJob):
        yield from _run(SFT, job)
    if isinstance(job, RlJob):
        yield from _run(RL, job)
        seen: set[str] = set()
        for index, text in enumerate(job.spec.hyperparameters.engine_overrides):
            key = text.partition("=")[0].lstrip("+~")
            problem = override_problem(text, cpu=not _gpus(job))
            if problem is None and key in seen:
                problem = f"{key} is given twice. Leave one of them out."
            seen.add(key)
            if problem is not None:
                yield f"hyperparameters.engineOverrides.{index}", problem


_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_PLACE = re.compile(
    r"s3://[^/?#@]+(/[^?#]*)?|hf://(datasets/)?[^/]+/[^/]+.*|pvc://[^/]+(/.*)?|file://(localhost)?/.*|tiny://.*"
)


def _every(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with names and places, whatever the kind of the job."""
    spec = job.spec
    if (
        isinstance(spec.model, ModelRef)
        and spec.model.train_job == job.metadata.name
        and isinstance(job, ResolvedTrainJob)
    ):
        yield "model.trainJob", f"{job.metadata.name}: the job would wait for itself. Name another job, or a source."
    for field, name in (("queue", spec.queue), ("priorityClassName", spec.priority_class_name)):
        if name is not None and not _OBJECT.fullmatch(name):
            yield field, f"{name!r} is no name of a Kubernetes object: lower case letters, digits, - and . only."
    places: list[tuple[str, str | None]] = [("output", spec.output)]
    if isinstance(spec.model, ModelRef):
        places.append(("model.source", spec.model.source))
    if isinstance(job, ResolvedTrainJob):
        data = job.spec.data
        lists = {"train": data.train, "images": data.images, "validation": data.validation}
        lists |= {f"validationSets.{name}": files for name, files in data.validation_sets.items()}
        places += [(f"data.{field}.{i}", place) for field, many in lists.items() for i, place in enumerate(many)]
        places += [("data.prepared", data.prepared), ("reward.file", job.spec.reward.file)]
    else:
        of = job.spec.data
        places += [
            (f"data.{name}.{i}", place)
            for name, many in (("files", of.files), ("images", of.images))
            for i, place in enumerate(many)
        ]
        places += [("data.root", of.root), ("scoringFile", job.spec.scoring_file)]
    for field, place in places:
        if place is not None and "://" in place and not _PLACE.fullmatch(place):
            yield field, f"{place} is no place that can be read. {_PLACES}"
    if spec.output is not None and spec.output.startswith(("hf://", "tiny://")):
        yield (
            "output",
            f"{spec.output}: nothing can be written there. Write s3://bucket/path, file:///path or pvc://claim/path.",
        )


_PLACES = "Write a path, s3://bucket/path, pvc://claim/path, hf://owner/name or file:///path."


def _run(checks: tuple[Check[J], ...], job: J) -> Iterator[tuple[str, str]]:
    for each in checks:
        if (value := each.wrong(job)) is not None:
            yield each.field, f"{value}: {each.reason}. {each.remedy}"


def without_effect(spec: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what has no effect although the user wrote it: hyperparameters (`given`) of the other method, and values that others rule out.

    `spec` is the whole spec with its method, as it was written.
    """
    method = spec["method"]
    other = "rl" if method == "sft" else "sft"
    for name, value in given.items():
        if name in method_fields(method):
            if value is None:
                yield f"hyperparameters.{name}", "null has no effect: Kubernetes drops it. Leave the field out."
        elif value not in (None, []):
            yield (
                f"hyperparameters.{name}",
                f"has no effect for method {method}; it belongs to {other}. Leave it out.",
            )
    # a resolved job that was written out names all that it must have: no one has asked for one of them
    if not required_fields(method) <= given.keys():
        yield from _ruled_out(method, spec.get("data"), given)


def _ruled_out(method: str, data: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields that another value of the job, written or absent, deprives of their effect."""
    place = "hyperparameters."
    if method == "rl" and isinstance(data, Mapping) and data.get("prepared") and data.get("prompt"):
        why = "has no effect: data.prepared holds the prompts already. Leave it out, or prepare the rows with it"
        yield "data.prompt", f"{why} (`egm data prepare --prompt`)."
    if given.get("klType") is not None and given.get("klCoefficient") == 0:
        yield place + "klType", "has no effect with klCoefficient 0. Leave it out, or give klCoefficient a value."
    if method == "sft" and given.get("warmupSteps") is not None and given.get("warmupRatio") is not None:
        yield place + "warmupRatio", "has no effect beside warmupSteps, which wins. Leave one of them out."
    steps, warmup = given.get("maxSteps"), given.get("warmupSteps")
    if isinstance(steps, int) and isinstance(warmup, int) and warmup >= steps:
        why = f"{warmup} of maxSteps {steps}: the training ends before the learning rate has reached its peak"
        yield place + "warmupSteps", f"{why}. Lower warmupSteps or raise maxSteps."
    validated = isinstance(data, Mapping) and (data.get("validation") or data.get("validationSets"))
    if method == "sft" and not validated:
        for name in ("validateEvery", "validateBeforeTrain"):
            if given.get(name) is not None:
                yield place + name, "has no effect without data.validation or data.validationSets. Leave it out."


def misspelt(
    model: type[BaseModel], node: Any, submodel: Callable[[Any], type[BaseModel] | None]
) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Yield path and sentence of every key that has the spelling of Python (`batch_size`), which a cluster refuses."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            for path, text in misspelt(model, each, submodel):
                yield (index, *path), text
    if not isinstance(node, dict):
        return
    for name, field in model.model_fields.items():
        alias = field.alias if field.alias is not None else name
        if alias != name and name in node:
            yield (name,), f"there is no such field; did you mean {alias}?"
        inner = submodel(field.annotation)
        if inner is not None and alias in node:
            for path, text in misspelt(inner, node[alias], submodel):
                yield (alias, *path), text


def model_fields(job: ResolvedJob) -> list[tuple[str, ModelRef]]:
    """Return the models of a job, each with its field below spec."""
    swept = isinstance(job, GroundingEvalJob) and bool(job.spec.several_models)
    return [(f"sweep.models.{n}" if swept else "model", model) for n, model in enumerate(job.spec.models)]


_PLACEHOLDERS = ("your-bucket", "my-bucket", "example-bucket")


def placeholders(job: ResolvedJob) -> Iterator[tuple[str, str]]:
    """Yield the fields that hold the name of an example, and a sentence: such a job is well written and must not be started."""
    places = [("output", job.spec.output), *((f"{place}.source", model.source) for place, model in model_fields(job))]
    for field, value in places:
        if value is not None and any(f"//{word}" in value for word in _PLACEHOLDERS):
            yield (
                field,
                f"{value} is a placeholder. Put the name of your own bucket in its place before you start the job.",
            )
