"""Models of `spec` of a GroundingTrainJob."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from grounding.api.base import Fraction, Labels, Model, Place, Places, Quantity, Rule, Seconds, Text, Url
from grounding.api.common import CHANGEABLE, ConfigMapKey, GpuResource, JobSpec, ModelRef, SecretKey, Shapes, Template
from grounding.api.hyperparameters import Hyperparameters
from grounding.boxes import Space

AUTO = "auto"
BackendName = Literal["auto", "pytorchjob", "job"]
"""The kind of object that runs the pods of a training on a cluster"""


class TrainData(Model):
    """Training data: files with images, parquet prepared before, or the synthetic set."""

    train: Places = Field(
        default_factory=list,
        description="Training files: SFT rows for sft, conversations with <ref> and <box> for rl (JSON).",
    )
    weights: Annotated[list[Annotated[float, Field(gt=0, le=1000)]], Field(max_length=256)] = Field(
        default_factory=list,
        description="How often each row of a file of train is used in an epoch, one number for each file: 2 means twice, 0.25 every fourth row, "
        "drawn by the job's seed. Absent: once.",
    )
    validation: Places = Field(
        default_factory=list,
        description="Files for validation. RL: evaluation files (jsonl), of which a tenth is used; SFT: rows as in train.",
    )
    validation_sets: Annotated[dict[str, Annotated[list[Url], Field(max_length=256)]], Field(max_length=64)] = Field(
        default_factory=dict,
        description="Validation files in named sets, each with separate metrics: {val: [a.jsonl], testA: [b.jsonl]}.",
    )
    images: Places = Field(
        default_factory=list,
        description="Image sources; the first match is used: folders, tar files, or split tars (x.tar.part_*).",
    )
    prepared: Place | None = Field(None, description="Folder with already prepared train.parquet and val.parquet.")
    truth: Space | None = Field(
        None,
        description="How the boxes of train are written: pixels (xyxy, xywh, cxcywh, yxyx), 0..1000 (relative) or 0..1 (fraction). "
        "Absent: relative, and a file that looks different is refused.",
    )
    validation_truth: Space | None = Field(
        None,
        description="How the boxes of validation are written, as for truth. Absent: xyxy, and a file that looks different is refused.",
    )
    skip_broken: int = Field(
        0, ge=0, le=2**31 - 1, description="Number of unusable rows that may be left out; more are an error."
    )
    prompt: Literal["qwen3", "qwen3_amodal", "grounding", "amodal"] = Field(
        "qwen3", description="Prompt template of RL rows."
    )
    shapes: Shapes | None = Field(None, description="Create and use the synthetic set instead of files.")


class Reward(Model):
    """Reward of RL, computed by the scoring profile egm-reward."""

    type: Literal["mix", "sigmoid", "normalized_exp", "penalty", "eval"] = Field(
        "mix",
        description="mix: alpha * pass + (1 - alpha) * IoU. sigmoid, normalized_exp: a function of the IoU. "
        "penalty: mix minus a penalty for length and repetition. eval: only pass.",
    )
    alpha: Fraction = Field(0.5, description="Weight of passing; 1 - alpha is the weight of the IoU.")
    threshold: Fraction = Field(0.5, description="IoU at which an answer passes.")
    file: Place | None = Field(
        None,
        description="A Python file with your own reward, instead of type and alpha: a file on this machine, which `egm submit` "
        "uploads, a path that exists in the pods, pvc://claim/path, s3://bucket/path or hf://owner/name/path.",
    )
    config_map: ConfigMapKey | None = Field(
        None,
        description="The file in a ConfigMap of the job's namespace, which its pods mount; `egm submit` writes it for a file on this machine.",
    )
    entry_point: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=63)] = Field(
        "compute_score",
        description="Name of its function: (data_source, solution_str, ground_truth, extra_info) -> a number, or a mapping with score.",
    )

    rules = (
        Rule(
            lambda r: r.file is None or r.config_map is None,
            "!(has(self.file) && has(self.configMap))",
            "file and configMap both give the reward; leave one of them out",
            "configMap",
        ),
        Rule(
            lambda r: r.own or r.entry_point == "compute_score",
            "has(self.file) || has(self.configMap) || self.entryPoint == 'compute_score'",
            "entryPoint names a function of file, which is absent",
            "entryPoint",
        ),
        Rule(
            lambda r: not r.own or (r.type == "mix" and r.alpha == 0.5),
            "!(has(self.file) || has(self.configMap)) || (self.type == 'mix' && self.alpha == 0.5)",
            "type and alpha have no effect with file or configMap; leave them out",
            "type",
        ),
    )

    @property
    def own(self) -> bool:
        """Return whether the reward is the user's own function."""
        return self.file is not None or self.config_map is not None


class Toleration(Model):
    """A Kubernetes toleration."""

    key: Text | None = Field(None, description="Taint key; absent matches all.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: Text | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Taint effect; absent matches all."
    )
    toleration_seconds: Seconds | None = Field(None, description="How many seconds a NoExecute taint is tolerated.")


class Resources(Model):
    """Nodes, GPUs and memory of a training job."""

    nodes: int = Field(1, ge=1, le=1024, description="Number of pods, one on each node.")
    gpus_per_node: int = Field(
        8,
        ge=0,
        le=16,
        description="GPUs of each pod. 0 trains on the CPU; with more, it is an error if CUDA does not work.",
    )
    gpu_resource: GpuResource | None = Field(
        None,
        description="Name of the GPUs' resource, for example amd.com/gpu. Absent: the operator's setting, nvidia.com/gpu.",
    )
    cpu: Quantity | None = Field(None, description="CPU request of a pod. Absent: 3 for each GPU.")
    memory: Quantity | None = Field(None, description="Memory request of a pod. Absent: 12 GiB for each GPU.")
    shared_memory: Quantity | None = Field(None, description="Size of /dev/shm.")
    node_selector: Labels = Field(default_factory=dict, description="Labels that the nodes must have.")
    tolerations: Annotated[list[Toleration], Field(max_length=64)] = Field(
        default_factory=list, description="Taints that are tolerated."
    )
    topology: Text | None = Field(
        None, description="Topology label whose value is the same for all pods, for example the rack."
    )


class Wandb(Model):
    """Weights & Biases."""

    base_url: Url | None = Field(None, description="Server; absent: the public one.")
    project: Text = Field("egm", description="Project that the runs are logged to.")
    api_key_secret: SecretKey | None = Field(
        None, description="Secret with the API key, which is never written into the job."
    )


class Mlflow(Model):
    """MLflow. MLflow reads its credentials from the environment (MLFLOW_TRACKING_TOKEN and others)."""

    tracking_uri: Url = Field(description="Server (http, https), or a store that MLflow supports.")
    experiment: Text = Field("egm", description="Experiment that the runs are logged to; created if it does not exist.")


class Tracking(Model):
    """Where metrics are logged in addition to the progress lines. A failure of tracking never stops a run."""

    tensorboard: bool = Field(True, description="Write TensorBoard events.")
    wandb: Wandb | None = Field(
        None, description="Log to Weights & Biases; offline if it cannot be reached or there is no key."
    )
    mlflow: Mlflow | None = Field(None, description="Log to MLflow.")


class TrainPodTemplates(Model):
    """Pod templates by role, each merged over spec.podTemplate."""

    prepare: Template | None = Field(
        None, description="Template of the pod that prepares the data, if one pod does so for all (output: pvc://)."
    )
    train: Template | None = Field(None, description="Template of the pods that train.")


_VALIDATION = (
    "((has(self.data.validation) && size(self.data.validation) > 0)"
    " || (has(self.data.validationSets) && size(self.data.validationSets) > 0))"
)
_TRAIN = "(has(self.data.train) && size(self.data.train) > 0)"


class TrainSpec(JobSpec):
    """What to train, on which data and resources, and how."""

    pod_templates: TrainPodTemplates | None = Field(None, description="Pod templates by role: prepare, train.")

    method: Literal["sft", "rl"] = Field(description="sft: supervised fine-tuning. rl: reinforcement learning by verl.")
    preset: Text | None = Field(
        None,
        description="Named set of values for absent fields: egm-2b-sft, egm-2b-rl, egm-4b-sft, egm-4b-rl, egm-8b-sft, "
        "egm-8b-rl, egm-internvl-rl, tiny-sft, tiny-rl.",
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Seed of data order, initialisation and sampling.")
    model: ModelRef = Field(default_factory=ModelRef, description="The model to start from.")  # type: ignore[arg-type]
    data: TrainData = Field(default_factory=TrainData, description="Training and validation data.")  # type: ignore[arg-type]
    reward: Reward = Field(default_factory=Reward, description="What RL maximises.")  # type: ignore[arg-type]
    resources: Resources = Field(default_factory=Resources, description="Nodes, GPUs, memory.")  # type: ignore[arg-type]
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Typed hyperparameters.")  # type: ignore[arg-type]
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics are logged.")  # type: ignore[arg-type]
    start_deadline_seconds: Seconds | None = Field(
        None, ge=1, description="Maximum wait in seconds until all pods run."
    )
    stall_timeout_seconds: Seconds | None = Field(
        None, ge=60, description="Restart if no step has finished for this many seconds."
    )
    backend: BackendName | None = Field(
        None,
        description="What runs the pods on a cluster: a PyTorchJob (pytorchjob), an Indexed Job of core Kubernetes (job), or the first of them that "
        "the cluster has (auto). Absent: the operator's setting. A change takes effect with the next attempt.",
    )

    @property
    def models(self) -> list[ModelRef]:
        """Return the model to start from, as a list with one element."""
        return [self.model]

    changeable = frozenset(CHANGEABLE | {"startDeadlineSeconds", "stallTimeoutSeconds", "backend"})
    rules = (
        Rule(
            lambda s: s.method == "rl" or s.reward == Reward(),  # type: ignore[call-arg]
            "{method} == 'rl' || !has(self.reward) "
            "|| (self.reward.type == 'mix' && self.reward.alpha == 0.5 && self.reward.threshold == 0.5 "
            "&& !has(self.reward.file) && !has(self.reward.configMap))",
            "reward is only for method rl",
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
            "data needs train, prepared or shapes",
            "data",
        ),
        Rule(
            lambda s: not (s.method == "rl" and s.data.train and not (s.data.validation or s.data.validation_sets)),
            f"!({{method}} == 'rl' && has(self.data) && {_TRAIN} && !{_VALIDATION})",
            "method rl needs data.validation or data.validationSets in addition to data.train",
            "data",
        ),
        Rule(
            lambda s: s.data.truth in (None, "relative") or bool(s.method == "rl" and s.data.train),
            "!(has(self.data) && has(self.data.truth) && self.data.truth != 'relative') "
            f"|| ({{method}} == 'rl' && {_TRAIN})",
            "data.truth converts boxes only in data.train of method rl; elsewhere they are used as written, so it can only be relative",
            "data",
        ),
        Rule(
            lambda s: not (s.data.validation_truth or s.data.skip_broken) or bool(s.method == "rl" and s.data.train),
            "!(has(self.data) && (has(self.data.validationTruth) || (has(self.data.skipBroken) && self.data.skipBroken > 0))) "
            f"|| ({{method}} == 'rl' && {_TRAIN})",
            "data.validationTruth and data.skipBroken are only for method rl with data.train, which the job prepares",
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
            "data.validation and data.validationSets have no effect with data.prepared or data.shapes, which already have validation rows",
            "data",
        ),
        Rule(
            lambda s: not s.data.weights or len(s.data.weights) == len(s.data.train),
            "!(has(self.data) && has(self.data.weights) && size(self.data.weights) > 0) "
            "|| (has(self.data.train) && size(self.data.weights) == size(self.data.train))",
            "data.weights needs one number for each file of data.train",
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
            "data.train has no effect with data.prepared, which already has the rows; leave one of them out",
            "data",
        ),
        Rule(
            lambda s: s.preset is not None or s.model.source is not None or s.model.train_job is not None,
            "has(self.preset) || (has(self.model) && (has(self.model.source) || has(self.model.trainJob)))",
            "needs one of source and trainJob (or a preset)",
            "model",
        ),
    )
