"""The two kinds, GroundingTrainJob and GroundingEvalJob, as pydantic models: the one source of validation and of `egm explain`.

YAML names are camelCase, Python names snake_case. A field that a preset may fill is optional here; `presets.resolve` merges.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

from grounding.api.base import Fraction, Labels, Model, Name, Place, Places, Quantity, Rule, Seconds, Text
from grounding.api.hyperparameters import Hyperparameters
from grounding.api.status import EvalStatus, TrainStatus

GROUP_VERSION = "grounding.egm.dev/v1alpha1"


class Metadata(Model):
    """Standard object metadata."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)
    name: Name = Field(description="Name of the job: lower case letters, digits and dashes.")
    namespace: str | None = Field(None, description="Namespace on a cluster.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels, as on any Kubernetes object.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations, as on any Kubernetes object.")


class ModelRef(Model):
    """Which model to start from, or to measure: exactly one of source and trainJob."""

    source: Place | None = Field(
        None,
        description="A folder, hf://owner/name, s3://bucket/path or pvc://claim/path. "
        "tiny:// is a tiny random Qwen3-VL built on the spot, for demos and tests.",
    )
    train_job: Name | None = Field(
        None, description="Name of a GroundingTrainJob; this job waits for it and takes the model it leaves."
    )
    family: Literal["qwen3-vl", "internvl"] | None = Field(
        None,
        description="Model family; absent: the preset's, else qwen3-vl. Training refuses a model of the other one.",
    )

    rules = (
        Rule(
            lambda m: m.source is None or m.train_job is None,
            "!(has(self.source) && has(self.trainJob))",
            "exactly one of source and trainJob is wanted, found both",
        ),
    )

    @property
    def family_name(self) -> Literal["qwen3-vl", "internvl"]:
        """The family, the default filled in."""
        return self.family or "qwen3-vl"


class Shapes(Model):
    """A synthetic set of pictures of coloured shapes with exact boxes, in the layout of the real data."""

    seed: int = Field(7, ge=-(2**31), le=2**31 - 1, description="Seed of the set; the same seed gives the same bytes.")
    train: int = Field(6000, ge=1, le=10_000_000, description="Number of training expressions.")
    per_file: int = Field(
        40, ge=1, le=1_000_000, description="Number of expressions in each of the eight evaluation files."
    )
    size: int = Field(224, ge=64, le=1024, multiple_of=32, description="Width and height of a picture, pixels.")


class TrainData(Model):
    """Training data: files with images, parquet prepared before, or the synthetic set."""

    train: Places = Field(
        default_factory=list,
        description="Training files: SFT rows for sft, conversations with <ref> and <box> for rl (JSON).",
    )
    validation: Places = Field(
        default_factory=list, description="Evaluation files (jsonl) of which a tenth validates RL."
    )
    images: Places = Field(
        default_factory=list,
        description="Image sources, first match wins: folders, tar files, or split tars (x.tar.part_*).",
    )
    prepared: Place | None = Field(None, description="Folder with train.parquet and val.parquet prepared before.")
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


class Toleration(Model):
    """A Kubernetes toleration."""

    key: Text | None = Field(None, description="Taint key; absent matches all.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: Text | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Absent matches all."
    )
    toleration_seconds: Seconds | None = Field(None, description="How long NoExecute is tolerated, seconds.")


class Resources(Model):
    """What a training job runs on."""

    nodes: int = Field(1, ge=1, le=1024, description="Number of pods, one a node.")
    gpus_per_node: int = Field(
        8, ge=0, le=16, description="GPUs of each pod. A machine without GPU takes the CPU path whatever stands here."
    )
    cpu: Quantity | None = Field(None, description="CPU request of a pod.")
    memory: Quantity | None = Field(None, description="Memory request of a pod.")
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
    """Where metrics go besides the progress lines. None of it can stop a run."""

    tensorboard: bool = Field(True, description="Write TensorBoard events.")
    wandb: Wandb | None = Field(
        None, description="Log to Weights & Biases; offline where it cannot be reached or there is no key."
    )
    mlflow: Mlflow | None = Field(None, description="Log to MLflow.")


_CHANGEABLE = {"suspend", "maxAttempts", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "podTemplate"}


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
    pod_template: dict[str, Any] | None = Field(
        None,
        description="Pod template merged over ours by key; containers by name. A change takes effect with the next attempt.",
    )


_TRAIN = "(has(self.data.train) && size(self.data.train) > 0)"


class TrainSpec(_Lifecycle):
    """What to train, on what, and how."""

    method: Literal["sft", "rl"] = Field(description="sft: supervised fine-tuning. rl: reinforcement learning by verl.")
    preset: Text | None = Field(
        None,
        description="Named set of values that fills absent fields: egm-4b-sft, egm-4b-rl, egm-8b-sft, egm-8b-rl, egm-internvl-rl, tiny-sft, tiny-rl.",
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

    changeable = frozenset(_CHANGEABLE | {"startDeadlineSeconds", "stallTimeoutSeconds"})
    rules = (
        Rule(
            lambda s: s.method == "rl" or s.reward == Reward(),  # type: ignore[call-arg]
            "{method} == 'rl' || !has(self.reward) "
            "|| (self.reward.type == 'mix' && self.reward.alpha == 0.5 && self.reward.threshold == 0.5)",
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
            lambda s: not (s.method == "rl" and s.data.train and not s.data.validation),
            f"!({{method}} == 'rl' && has(self.data) && {_TRAIN}"
            " && !(has(self.data.validation) && size(self.data.validation) > 0))",
            "data.validation is wanted beside data.train for method rl",
            "data",
        ),
        Rule(
            lambda s: not (s.method == "sft" and s.data.prepared),
            "!({method} == 'sft' && has(self.data) && has(self.data.prepared))",
            "data.prepared is for method rl; sft reads data.train",
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


class EvalSpec(_Lifecycle):
    """What to measure, and with what servers."""

    model: ModelRef = Field(description="The model to measure.")
    engine: Literal["sglang", "vllm", "transformers"] = Field(
        "sglang", description="Server software; transformers runs on a CPU."
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
        description="GPUs of a server; each holds a replica (data parallel). Absent: 8, or none for engine transformers.",
    )
    endpoints: Places = Field(
        default_factory=list, description="URLs of servers that run already; none are started then."
    )
    data: EvalData = Field(default_factory=EvalData, description="Files and images.")  # type: ignore[arg-type]
    prompt: Literal["qwen3", "qwen3_amodal", "grounding", "amodal"] = Field("qwen3", description="Prompt template.")
    scoring: Literal["egm", "egm-eval", "egm-reward", "vlmevalkit"] = Field(
        "egm", description="Scoring profile; egm is egm-eval."
    )
    sampling: Sampling = Field(default_factory=Sampling, description="How answers are drawn.")  # type: ignore[arg-type]
    mode: Literal["throughput", "latency"] = Field(
        "throughput", description="What the run measures besides accuracy; never one number for both."
    )
    concurrency: int = Field(64, ge=1, le=4096, description="Requests in flight over all servers.")

    @property
    def server_gpus(self) -> int:
        """GPUs of each server, the default filled in."""
        if self.engine == "transformers":
            return 0
        return 8 if self.gpus_per_server is None else self.gpus_per_server

    changeable = frozenset(_CHANGEABLE | {"servers"})
    rules = (
        Rule(
            lambda s: not (s.engine == "transformers" and s.gpus_per_server),
            "self.engine != 'transformers' || !has(self.gpusPerServer) || self.gpusPerServer == 0",
            "gpusPerServer must be 0 (or absent) for engine transformers",
            "gpusPerServer",
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
            lambda s: s.model.source is not None or s.model.train_job is not None,
            "has(self.model.source) || has(self.model.trainJob)",
            "model needs one of source and trainJob",
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
