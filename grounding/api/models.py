"""The two kinds, GroundingTrainJob and GroundingEvalJob, as pydantic models: the one source of validation and of `egm explain`.

YAML names are camelCase, Python names snake_case. A field that a preset may fill is optional here; `presets.resolve` merges.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

GROUP_VERSION = "grounding.egm.dev/v1alpha1"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Override = Annotated[str, StringConstraints(pattern=r"^[+~]{0,2}[\w.@/-]+(=.*)?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Model(BaseModel):
    """Base: unknown fields are refused, names are camelCase in YAML."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Metadata(Model):
    """Standard object metadata."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)
    name: Name = Field(description="Name of the job: lower case letters, digits and dashes.")
    namespace: str | None = Field(None, description="Namespace on a cluster.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels, as on any Kubernetes object.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations, as on any Kubernetes object.")


class ModelRef(Model):
    """Which model to start from, or to measure: exactly one of source and trainJob."""

    source: str | None = Field(
        None,
        description="A folder, hf://owner/name, s3://bucket/path or pvc://claim/path. "
        "tiny:// is a tiny random Qwen3-VL built on the spot, for demos and tests.",
    )
    train_job: Name | None = Field(
        None, description="Name of a GroundingTrainJob; this job waits for it and takes the model it leaves."
    )
    family: Literal["qwen3-vl", "internvl"] = Field(
        "qwen3-vl", description="Model family: decides prompt and patch size."
    )

    @model_validator(mode="after")
    def _one(self) -> ModelRef:
        if self.source is not None and self.train_job is not None:
            raise ValueError("exactly one of source and trainJob is wanted, found both")
        return self


class Shapes(Model):
    """A synthetic set of pictures of coloured shapes with exact boxes, in the layout of the real data."""

    seed: int = Field(7, description="Seed of the set; the same seed gives the same bytes.")
    train: int = Field(6000, ge=1, description="Number of training expressions.")
    per_file: int = Field(40, ge=1, description="Number of expressions in each of the eight evaluation files.")
    size: int = Field(224, ge=64, le=1024, multiple_of=32, description="Width and height of a picture, pixels.")


class TrainData(Model):
    """Training data: files with images, parquet prepared before, or the synthetic set."""

    train: list[str] = Field(
        default_factory=list,
        description="Training files: SFT rows for sft, conversations with <ref> and <box> for rl (JSON).",
    )
    validation: list[str] = Field(
        default_factory=list, description="Evaluation files (jsonl) of which a tenth validates RL."
    )
    images: list[str] = Field(
        default_factory=list,
        description="Image sources, first match wins: folders, tar files, or split tars (x.tar.part_*).",
    )
    prepared: str | None = Field(None, description="Folder with train.parquet and val.parquet prepared before.")
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

    key: str | None = Field(None, description="Taint key; absent matches all.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: str | None = Field(None, description="Taint value.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Absent matches all."
    )
    toleration_seconds: int | None = Field(None, description="How long NoExecute is tolerated, seconds.")


class Resources(Model):
    """What a training job runs on."""

    nodes: int = Field(1, ge=1, description="Number of pods, one a node.")
    gpus_per_node: int = Field(
        8, ge=0, le=16, description="GPUs of each pod. A machine without GPU takes the CPU path whatever stands here."
    )
    cpu: Quantity | None = Field(None, description="CPU request of a pod.")
    memory: Quantity | None = Field(None, description="Memory request of a pod.")
    shared_memory: Quantity | None = Field(None, description="Size of /dev/shm.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels that the nodes must have.")
    tolerations: list[Toleration] = Field(default_factory=list, description="Taints that are tolerated.")
    topology: str | None = Field(None, description="Topology label that all pods share, for example a rack.")


_Positive = Annotated[int, Field(ge=1)]
_NonNegative = Annotated[int, Field(ge=0)]
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
    rollouts: Annotated[int, Field(ge=2)] | None = Field(
        None, description="RL: answers a prompt, the group that advantages are normalised in."
    )
    prompt_length: _Positive | None = Field(None, description="RL: longest prompt, tokens, image tokens included.")
    response_length: _Positive | None = Field(None, description="RL: longest answer, tokens.")
    max_length: _Positive | None = Field(None, description="SFT: longest row, tokens; a longer one is refused by name.")
    min_pixels: _Positive | None = Field(None, description="SFT: smallest picture after resizing, pixels in all.")
    max_pixels: _Positive | None = Field(None, description="SFT: largest picture after resizing, pixels in all.")
    temperature: Annotated[float, Field(gt=0)] | None = Field(None, description="RL: sampling temperature of rollouts.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="RL: nucleus of rollouts.")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="RL: top-k of rollouts; -1 is off.")
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
    freeze_vision: bool | None = Field(None, description="SFT: freeze the vision tower but for its merger.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of training and rollouts on a GPU."
    )
    engine_overrides: list[Override] = Field(
        default_factory=list, description="RL: verl (Hydra) overrides key=value, applied last."
    )


class SecretKey(Model):
    """A key of a Secret in the job's namespace."""

    name: str = Field(description="Name of the Secret.")
    key: str = Field(description="Key in the Secret.")


class Wandb(Model):
    """Weights & Biases."""

    base_url: str | None = Field(None, description="Server; absent: the public one.")
    project: str = Field("egm", description="Project that runs go to.")
    api_key_secret: SecretKey | None = Field(None, description="Where the API key is; never written into the job.")


class Tracking(Model):
    """Where metrics go besides the progress lines."""

    tensorboard: bool = Field(True, description="Write TensorBoard events (on GPUs).")
    wandb: Wandb | None = Field(None, description="Log to Weights & Biases.")


class _Lifecycle(Model):
    output: str | None = Field(
        None,
        description="Where results go on a cluster: s3://bucket/path, pvc://claim/path or file:///path. Local runs use runs/.",
    )
    suspend: bool = Field(
        False, description="Do not start; when running, stop after a checkpoint and give the nodes back."
    )
    max_attempts: int = Field(3, ge=1, description="Starts before the job counts as failed.")
    active_deadline_seconds: int | None = Field(
        None, ge=1, description="Longest time from start to end over all attempts."
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, description="Delete the job this long after its end; absent: never."
    )
    queue: str | None = Field(None, description="Kueue queue that admits the job.")
    priority_class_name: str | None = Field(None, description="Priority class of the pods.")
    pod_template: dict[str, Any] | None = Field(
        None, description="Pod template merged over ours by key; containers by name."
    )


class TrainSpec(_Lifecycle):
    """What to train, on what, and how."""

    method: Literal["sft", "rl"] = Field(description="sft: supervised fine-tuning. rl: reinforcement learning by verl.")
    preset: str | None = Field(
        None,
        description="Named set of values that fills absent fields: egm-4b-sft, egm-4b-rl, egm-8b-sft, egm-8b-rl, egm-internvl-rl, tiny-sft, tiny-rl.",
    )
    seed: int = Field(42, ge=0, description="Seed of data order, initialisation and sampling.")
    model: ModelRef = Field(default_factory=ModelRef, description="The model to start from.")  # type: ignore[arg-type]
    data: TrainData = Field(default_factory=TrainData, description="Training and validation data.")  # type: ignore[arg-type]
    reward: Reward = Field(default_factory=Reward, description="Reward of RL.")  # type: ignore[arg-type]
    resources: Resources = Field(default_factory=Resources, description="Nodes, GPUs, memory.")  # type: ignore[arg-type]
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Typed hyperparameters.")  # type: ignore[arg-type]
    tracking: Tracking = Field(default_factory=Tracking, description="Where metrics go.")  # type: ignore[arg-type]
    start_deadline_seconds: int | None = Field(None, ge=1, description="Longest wait until all pods run.")
    stall_timeout_seconds: int | None = Field(
        None, ge=60, description="Restart when no step was finished for this long."
    )

    @model_validator(mode="after")
    def _fits_method(self) -> TrainSpec:
        if self.method == "sft" and self.reward != Reward():  # type: ignore[call-arg]
            raise ValueError("reward belongs to method rl; sft has none")
        data = self.data
        if data.shapes and (data.train or data.prepared):
            raise ValueError("data.shapes excludes data.train and data.prepared")
        if not (data.shapes or data.train or data.prepared):
            raise ValueError("data needs one of train, prepared and shapes")
        if self.method == "rl" and data.train and not data.validation:
            raise ValueError("data.validation is wanted beside data.train for method rl")
        if self.method == "sft" and data.prepared:
            raise ValueError("data.prepared is for method rl; sft reads data.train")
        return self


class EvalData(Model):
    """What to measure on."""

    files: list[str] = Field(
        default_factory=list,
        description="Evaluation files (jsonl), or their stems; absent: the eight of RefCOCO, RefCOCO+ and RefCOCOg.",
    )
    root: str | None = Field(None, description="Folder that relative files are under.")
    images: list[str] = Field(
        default_factory=list, description="Image sources: folders, tar files, or split tars (x.tar.part_*)."
    )
    shapes: Shapes | None = Field(None, description="Make and use the synthetic set instead of files.")


class Sampling(Model):
    """How answers are drawn; the defaults are the reference's."""

    max_tokens: int = Field(
        4096, ge=1, description="Longest answer, tokens; a longer one is cut and counted as truncated."
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus.")
    top_k: int = Field(20, ge=-1, description="Top-k; without effect at temperature 0.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="OpenAI's presence penalty.")
    repetition_penalty: float = Field(1.0, gt=0, description="1 is off.")


class EvalSpec(_Lifecycle):
    """What to measure, and with what servers."""

    model: ModelRef = Field(description="The model to measure.")
    engine: Literal["sglang", "vllm", "transformers"] = Field(
        "sglang", description="Server software; transformers runs on a CPU."
    )
    servers: int = Field(1, ge=1, description="Number of servers that share the work.")
    gpus_per_server: int | None = Field(
        None,
        ge=0,
        description="GPUs of a server; each holds a replica (data parallel). Absent: 8, or none for engine transformers.",
    )
    endpoints: list[str] = Field(
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

    @model_validator(mode="after")
    def _fits_engine(self) -> EvalSpec:
        if self.engine == "transformers" and self.gpus_per_server:
            raise ValueError("gpusPerServer must be 0 (or absent) for engine transformers")
        if self.data.shapes and (self.data.files or self.data.root):
            raise ValueError("data.shapes excludes data.files and data.root")
        if self.model.source is None and self.model.train_job is None:
            raise ValueError("model needs one of source and trainJob")
        if not self.data.shapes and not self.data.images:
            raise ValueError("data needs images (or shapes)")
        return self


class _Job(Model):
    api_version: Literal["grounding.egm.dev/v1alpha1"] = Field(description="Always grounding.egm.dev/v1alpha1.")
    metadata: Metadata = Field(description="Name, namespace, labels, annotations.")
    status: dict[str, Any] | None = Field(None, description="Written by the operator; ignored here.", exclude=True)


class GroundingTrainJob(_Job):
    """Trains a grounding model: supervised fine-tuning or reinforcement learning."""

    short_name: ClassVar[str] = "gtj"
    kind: Literal["GroundingTrainJob"] = Field(description="Always GroundingTrainJob.")
    spec: TrainSpec = Field(description="What is wanted.")


class GroundingEvalJob(_Job):
    """Measures a grounding model on the eight RefCOCO files."""

    short_name: ClassVar[str] = "gej"
    kind: Literal["GroundingEvalJob"] = Field(description="Always GroundingEvalJob.")
    spec: EvalSpec = Field(description="What is wanted.")


Job = GroundingTrainJob | GroundingEvalJob
KINDS: dict[str, type[GroundingTrainJob] | type[GroundingEvalJob]] = {
    "GroundingTrainJob": GroundingTrainJob,
    "GroundingEvalJob": GroundingEvalJob,
}
