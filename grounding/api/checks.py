"""Check a resolved train job for values that cannot work or have no effect. Pure.

The models check each field separately; these checks look at all fields of the job together. `manifest.read` runs them for every entry
point. Each entry of the table names the field, the reason and the remedy, and has a function that finds the wrong value in a job.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from grounding.api.base import ROW_SUFFIXES, is_place
from grounding.api.families import FAMILIES
from grounding.api.hyperparameters import TEXT_LAYERS, VISION_LAYERS, ClipRange
from grounding.api.places import QUEUE_OF_LABEL, names
from grounding.api.resolved import ResolvedJob, ResolvedTrainJob, RlJob, SftJob
from grounding.api.validation import FIGURES, best_figure
from grounding.api.verl_keys import override_problem

J = TypeVar("J", bound=ResolvedTrainJob)
Found = str | None
"""The wrong value in readable form; None if there is none"""


class Beyond(StrEnum):
    """Why the API server cannot make a check itself. The value is a sentence for users."""

    FILLED_IN = "It is about values that presets and defaults fill in; the API server does not know them."
    COST = "It compares many files or names, and the API server refuses rules of that cost."
    DROPPED = "The API server drops the value before anyone sees it, the operator included."
    METADATA = "It reads the job's labels; the API server shows rules only the job's name."
    QUANTITIES = "It compares quantities, for which the API server of Kubernetes 1.28 has no function."
    TABLES = "It needs tables of other software: verl's settings, Kubernetes' pod template, families of models."


@dataclass(frozen=True)
class Check(Generic[J]):
    """A check. `field` is a path below `spec`, `wrong` returns the wrong value, and `reason` and `remedy` are sentences for users.

    `server` is the same check in CEL over the spec, as in `Rule.cel`, or the reason why there is none. In the latter case the operator
    makes the check.
    """

    id: str
    field: str
    wrong: Callable[[J], Found]
    reason: str
    remedy: str
    server: str | Beyond = Beyond.FILLED_IN


def _gpus(job: ResolvedTrainJob) -> int:
    return job.spec.resources.nodes * job.spec.resources.gpus_per_node


# ---- both methods ----
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


def _set_places(job: ResolvedTrainJob) -> Found:
    sets = job.spec.data.validation_sets
    return next((file for files in sets.values() for file in files if not is_place(file)), None)


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
    """Return a quantity of memory that is so small that its unit must be missing or wrong; otherwise None."""
    return quantity if quantity is not None and _bytes(quantity) < _LEAST_MEMORY else None


_LEAST_MEMORY = 2**26
"""Limit in bytes. No training works with less, so the unit must be missing."""


def _wandb(job: ResolvedTrainJob) -> Found:
    wandb = job.spec.tracking.wandb
    url = wandb.base_url if wandb is not None else None
    return url if url is not None and not url.startswith(("http://", "https://")) else None


def _bytes(quantity: str) -> float:
    """Return the number of bytes of a quantity of memory."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity)
    assert match is not None
    return float(match[1]) * _UNITS[match[2]]


_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3} | {
    unit: scale
    for n, letter in enumerate("KMGTP", 1)
    for unit, scale in ((letter, 1e3**n), (f"{letter}i", 2.0 ** (10 * n)))
}


def _shared(job: ResolvedTrainJob) -> Found:
    memory, shared = job.spec.resources.memory, job.spec.resources.shared_memory
    if memory is None or shared is None or _bytes(shared) <= _bytes(memory):
        return None
    return f"{shared} of memory {memory}"


def _gpu_resource(job: ResolvedTrainJob) -> Found:
    return job.spec.resources.gpu_resource if not job.spec.resources.gpus_per_node else None


def _prepare_template(job: ResolvedTrainJob) -> Found:
    templates, output = job.spec.pod_templates, job.spec.output
    if templates is None or templates.prepare is None or output is None or output.startswith("pvc://"):
        return None
    return f"beside output {output}"


def _start_deadline(job: ResolvedTrainJob) -> Found:
    start, whole = job.spec.start_deadline_seconds, job.spec.active_deadline_seconds
    return f"{start} with activeDeadlineSeconds {whole}" if start and whole and start >= whole else None


def _has(path: str) -> str:
    """Return a CEL expression for "the spec has this field", which may be nested."""
    parts = path.split(".")
    return "(" + " && ".join(f"has(self.{'.'.join(parts[: n + 1])})" for n in range(len(parts))) + ")"


_UNIT = "Write the unit: 64Gi."
TRAIN: tuple[Check[ResolvedTrainJob], ...] = (
    Check(
        "train-file-twice",
        "data.train",
        _named_twice,
        "the file is listed twice",
        "List it once; data.weights sets how often its rows are used.",
        Beyond.COST,
    ),
    Check(
        "rows-form",
        "data.train",
        _rows_form,
        "rows can only be read from files of the types " + ", ".join(ROW_SUFFIXES),
        "Convert the file (`egm data import` reads the public formats).",
        Beyond.COST,
    ),
    Check(
        "validated-on-training-file",
        "data.validation",
        _trained_on,
        "the file is also used for training, so its results say nothing about the model",
        "Use other files, or split this one.",
        Beyond.COST,
    ),
    Check(
        "images-beside-shapes",
        "data.images",
        _shape_fields,
        "data.shapes creates its own pictures, so this has no effect",
        "Leave it out.",
        f"!{_has('data.shapes')} || !{_has('data.images')} || size(self.data.images) == 0 "
        f"|| ({_has('data.validationSets')} && size(self.data.validationSets) > 0)",
    ),
    *(
        Check[ResolvedTrainJob](
            f"small-{name}",
            f"resources.{name}",
            wrong,
            "a training needs more; a quantity without a unit counts bytes",
            _UNIT,
            Beyond.QUANTITIES,
        )
        for name, wrong in (
            ("memory", lambda job: _small(job.spec.resources.memory)),
            ("sharedMemory", lambda job: _small(job.spec.resources.shared_memory)),
        )
    ),
    Check(
        "shared-memory-beyond-memory",
        "resources.sharedMemory",
        _shared,
        "the pod's shared memory is a part of its memory",
        "Lower it, or raise resources.memory.",
        Beyond.QUANTITIES,
    ),
    Check(
        "gpu-resource-without-gpus",
        "resources.gpuResource",
        _gpu_resource,
        "without GPUs it has no effect",
        "Leave it out, or give the job GPUs.",
    ),
    Check(
        "prepare-template-without-effect",
        "podTemplates.prepare",
        _prepare_template,
        "with an output that is not a claim, each pod prepares its own data, so it has no effect",
        "Use podTemplates.train, or write to a claim (pvc://).",
        f"!{_has('podTemplates.prepare')} || !has(self.output) || self.output.startsWith('pvc://')",
    ),
    Check(
        "start-deadline-beyond-the-end",
        "startDeadlineSeconds",
        _start_deadline,
        "the whole job has ended by then, so it has no effect",
        "Lower it, or raise activeDeadlineSeconds.",
        "!has(self.startDeadlineSeconds) || !has(self.activeDeadlineSeconds) "
        "|| self.startDeadlineSeconds < self.activeDeadlineSeconds",
    ),
    Check(
        "wandb-address",
        "tracking.wandb.baseUrl",
        _wandb,
        "this is not the address of a server",
        "Start it with https:// or http://.",
        f"!{_has('tracking.wandb.baseUrl')} || self.tracking.wandb.baseUrl.matches('^https?://')",
    ),
    Check(
        "keep-best-figure",
        "hyperparameters.keepBest",
        _best,
        "no validation of this job has such a metric",
        "Use the name of one of data.validationSets, "
        + "; ".join(f"{method}: {', '.join(names)}" for method, names in FIGURES.items())
        + ", or one of these followed by / and the name of a set.",
    ),
    Check(
        "keep-best-saved",
        "hyperparameters.saveEvery",
        _best_saved,
        "keepBest needs a checkpoint of every step that is validated",
        "Choose a divisor of validateEvery.",
    ),
    Check(
        "validation-set-names",
        "data.validationSets",
        _sets,
        "each set has a name of letters, digits, - and _, and files that belong to no other set",
        "Change the name, name a file, or leave the set out.",
        Beyond.COST,
    ),
    Check(
        "validation-set-places",
        "data.validationSets",
        _set_places,
        "this cannot be read",
        "Write a path, s3://bucket/path, pvc://claim/path, hf://owner/name or file:///path.",
        Beyond.COST,
    ),
    Check(
        "lora-targets",
        "hyperparameters.lora.targets",
        _lora_targets,
        "the model has no such linear layer, or it is one of the vision tower, which is frozen",
        f"Choose among {', '.join(TEXT_LAYERS)}, or set freezeVision to false for those of the vision tower.",
        Beyond.TABLES,
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
    "model-missing",
    "model",
    _no_model,
    "a training needs a model to start from",
    "Set source, or set trainJob for the model that another job exports.",
)
_TINY = "no tiny model of that kind is in this family"
_KINDS = f"Known kinds: {', '.join(f'tiny://{kind}' for family in FAMILIES.values() for kind in family.tiny)}."


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
        "sft-length",
        "hyperparameters.maxLength",
        _sft_length,
        "one picture of that size already takes this many tokens",
        "Raise maxLength or lower maxPixels.",
    ),
    _MODEL,
    Check(
        "tiny-kind",
        "model.source",
        _tiny_kind,
        _TINY,
        _KINDS,
        Beyond.TABLES,
    ),
    Check(
        "sft-batch",
        "hyperparameters.batchSize",
        _sft_batch,
        "the batch must be a multiple of the number of GPUs, times microBatchSize if it is given",
        "Change batchSize, microBatchSize or resources.",
    ),
    Check(
        "sft-pixels",
        "hyperparameters.minPixels",
        _sft_pixels,
        "the smallest picture would be larger than the largest",
        "Lower minPixels or raise maxPixels.",
    ),
    Check(
        "sft-tiles",
        "hyperparameters",
        _sft_tiles,
        "InternVL cuts pictures into tiles of one size, so minPixels and maxPixels have no effect",
        "Leave both out, or choose the tiles in the model's preprocessor_config.json (max_patches).",
        Beyond.TABLES,
    ),
    Check(
        "sft-images",
        "data.images",
        _sft_images,
        "rows of JSON files contain only the names of pictures",
        "List the folders or tar files that hold the pictures.",
        Beyond.COST,
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
"""The policy losses of verl that use the clip range"""


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


def _rl_sequence(job: RlJob) -> Found:
    gpus = _gpus(job)
    for text in job.spec.hyperparameters.engine_overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == _SEQUENCE and value.isdecimal() and int(value) and gpus % int(value):
            return f"{value} of {gpus} GPUs"
    return None


_SEQUENCE = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"


def _rl_filter(job: RlJob) -> Found:
    given = dict(text.lstrip("+").partition("=")[::2] for text in job.spec.hyperparameters.engine_overrides)
    asked = given.get("algorithm.filter_groups.enable", "").lower() == "true"
    return "enabled without a metric" if asked and not given.get("algorithm.filter_groups.metric") else None


_ALPHA = ("mix", "penalty")
"""The rewards that are a weighted sum of IoU and of whether it passes the threshold"""


def _rl_alpha(job: RlJob) -> Found:
    reward = job.spec.reward
    return f"{reward.alpha:g} with type {reward.type}" if reward.alpha != 0.5 and reward.type not in _ALPHA else None


RL: tuple[Check[RlJob], ...] = (
    Check(
        "rl-gradient-norm",
        "hyperparameters.maxGradNorm",
        lambda job: "0" if not job.spec.hyperparameters.max_grad_norm else None,
        "every gradient would be clipped to nothing",
        "Give a norm above 0; a large one clips nothing.",
        f"!{_has('hyperparameters.maxGradNorm')} || self.hyperparameters.maxGradNorm > 0.0",
    ),
    Check(
        "rl-sequence-parallel",
        "hyperparameters.engineOverrides",
        _rl_sequence,
        "the parts of a sequence are shared equally among the GPUs",
        f"Choose a divisor for {_SEQUENCE}.",
        Beyond.TABLES,
    ),
    Check(
        "rl-filter-metric",
        "hyperparameters.engineOverrides",
        _rl_filter,
        "algorithm.filter_groups needs a metric to filter groups by",
        "Add algorithm.filter_groups.metric=score, for example.",
        Beyond.TABLES,
    ),
    Check(
        "rl-alpha",
        "reward.alpha",
        _rl_alpha,
        "this reward is not a weighted sum of passing and IoU, so alpha has no effect",
        f"Leave it out, or choose the type {' or '.join(_ALPHA)}.",
        "!has(self.reward) || self.reward.alpha == 0.5 || self.reward.type in ['mix', 'penalty']",
    ),
    Check(
        "rl-shapes-reasoning",
        "data.shapes.reasoning",
        lambda job: "true" if job.spec.data.shapes is not None and job.spec.data.shapes.reasoning else None,
        "rows of RL hold no answers, so it has no effect",
        "Leave it out.",
        f"!{_has('data.shapes')} || !self.data.shapes.reasoning",
    ),
    _MODEL,
    Check(
        "tiny-kind",
        "model.source",
        _tiny_kind,
        _TINY,
        _KINDS,
        Beyond.TABLES,
    ),
    Check(
        "rl-sglang-without-gpus",
        "hyperparameters.rolloutEngine",
        lambda job: "sglang" if job.spec.hyperparameters.rollout_engine == "sglang" and not _gpus(job) else None,
        "without GPUs, transformers generates the answers",
        "Leave it out, or give the job GPUs.",
    ),
    Check(
        "rl-lora-dropout",
        "hyperparameters.lora.dropout",
        _rl_dropout,
        "verl's adapters have no dropout, so it has no effect for method rl",
        "Leave it out.",
        f"!{_has('hyperparameters.lora.dropout')} || self.hyperparameters.lora.dropout == 0.0",
    ),
    Check(
        "rl-tokens",
        "hyperparameters.responseLength",
        _rl_tokens,
        "a prompt and its answer must fit into tokensPerGpu: verl fails at the first answer that does not",
        "Raise tokensPerGpu, or lower promptLength or responseLength.",
    ),
    Check(
        "rl-tensor-parallel",
        "hyperparameters.tensorParallel",
        _rl_parallel,
        "a rollout engine must have the same number of GPUs as the others of its node",
        "Choose a divisor of resources.gpusPerNode.",
    ),
    Check(
        "rl-schedule",
        "hyperparameters.schedule",
        lambda job: "linear" if job.spec.hyperparameters.schedule == "linear" else None,
        "verl has no linear schedule",
        "Choose cosine or constant.",
        f"!{_has('hyperparameters.schedule')} || self.hyperparameters.schedule != 'linear'",
    ),
    Check(
        "rl-clip-range",
        "hyperparameters.clipRange",
        _rl_clip,
        "this loss does not clip by a range, so it has no effect",
        f"Leave it out, or choose one of the losses {', '.join(_CLIPPED)}.",
    ),
    Check(
        "rl-mini-batch",
        "hyperparameters.miniBatchSize",
        _rl_mini,
        "a batch is split into mini batches of equal size",
        "Choose a divisor of batchSize, or leave it out: it follows batchSize.",
    ),
    Check(
        "rl-batch-on-gpus",
        "resources.gpusPerNode",
        _rl_batch,
        "the answers of a batch and of a mini batch are shared equally among the GPUs",
        "Change resources, batchSize, miniBatchSize or rollouts.",
    ),
)


# ---- all methods ----
def beyond_the_server() -> dict[str, Beyond]:
    """Return the rules that the API server cannot check, by id. The operator checks them and reports problems in the job's conditions."""
    found = {check.id: check.server for checks in (TRAIN, SFT, RL) for check in checks}
    return _OTHERS | {name: server for name, server in found.items() if isinstance(server, Beyond)}


def table() -> str:
    """Return the Markdown table of these rules."""
    found = beyond_the_server()
    lines = ["| the API server cannot judge them, because | rules |", "|---|---|"]
    for why in Beyond:
        names = ", ".join(f"`{name}`" for name, reason in sorted(found.items()) if reason is why)
        lines.append(f"| {why[0].lower()}{why[1:].rstrip('.')} | {names} |")
    return "\n".join([*lines, ""])


POD_TEMPLATE, OVERRIDES, WITHOUT_EFFECT, RESOLVED, NULL = (
    "pod-template",
    "engine-overrides",
    "hyperparameter-without-effect",
    "hyperparameter-limits",
    "null-hyperparameter",
)
_OTHERS = {
    POD_TEMPLATE: Beyond.TABLES,
    OVERRIDES: Beyond.TABLES,
    WITHOUT_EFFECT: Beyond.FILLED_IN,
    RESOLVED: Beyond.FILLED_IN,
    NULL: Beyond.DROPPED,
    QUEUE_OF_LABEL: Beyond.METADATA,
}


def check(job: ResolvedJob) -> Iterator[tuple[str, str, str]]:
    """Yield the field (below spec), a message and the rule's id for each value that cannot work or has no effect."""
    yield from names(job)
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
                yield f"hyperparameters.engineOverrides.{index}", problem, OVERRIDES


def _run(checks: tuple[Check[J], ...], job: J) -> Iterator[tuple[str, str, str]]:
    for each in checks:
        if (value := each.wrong(job)) is not None:
            id_ = each.id if isinstance(each.server, Beyond) else ""
            yield each.field, f"{value}: {each.reason}. {each.remedy}", id_
