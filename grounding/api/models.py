"""The two kinds, GroundingTrainJob and GroundingEvalJob, as pydantic models: the one source of validation and of `egm explain`.

YAML names are camelCase, Python names snake_case. A field that a preset may fill is optional here; `resolved.resolve` fills it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from grounding.api import families
from grounding.api.base import Fraction, Labels, Model, Name, Place, Places, Quantity, Rule, Seconds, Text
from grounding.api.hyperparameters import Hyperparameters
from grounding.api.status import EvalStatus, TrainStatus
from grounding.boxes import Space

GROUP_VERSION = "grounding.egm.dev/v1alpha1"


class Metadata(Model):
    """Standard object metadata."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)
    name: Name = Field(description="Name of the job: lower case letters, digits and dashes.")
    namespace: str | None = Field(None, description="Namespace on a cluster.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels, as on any Kubernetes object.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations, as on any Kubernetes object.")


PROMPTS = ("qwen3", "qwen3_amodal", "grounding", "amodal")
"""Prompt templates by name, as `grounding/prompts.py` has them"""
TINY = families.tiny_sources()
"""Models that are built on the spot (`grounding/models/tiny.py`)"""


class ModelRef(Model):
    """Which model to start from, or to measure: exactly one of source and trainJob."""

    source: Place | None = Field(
        None,
        description="A folder, hf://owner/name, s3://bucket/path or pvc://claim/path. "
        "tiny:// is a tiny random model of the family, built on the spot, for demos and tests; tiny://small is one of a quarter of its "
        "weights, tiny://KIND (qwen3-vl-moe, internvl3.5 …) one of another kind.",
    )
    train_job: Name | None = Field(
        None, description="Name of a GroundingTrainJob; this job waits for it and takes the model it leaves."
    )
    family: families.FamilyName | None = Field(
        None,
        description="Model family; absent: the preset's, else that of tiny://KIND, else qwen3-vl. Training refuses a model of another one.",
    )

    rules = (
        Rule(
            lambda m: m.source is None or m.train_job is None,
            "!(has(self.source) && has(self.trainJob))",
            "exactly one of source and trainJob is wanted, found both",
        ),
        Rule(
            lambda m: not (m.source or "").startswith("tiny://") or m.source in TINY,
            f"!has(self.source) || !self.source.startsWith('tiny://') || self.source in {list(TINY)}",
            f"there is no such tiny model; there are {', '.join(TINY)}",
            "source",
        ),
    )

    @property
    def name(self) -> str:
        """Return the model's name in requests and rows; empty if the model is not given."""
        return self.train_job or self.source or ""

    @property
    def family_name(self) -> families.FamilyName:
        """Return the family, the default filled in."""
        if self.family is not None:
            return self.family
        tiny = families.of_tiny(self.tiny_kind or "")
        return families.DEFAULT if tiny is None else tiny.name

    @property
    def tiny_kind(self) -> str | None:
        """Return the kind of tiny model that is to be built, which is the family's first one if the source names none; None for any other model."""
        return families.tiny_kind(self.source or "", self.family or families.DEFAULT)

    @property
    def family_facts(self) -> families.Family:
        """Return what the pipeline must know of the family."""
        return families.FAMILIES[self.family_name]


class Shapes(Model):
    """A synthetic set of pictures of coloured shapes with exact boxes, in the layout of the real data."""

    seed: int = Field(7, ge=-(2**31), le=2**31 - 1, description="Seed of the set; the same seed gives the same bytes.")
    train: int = Field(6000, ge=1, le=10_000_000, description="Number of training expressions.")
    per_file: int = Field(
        40, ge=1, le=1_000_000, description="Number of expressions in each of the eight evaluation files."
    )
    size: int = Field(224, ge=64, le=1024, multiple_of=32, description="Width and height of a picture, pixels.")
    reasoning: bool = Field(
        False, description="Training answers think first: a sentence, </think>, then the box. SFT's only."
    )


class TrainData(Model):
    """Training data: files with images, parquet prepared before, or the synthetic set."""

    train: Places = Field(
        default_factory=list,
        description="Training files: SFT rows for sft, conversations with <ref> and <box> for rl (JSON).",
    )
    weights: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(max_length=256)] = Field(
        default_factory=list,
        description="How often each row of a file of train is taken in an epoch, one number a file: 2 twice, 0.25 every fourth row, "
        "drawn by the job's seed. Absent: once.",
    )
    validation: Places = Field(
        default_factory=list,
        description="Files that validate the training. RL: evaluation files (jsonl), of which a tenth is taken; SFT: rows as in train.",
    )
    validation_sets: Annotated[dict[str, Places], Field(max_length=64)] = Field(
        default_factory=dict,
        description="The same as sets with a name, each with figures of its own: {val: [a.jsonl], testA: [b.jsonl]}.",
    )
    images: Places = Field(
        default_factory=list,
        description="Image sources, first match wins: folders, tar files, or split tars (x.tar.part_*).",
    )
    prepared: Place | None = Field(None, description="Folder with train.parquet and val.parquet prepared before.")
    truth: Space | None = Field(
        None,
        description="How the boxes of train are written: pixels (xyxy, xywh, cxcywh, yxyx), 0..1000 (relative) or 0..1 (fraction). "
        "Absent: relative, and a file that looks otherwise is refused.",
    )
    validation_truth: Space | None = Field(
        None, description="The same for validation. Absent: xyxy, and a file that looks otherwise is refused."
    )
    skip_broken: int = Field(
        0, ge=0, le=2**31 - 1, description="Rows that cannot be used and may be left out; more are an error."
    )
    prompt: Literal["qwen3", "qwen3_amodal", "grounding", "amodal"] = Field(
        "qwen3", description="Prompt template of RL rows."
    )
    shapes: Shapes | None = Field(None, description="Make and use the synthetic set instead of files.")


class Reward(Model):
    """Reward of RL, computed by the scoring profile egm-reward."""

    type: Literal["mix", "sigmoid", "normalized_exp", "penalty", "eval"] = Field(
        "mix",
        description="mix: alpha * pass + (1 - alpha) * IoU. sigmoid, normalized_exp: of the IoU. "
        "penalty: mix less a price for length and repetition. eval: pass alone.",
    )
    alpha: Fraction = Field(0.5, description="Weight of passing against IoU.")
    threshold: Fraction = Field(0.5, description="IoU at which an answer passes.")
    file: Place | None = Field(
        None,
        description="A Python file with a reward of your own, in place of type and alpha: a path that the pods see, "
        "pvc://claim/path, s3://bucket/path or hf://owner/name/path.",
    )
    entry_point: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=63)] = Field(
        "compute_score",
        description="Its function: (data_source, solution_str, ground_truth, extra_info), returns a number, or a mapping with score.",
    )

    rules = (
        Rule(
            lambda r: r.file is not None or r.entry_point == "compute_score",
            "has(self.file) || self.entryPoint == 'compute_score'",
            "entryPoint names a function of file, which is absent",
            "entryPoint",
        ),
        Rule(
            lambda r: r.file is None or (r.type == "mix" and r.alpha == 0.5),
            "!has(self.file) || (self.type == 'mix' && self.alpha == 0.5)",
            "type and alpha have no effect beside file; leave them out",
            "file",
        ),
    )


class Toleration(Model):
    """A Kubernetes toleration."""

    key: Text | None = Field(None, description="Taint key; absent matches all.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: Text | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Absent matches all."
    )
    toleration_seconds: Seconds | None = Field(None, description="How long NoExecute is tolerated, seconds.")


GpuResource = Annotated[
    str,
    StringConstraints(
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=253
    ),
]


class Resources(Model):
    """What a training job runs on."""

    nodes: int = Field(1, ge=1, le=1024, description="Number of pods, one a node.")
    gpus_per_node: int = Field(
        8,
        ge=0,
        le=16,
        description="GPUs of each pod. 0 trains on the CPU; with more, a machine on which CUDA does not start is an error.",
    )
    gpu_resource: GpuResource | None = Field(
        None, description="Name of the GPUs' resource, as amd.com/gpu. Absent: the operator's setting, nvidia.com/gpu."
    )
    cpu: Quantity | None = Field(None, description="CPU request of a pod. Absent: 3 a GPU.")
    memory: Quantity | None = Field(None, description="Memory request of a pod. Absent: 12 GiB a GPU.")
    shared_memory: Quantity | None = Field(None, description="Size of /dev/shm.")
    node_selector: Labels = Field(default_factory=dict, description="Labels that the nodes must have.")
    tolerations: Annotated[list[Toleration], Field(max_length=64)] = Field(
        default_factory=list, description="Taints that are tolerated."
    )
    topology: Text | None = Field(None, description="Topology label that all pods share, for example a rack.")


class SecretKey(Model):
    """A key of a Secret in the job's namespace."""

    name: Text = Field(description="Name of the Secret.")
    key: Text = Field(description="Key in the Secret.")


class HeaderSecret(Model):
    """A header of requests whose value is in a Secret."""

    header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]+$", max_length=63)] = Field(
        description="Name of the header."
    )
    name: Text = Field(description="Name of the Secret.")
    key: Text = Field(description="Key in the Secret.")


class ConfigMapKey(Model):
    """Where a text is: the name of a ConfigMap and the key in it."""

    name: Text = Field(description="Name of the ConfigMap.")
    key: Text = Field(description="Key in the ConfigMap.")


class Wandb(Model):
    """Weights & Biases."""

    base_url: Place | None = Field(None, description="Server; absent: the public one.")
    project: Text = Field("egm", description="Project that runs go to.")
    api_key_secret: SecretKey | None = Field(None, description="Where the API key is; never written into the job.")


class Mlflow(Model):
    """MLflow. Credentials are the environment's, as MLflow reads them (MLFLOW_TRACKING_TOKEN and others)."""

    tracking_uri: Place = Field(description="Server (http, https), or a store that MLflow knows.")
    experiment: Text = Field("egm", description="Experiment that runs go to; made where it is not there.")


class Tracking(Model):
    """Where metrics go in addition to the progress lines. None of it can stop a run."""

    tensorboard: bool = Field(True, description="Write TensorBoard events.")
    wandb: Wandb | None = Field(
        None, description="Log to Weights & Biases; offline where it cannot be reached or there is no key."
    )
    mlflow: Mlflow | None = Field(None, description="Log to MLflow.")


_CHANGEABLE = {
    "suspend",
    "maxAttempts",
    "activeDeadlineSeconds",
    "ttlSecondsAfterFinished",
    "podTemplate",
    "podTemplates",
}


Template = dict[str, Any]
"""A part of a PodTemplateSpec, checked by `pod_template.problems`."""


class TrainPodTemplates(Model):
    """Pod templates by role, each merged over spec.podTemplate."""

    prepare: Template | None = Field(
        None, description="Of the pod that prepares the data, if one pod does that for all (output: pvc://)."
    )
    train: Template | None = Field(None, description="Of the pods that train.")


class EvalPodTemplates(Model):
    """Pod templates by role, each merged over spec.podTemplate."""

    prepare: Template | None = Field(None, description="Of the pod that prepares the data.")
    server: Template | None = Field(None, description="Of the servers.")
    client: Template | None = Field(None, description="Of the pod that asks the questions.")


class _Lifecycle(Model):
    output: Place | None = Field(
        None,
        description="Where results go: s3://bucket/path (or file:///path), kept up to date by `egm run` and on a cluster alike; "
        "pvc://claim/path on a cluster alone. Local runs have all of it in runs/ as well.",
    )
    suspend: bool = Field(
        False, description="Do not start; when running, stop after a checkpoint and give the nodes back."
    )
    max_attempts: int = Field(3, ge=1, le=1000, description="Starts before the job counts as failed.")
    active_deadline_seconds: Seconds | None = Field(
        None, ge=1, description="Longest time from start to end over all attempts."
    )
    ttl_seconds_after_finished: Seconds | None = Field(
        None, description="Delete the job this long after its end; absent: never."
    )
    queue: Text | None = Field(None, description="Kueue queue that admits the job.")
    priority_class_name: Text | None = Field(None, description="Priority class of the pods.")
    pod_template: Template | None = Field(
        None,
        description="Template of all pods, merged over ours by key; containers by name. A change takes effect with the next attempt.",
    )


_VALIDATION = (
    "((has(self.data.validation) && size(self.data.validation) > 0)"
    " || (has(self.data.validationSets) && size(self.data.validationSets) > 0))"
)
_TRAIN = "(has(self.data.train) && size(self.data.train) > 0)"


class TrainSpec(_Lifecycle):
    """What to train, on what, and how."""

    pod_templates: TrainPodTemplates | None = Field(None, description="Pod templates by role: prepare, train.")

    method: Literal["sft", "rl"] = Field(description="sft: supervised fine-tuning. rl: reinforcement learning by verl.")
    preset: Text | None = Field(
        None,
        description="Named set of values that fills absent fields: egm-2b-sft, egm-2b-rl, egm-4b-sft, egm-4b-rl, egm-8b-sft, "
        "egm-8b-rl, egm-internvl-rl, tiny-sft, tiny-rl.",
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Seed of data order, initialisation and sampling.")
    model: ModelRef = Field(default_factory=ModelRef, description="The model to start from.")  # type: ignore[arg-type]
    data: TrainData = Field(default_factory=TrainData, description="Training and validation data.")  # type: ignore[arg-type]
    reward: Reward = Field(default_factory=Reward, description="What RL maximises.")  # type: ignore[arg-type]
    resources: Resources = Field(default_factory=Resources, description="Nodes, GPUs, memory.")  # type: ignore[arg-type]
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Typed hyperparameters.")  # type: ignore[arg-type]
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics go.")  # type: ignore[arg-type]
    start_deadline_seconds: Seconds | None = Field(None, ge=1, description="Longest wait until all pods run.")
    stall_timeout_seconds: Seconds | None = Field(
        None, ge=60, description="Restart when no step was finished for this long."
    )

    @property
    def models(self) -> list[ModelRef]:
        """Return the model to start from, as a list of one."""
        return [self.model]

    changeable = frozenset(_CHANGEABLE | {"startDeadlineSeconds", "stallTimeoutSeconds"})
    rules = (
        Rule(
            lambda s: s.method == "rl" or s.reward == Reward(),  # type: ignore[call-arg]
            "{method} == 'rl' || !has(self.reward) "
            "|| (self.reward.type == 'mix' && self.reward.alpha == 0.5 && self.reward.threshold == 0.5 && !has(self.reward.file))",
            "reward belongs to method rl; sft has none",
            "reward",
        ),
        Rule(
            lambda s: not (s.data.shapes and (s.data.train or s.data.prepared)),
            f"!(has(self.data) && has(self.data.shapes) && ({_TRAIN} || has(self.data.prepared)))",
            "data.shapes excludes data.train and data.prepared",
            "data",
        ),
        Rule(
            lambda s: bool(s.data.shapes or s.data.train or s.data.prepared),
            f"has(self.data) && (has(self.data.shapes) || {_TRAIN} || has(self.data.prepared))",
            "data needs one of train, prepared and shapes",
            "data",
        ),
        Rule(
            lambda s: not (s.method == "rl" and s.data.train and not (s.data.validation or s.data.validation_sets)),
            f"!({{method}} == 'rl' && has(self.data) && {_TRAIN} && !{_VALIDATION})",
            "data.validation is wanted beside data.train for method rl, or data.validationSets",
            "data",
        ),
        Rule(
            lambda s: s.data.truth in (None, "relative") or bool(s.method == "rl" and s.data.train),
            "!(has(self.data) && has(self.data.truth) && self.data.truth != 'relative') "
            f"|| ({{method}} == 'rl' && {_TRAIN})",
            "data.truth converts data.train of method rl; elsewhere boxes are used as they are written, so it can only be relative",
            "data",
        ),
        Rule(
            lambda s: not (s.data.validation_truth or s.data.skip_broken) or bool(s.method == "rl" and s.data.train),
            "!(has(self.data) && (has(self.data.validationTruth) || (has(self.data.skipBroken) && self.data.skipBroken > 0))) "
            f"|| ({{method}} == 'rl' && {_TRAIN})",
            "data.validationTruth and data.skipBroken are for data.train of method rl, which is prepared here",
            "data",
        ),
        Rule(
            lambda s: not (s.method == "sft" and s.data.prepared),
            "!({method} == 'sft' && has(self.data) && has(self.data.prepared))",
            "data.prepared is for method rl; sft reads data.train",
            "data",
        ),
        Rule(
            lambda s: not (s.method == "rl" and not s.data.train and (s.data.validation or s.data.validation_sets)),
            f"!({{method}} == 'rl' && has(self.data) && !{_TRAIN} && {_VALIDATION})",
            "data.validation and data.validationSets have no effect beside data.prepared and data.shapes, which hold validation rows already",
            "data",
        ),
        Rule(
            lambda s: not s.data.weights or len(s.data.weights) == len(s.data.train),
            "!(has(self.data) && has(self.data.weights) && size(self.data.weights) > 0) "
            "|| (has(self.data.train) && size(self.data.weights) == size(self.data.train))",
            "data.weights has one number for each file of data.train",
            "data",
        ),
        Rule(
            lambda s: not (s.data.validation and s.data.validation_sets),
            "!(has(self.data) && has(self.data.validation) && size(self.data.validation) > 0 "
            "&& has(self.data.validationSets) && size(self.data.validationSets) > 0)",
            "data.validation excludes data.validationSets; give its files a name there",
            "data",
        ),
        Rule(
            lambda s: not (s.method == "sft" and s.data.prompt != "qwen3"),
            "!({method} == 'sft' && has(self.data) && has(self.data.prompt) && self.data.prompt != 'qwen3')",
            "data.prompt has no effect for method sft, whose rows hold their own questions; leave it out",
            "data",
        ),
        Rule(
            lambda s: not (s.data.train and s.data.prepared),
            f"!(has(self.data) && {_TRAIN} && has(self.data.prepared))",
            "data.train has no effect beside data.prepared, which holds the rows already; leave one of them out",
            "data",
        ),
        Rule(
            lambda s: s.preset is not None or s.model.source is not None or s.model.train_job is not None,
            "has(self.preset) || (has(self.model) && (has(self.model.source) || has(self.model.trainJob)))",
            "needs one of source and trainJob (or a preset)",
            "model",
        ),
    )


class EvalData(Model):
    """What to measure on."""

    files: Places = Field(
        default_factory=list,
        description="Evaluation files (jsonl), or their stems; absent: the eight of RefCOCO, RefCOCO+ and RefCOCOg.",
    )
    root: Place | None = Field(None, description="Folder that relative files are under.")
    images: Places = Field(
        default_factory=list, description="Image sources: folders, tar files, or split tars (x.tar.part_*)."
    )
    truth: Space | None = Field(
        None,
        description="How the true boxes are written: pixels (xyxy, xywh, cxcywh, yxyx), 0..1000 (relative) or 0..1 (fraction). "
        "Absent: xyxy, and a file that looks otherwise is refused.",
    )
    skip_broken: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Rows that cannot be used and may be left out, which the summary says; more are an error.",
    )
    shapes: Shapes | None = Field(None, description="Make and use the synthetic set instead of files.")


class Sampling(Model):
    """How answers are drawn; the defaults are the reference's."""

    max_tokens: int = Field(
        4096, ge=1, le=1_000_000, description="Longest answer, tokens; a longer one is cut and counted as truncated."
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus.")
    top_k: int = Field(20, ge=-1, le=2**31 - 1, description="Top-k; without effect at temperature 0.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="OpenAI's presence penalty.")
    repetition_penalty: float = Field(1.0, gt=0, description="1 is off.")
    seed: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Seed of the server's random numbers; without effect at temperature 0."
    )
    samples: int = Field(
        1,
        ge=1,
        le=64,
        description="Answers to each question, from which votes are taken; more than 1 needs a temperature.",
    )
    thinking_budget: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Longest thought, tokens; it is closed there and the answer asked for. 0: no thought. Absent: as the model likes.",
    )
    max_pixels: int | None = Field(
        None, ge=1024, le=2**31 - 1, description="A picture with more pixels is sent smaller. Absent: as it is stored."
    )
    min_pixels: int | None = Field(
        None, ge=1, le=2**26, description="A picture with fewer pixels is sent larger. Absent: as it is stored."
    )

    rules = (
        Rule(
            lambda s: s.samples == 1 or s.temperature > 0,
            "self.samples == 1 || self.temperature > 0.0",
            "samples needs a temperature above 0; at 0 all answers are the same",
            "samples",
        ),
        Rule(
            lambda s: s.min_pixels is None or s.max_pixels is None or s.min_pixels <= s.max_pixels,
            "!has(self.minPixels) || !has(self.maxPixels) || self.minPixels <= self.maxPixels",
            "minPixels must not be more than maxPixels",
            "minPixels",
        ),
    )


Budgets = Annotated[list[Annotated[int, Field(ge=0, le=1_000_000)]], Field(max_length=64)]
Counts = Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(max_length=64)]
Pixels = Annotated[list[Annotated[int, Field(ge=1024, le=2**31 - 1)]], Field(max_length=64)]


class Setting(Model):
    """One setting of a sweep."""

    samples: int = Field(1, ge=1, le=64, description="As sampling.samples.")
    thinking_budget: int | None = Field(None, ge=0, le=1_000_000, description="As sampling.thinkingBudget.")
    max_pixels: int | None = Field(None, ge=1024, le=2**31 - 1, description="As sampling.maxPixels.")


class ServedModel(ModelRef):
    """Which model to measure: exactly one of source and trainJob."""

    trust_remote_code: bool = Field(
        False, description="Let the servers run Python code from the model's folder, with the pod's credentials."
    )


def _folder_names(models: Sequence[ServedModel]) -> list[str]:
    """Return a name for each model that a folder, a role and a label can have, and that no other of them has."""
    found: list[str] = []
    for model in models:
        last = model.name.rstrip("/").rpartition("/")[2].lower()
        plain = re.sub(r"[^a-z0-9.-]+", "-", last)[:40].strip("-.") or "model"
        several = (f"{plain}-{n}" for n in range(2, len(models) + 2))
        found.append(next(name for name in (plain, *several) if name not in found))
    return found


Models = Annotated[list[ServedModel], Field(max_length=16)]


class Sweep(Model):
    """Several models and settings in one job. Each model is served once, and all settings are asked at the same servers.

    The settings are the product of the axes that are given, or those of a list.
    """

    models: Models = Field(
        default_factory=list, description="Models to measure, one after the other. Absent: spec.model."
    )
    settings: Annotated[list[Setting], Field(max_length=256)] = Field(
        default_factory=list, description="Settings one by one, instead of the axes below."
    )
    thinking_budgets: Budgets = Field(
        default_factory=list, description="Values of sampling.thinkingBudget. Absent: that field's own value."
    )
    samples: Counts = Field(
        default_factory=list, description="Values of sampling.samples. Absent: that field's own value."
    )
    max_pixels: Pixels = Field(
        default_factory=list, description="Values of sampling.maxPixels. Absent: that field's own value."
    )

    rules = (
        Rule(
            lambda s: all(m.name for m in s.models),
            "!has(self.models) || self.models.all(m, has(m.source) || has(m.trainJob))",
            "each model needs one of source and trainJob",
            "models",
        ),
        Rule(
            lambda s: len({m.name for m in s.models}) == len(s.models),
            "!has(self.models) || self.models.all(m, self.models.exists_one(n, "
            "(has(m.source) && has(n.source) && m.source == n.source) "
            "|| (has(m.trainJob) && has(n.trainJob) && m.trainJob == n.trainJob)))",
            "a model is there twice",
            "models",
        ),
        Rule(
            lambda s: not (s.settings and (s.thinking_budgets or s.samples or s.max_pixels)),
            "!(has(self.settings) && size(self.settings) > 0 "
            "&& ((has(self.thinkingBudgets) && size(self.thinkingBudgets) > 0) "
            "|| (has(self.samples) && size(self.samples) > 0) || (has(self.maxPixels) && size(self.maxPixels) > 0)))",
            "settings excludes thinkingBudgets, samples and maxPixels",
            "settings",
        ),
    )


_SWEPT = "(has(self.sweep) && has(self.sweep.models) && size(self.sweep.models) > 0)"


class EvalSpec(_Lifecycle):
    """What to measure, and with what servers."""

    pod_templates: EvalPodTemplates | None = Field(None, description="Pod templates by role: prepare, server, client.")

    model: ServedModel = Field(
        default_factory=ServedModel,  # type: ignore[arg-type]
        description="The model to measure. Absent: those of sweep.models.",
    )
    engine: Literal["sglang", "vllm", "transformers", "openai"] = Field(
        "sglang",
        description="Server software; transformers runs on a CPU, openai is a hosted service behind endpoints.",
    )
    servers: int = Field(1, ge=1, le=1000, description="Number of servers that share the work.")
    min_servers: int = Field(
        1,
        ge=1,
        le=1000,
        description="Servers that must be ready before the first question is asked; others join as they come.",
    )
    gpus_per_server: int | None = Field(
        None,
        ge=0,
        le=16,
        description="GPUs of a server, which holds gpusPerServer / (tensorParallel x pipelineParallel) copies of the model. "
        "Absent: 8, or none for engine transformers.",
    )
    gpu_resource: GpuResource | None = Field(
        None, description="Name of the GPUs' resource, as amd.com/gpu. Absent: the operator's setting, nvidia.com/gpu."
    )
    tensor_parallel: int = Field(
        1, ge=1, le=16, description="GPUs that share one copy of the model. 1: each GPU holds a copy (data parallel)."
    )
    pipeline_parallel: int = Field(
        1, ge=1, le=16, description="Groups of GPUs that hold the layers of a copy one after another."
    )
    expert_parallel: bool = Field(
        False,
        description="Share a mixture's experts whole among the GPUs of a copy, instead of a slice of each expert.",
    )
    endpoints: Places = Field(
        default_factory=list, description="URLs of servers that run already; none are started then."
    )
    data: EvalData = Field(default_factory=EvalData, description="Files and images.")  # type: ignore[arg-type]
    api_key_secret: SecretKey | None = Field(
        None, description="Where the key of the endpoints is, sent as a bearer token; never written into the job."
    )
    header_secrets: Annotated[list[HeaderSecret], Field(max_length=16)] = Field(
        default_factory=list, description="Further headers that the endpoints want."
    )
    ca_config_map: ConfigMapKey | None = Field(
        None, description="Certificates (PEM) of the authority that the endpoints' certificates are from."
    )
    prompt: Annotated[str, Field(max_length=4096)] = Field(
        "qwen3",
        description="Prompt template: qwen3, qwen3_amodal, grounding or amodal; or a text of your own with {sent} in the place "
        "of the expression.",
    )
    system_prompt: Annotated[str, Field(max_length=8192)] = Field(
        "", description="A system message before each question."
    )
    scoring: Literal[
        "egm",
        "egm-eval",
        "egm-eval-pixels",
        "egm-eval-resized",
        "answer-after-thinking",
        "answer-after-thinking-pixels",
        "egm-reward",
        "vlmevalkit",
    ] = Field(
        "egm",
        description="Scoring profile; egm is egm-eval. Those in -pixels are for models that answer in pixels, "
        "egm-eval-resized is for Qwen2.5-VL.",
    )
    scoring_file: Place | None = Field(
        None,
        description="Python file with a scoring of your own, instead of a profile: a function that reads the box from an answer. "
        "A path, hf://, s3:// or pvc://.",
    )
    scoring_entry_point: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=63)] = Field(
        "read_box", description="Name of the function in scoringFile."
    )
    box_remap: Literal["scale", "keep", "resized"] | None = Field(
        None,
        description="How answers become pixels: scale (they are 0..1000), keep (they are pixels), resized (Qwen2.5-VL's). "
        "Absent: as the scoring profile does.",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="How answers are drawn.")  # type: ignore[arg-type]
    sweep: Sweep | None = Field(
        None, description="Measure several settings at the same servers, each with results of its own."
    )
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="What an hour of a GPU costs, in US dollars; the summary then says what was spent."
    )
    mode: Literal["throughput", "latency"] = Field(
        "throughput", description="What the run measures besides accuracy; never one number for both."
    )
    concurrency: int = Field(64, ge=1, le=4096, description="Requests in flight over all servers.")
    max_errors: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Up to so many failed requests count as wrong answers, and a note says how many; with more there is no accuracy.",
    )

    @property
    def models(self) -> list[ServedModel]:
        """Return the models to measure, in their order."""
        return [self.model] if self.sweep is None or not self.sweep.models else self.sweep.models

    @property
    def answers_by_setting(self) -> list[int]:
        """Answers to each question, of every setting that is measured of a model."""
        sweep, drawn = self.sweep, self.sampling
        if sweep is None:
            return [drawn.samples]
        if sweep.settings:
            return [s.samples for s in sweep.settings]
        others = max(1, len(set(sweep.thinking_budgets))) * max(1, len(set(sweep.max_pixels)))
        return sorted(set(sweep.samples) if sweep.samples else {drawn.samples}) * others

    @property
    def several_models(self) -> list[str]:
        """Return names for the folders of the models of a sweep over models; empty for a job that names its one model in `model`."""
        return [] if self.sweep is None or not self.sweep.models else _folder_names(self.sweep.models)

    def of_model(self, name: str) -> Self:
        """Return the spec of one model of a sweep over models: it measures all settings of that one."""
        assert self.sweep is not None
        model = self.sweep.models[self.several_models.index(name)]
        return self.model_copy(update={"model": model, "sweep": self.sweep.model_copy(update={"models": []})})

    @property
    def server_gpus(self) -> int:
        """GPUs of each server, the default filled in."""
        if self.engine in ("transformers", "openai"):
            return 0
        return 8 if self.gpus_per_server is None else self.gpus_per_server

    @property
    def copies(self) -> int:
        """Copies of the model behind one server, at least 1 (on a CPU)."""
        return max(1, self.server_gpus // self.gpus_per_copy)

    @property
    def gpus_per_copy(self) -> int:
        """GPUs that one copy of the model is spread over."""
        return self.tensor_parallel * self.pipeline_parallel

    changeable = frozenset(_CHANGEABLE | {"servers"})
    rules = (
        Rule(
            lambda s: not (s.engine == "transformers" and s.gpus_per_server),
            "self.engine != 'transformers' || !has(self.gpusPerServer) || self.gpusPerServer == 0",
            "gpusPerServer must be 0 (or absent) for engine transformers",
            "gpusPerServer",
        ),
        Rule(
            lambda s: s.gpus_per_copy == 1 or (s.server_gpus > 0 and s.server_gpus % s.gpus_per_copy == 0),
            "self.tensorParallel * self.pipelineParallel == 1 || (self.engine in ['sglang', 'vllm'] && "
            "(has(self.gpusPerServer) ? self.gpusPerServer > 0 "
            "&& self.gpusPerServer % (self.tensorParallel * self.pipelineParallel) == 0 "
            ": 8 % (self.tensorParallel * self.pipelineParallel) == 0))",
            "gpusPerServer must be a multiple of tensorParallel (times pipelineParallel); a copy of the model cannot span servers",
            "tensorParallel",
        ),
        Rule(
            lambda s: not (s.api_key_secret or s.header_secrets or s.ca_config_map) or bool(s.endpoints),
            "!(has(self.apiKeySecret) || (has(self.headerSecrets) && size(self.headerSecrets) > 0) || has(self.caConfigMap)) "
            "|| (has(self.endpoints) && size(self.endpoints) > 0)",
            "apiKeySecret, headerSecrets and caConfigMap are for endpoints that run already; servers of the job need none",
            "endpoints",
        ),
        Rule(
            lambda s: all(re.match(r"https?://[^/@]+(/[^@]*)?$", url) for url in s.endpoints),
            "!has(self.endpoints) || self.endpoints.all(url, url.matches('^https?://[^/@]+(/[^@]*)?$'))",
            "endpoints are URLs, http://HOST:PORT or https://HOST/PATH, without user and password: keys belong into apiKeySecret",
            "endpoints",
        ),
        Rule(
            lambda s: s.engine != "openai" or bool(s.endpoints),
            "self.engine != 'openai' || (has(self.endpoints) && size(self.endpoints) > 0)",
            "engine openai is a service that somebody else runs: name its URLs in endpoints",
            "engine",
        ),
        Rule(
            lambda s: s.prompt in PROMPTS or "{sent}" in s.prompt,
            f"self.prompt in {list(PROMPTS)} || self.prompt.contains('{{sent}}')",
            f"prompt must be one of {', '.join(PROMPTS)}, or a text with {{sent}} in the place of the expression",
            "prompt",
        ),
        Rule(
            lambda s: (
                s.box_remap in (None, "scale")
                or s.scoring in ("egm", "egm-eval", *(("answer-after-thinking",) if s.box_remap == "keep" else ()))
            ),
            "!has(self.boxRemap) || self.boxRemap == 'scale' || self.scoring in ['egm', 'egm-eval'] "
            "|| (self.boxRemap == 'keep' && self.scoring == 'answer-after-thinking')",
            "boxRemap is for scoring egm (keep: also answer-after-thinking); the other profiles say how they read answers",
            "boxRemap",
        ),
        Rule(
            lambda s: s.scoring_file is None or (s.scoring == "egm" and s.box_remap is None),
            "!has(self.scoringFile) || (self.scoring == 'egm' && !has(self.boxRemap))",
            "scoringFile stands for the profile: leave scoring and boxRemap out",
            "scoringFile",
        ),
        Rule(
            lambda s: s.sweep is None or s.sampling.temperature > 0 or all(n == 1 for n in s.sweep.samples),
            "!has(self.sweep) || !has(self.sweep.samples) || self.sweep.samples.all(n, n == 1) "
            "|| (has(self.sampling) && self.sampling.temperature > 0.0)",
            "sweep.samples needs a sampling.temperature above 0; at 0 all answers are the same",
            "sweep",
        ),
        Rule(
            lambda s: s.sweep is None or s.sampling.temperature > 0 or all(c.samples == 1 for c in s.sweep.settings),
            "!has(self.sweep) || !has(self.sweep.settings) || self.sweep.settings.all(c, !has(c.samples) || c.samples == 1) "
            "|| (has(self.sampling) && self.sampling.temperature > 0.0)",
            "samples in sweep.settings needs a sampling.temperature above 0; at 0 all answers are the same",
            "sweep",
        ),
        Rule(
            lambda s: not (s.endpoints and s.sweep is not None and s.sweep.models),
            f"!({_SWEPT} && has(self.endpoints) && size(self.endpoints) > 0)",
            "sweep.models needs servers that the job starts, because each model is served in its turn; leave endpoints out",
            "endpoints",
        ),
        Rule(
            lambda s: not s.model.name or s.model.name in {m.name for m in s.models},
            f"!({_SWEPT} && has(self.model) && (has(self.model.source) || has(self.model.trainJob))) "
            "|| self.sweep.models.exists(m, (has(m.source) && has(self.model.source) && m.source == self.model.source) "
            "|| (has(m.trainJob) && has(self.model.trainJob) && m.trainJob == self.model.trainJob))",
            "model is none of sweep.models and would not be measured; add it to them, or leave it out",
            "model",
        ),
        Rule(
            lambda s: s.min_servers <= s.servers,
            "self.minServers <= self.servers",
            "minServers must not be greater than servers",
            "minServers",
        ),
        Rule(
            lambda s: not (s.data.shapes and (s.data.files or s.data.root)),
            "!(has(self.data) && has(self.data.shapes) "
            "&& ((has(self.data.files) && size(self.data.files) > 0) || has(self.data.root)))",
            "data.shapes excludes data.files and data.root",
            "data",
        ),
        Rule(
            lambda s: all(m.name for m in s.models),
            f"{_SWEPT} || (has(self.model) && (has(self.model.source) || has(self.model.trainJob)))",
            "model needs one of source and trainJob (or sweep needs models)",
            "model",
        ),
        Rule(
            lambda s: bool(s.data.shapes or s.data.images),
            "has(self.data) && (has(self.data.shapes) || (has(self.data.images) && size(self.data.images) > 0))",
            "data needs images (or shapes)",
            "data",
        ),
    )


_Ignored = BeforeValidator(lambda _: None)  # a manifest read back from a cluster carries its status


class _Job(Model):
    api_version: Literal["grounding.egm.dev/v1alpha1"] = Field(description="Always grounding.egm.dev/v1alpha1.")
    metadata: Metadata = Field(description="Name, namespace, labels, annotations.")


class GroundingTrainJob(_Job):
    """Trains a grounding model: supervised fine-tuning or reinforcement learning."""

    short_name: ClassVar[str] = "gtj"
    kind: Literal["GroundingTrainJob"] = Field(description="Always GroundingTrainJob.")
    spec: TrainSpec = Field(description="What is wanted.")
    status: Annotated[TrainStatus | None, _Ignored] = Field(None, description="What is; the operator's.", exclude=True)


class GroundingEvalJob(_Job):
    """Measures a grounding model on the eight RefCOCO files."""

    short_name: ClassVar[str] = "gej"
    kind: Literal["GroundingEvalJob"] = Field(description="Always GroundingEvalJob.")
    spec: EvalSpec = Field(description="What is wanted.")
    status: Annotated[EvalStatus | None, _Ignored] = Field(None, description="What is; the operator's.", exclude=True)


Job = GroundingTrainJob | GroundingEvalJob
KINDS: dict[str, type[GroundingTrainJob] | type[GroundingEvalJob]] = {
    "GroundingTrainJob": GroundingTrainJob,
    "GroundingEvalJob": GroundingEvalJob,
}
