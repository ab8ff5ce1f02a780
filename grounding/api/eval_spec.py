"""Models of `spec` of a GroundingEvalJob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints

from grounding import defaults, sampling
from grounding.api.base import Model, ObjectName, Place, Places, Rule, Text, Url
from grounding.api.common import (
    CHANGEABLE,
    PROMPTS,
    ConfigMapKey,
    GpuResource,
    JobSpec,
    ModelRef,
    SecretKey,
    Shapes,
    Template,
)
from grounding.boxes import Space


class HeaderSecret(Model):
    """A header of requests whose value is in a Secret."""

    header: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]+$", max_length=63)] = Field(
        description="Name of the header."
    )
    name: ObjectName = Field(description="Name of the Secret.")
    key: Text = Field(description="Key in the Secret.")


class EvalPodTemplates(Model):
    """Pod templates by role, each merged over spec.podTemplate."""

    prepare: Template | None = Field(None, description="Template of the pod that prepares the data.")
    server: Template | None = Field(None, description="Template of the servers.")
    client: Template | None = Field(None, description="Template of the pod that sends the questions.")


class EvalData(Model):
    """The data for the evaluation."""

    files: Places = Field(
        default_factory=list,
        description="Evaluation files (jsonl), or their stems; absent: the eight of RefCOCO, RefCOCO+ and RefCOCOg.",
    )
    root: Place | None = Field(None, description="Folder for relative paths in files.")
    images: Places = Field(
        default_factory=list, description="Image sources: folders, tar files, or split tars (x.tar.part_*)."
    )
    truth: Space | None = Field(
        None,
        description="How the true boxes are written: pixels (xyxy, xywh, cxcywh, yxyx), 0..1000 (relative) or 0..1 (fraction). "
        "Absent: xyxy, and a file that looks different is refused.",
    )
    skip_broken: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Number of unusable rows that may be left out, which the summary reports; more are an error.",
    )
    shapes: Shapes | None = Field(None, description="Create and use the synthetic set instead of files.")


_DRAWN = sampling.Sampling()


class Sampling(Model):
    """Sampling of answers; the defaults are those of the reference."""

    max_tokens: int = Field(
        _DRAWN.max_tokens,
        ge=1,
        le=1_000_000,
        description="Maximum length of an answer in tokens; a longer one is cut off and counted as truncated.",
    )
    temperature: float = Field(_DRAWN.temperature, ge=0, description="0 is greedy.")
    top_p: float = Field(
        _DRAWN.top_p,
        gt=0,
        le=1,
        description="Nucleus sampling: the share of the probability from which tokens are drawn.",
    )
    top_k: int = Field(_DRAWN.top_k, ge=-1, le=2**31 - 1, description="Top-k; has no effect at temperature 0.")
    presence_penalty: float = Field(_DRAWN.presence_penalty, ge=-2, le=2, description="OpenAI's presence penalty.")
    repetition_penalty: float = Field(_DRAWN.repetition_penalty, gt=0, description="1 is off.")
    seed: int | None = Field(
        _DRAWN.seed,
        ge=0,
        le=2**31 - 1,
        description="Seed of the server's random numbers; has no effect at temperature 0.",
    )
    samples: int = Field(
        1,
        ge=1,
        le=64,
        description="Number of answers to each question, for voting; more than 1 needs a temperature above 0.",
    )
    thinking_budget: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Maximum length of the reasoning in tokens; longer reasoning is ended and the answer requested. 0: none. Absent: no limit.",
    )
    max_pixels: int | None = Field(
        None,
        ge=1024,
        le=2**31 - 1,
        description="Pictures with more pixels are shrunk before they are sent. Absent: sent as stored.",
    )
    min_pixels: int | None = Field(
        None,
        ge=1,
        le=2**26,
        description="Pictures with fewer pixels are enlarged before they are sent. Absent: sent as stored.",
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
    """The model to evaluate: exactly one of source and trainJob."""

    trust_remote_code: bool = Field(
        False, description="Let the servers run Python code from the model's folder, with the pod's credentials."
    )


def _folder_names(models: Sequence[ServedModel]) -> list[str]:
    """Return a unique name for each model that is valid as a folder, a role and a label."""
    found: list[str] = []
    for model in models:
        last = model.name.rstrip("/").rpartition("/")[2].lower()
        plain = re.sub(r"[^a-z0-9.-]+", "-", last)[:40].strip("-.") or "model"
        several = (f"{plain}-{n}" for n in range(2, len(models) + 2))
        found.append(next(name for name in (plain, *several) if name not in found))
    return found


Models = Annotated[list[ServedModel], Field(max_length=16)]


class Sweep(Model):
    """Several models and settings in one job. Each model is served once, and its servers are used for all settings.

    The settings are all combinations of the given axes, or those of a list.
    """

    models: Models = Field(
        default_factory=list, description="Models to evaluate, one after the other. Absent: spec.model."
    )
    settings: Annotated[list[Setting], Field(max_length=256)] = Field(
        default_factory=list, description="A list of settings, instead of the axes below."
    )
    thinking_budgets: Budgets = Field(
        default_factory=list, description="Values of sampling.thinkingBudget. Absent: the value of that field."
    )
    samples: Counts = Field(
        default_factory=list, description="Values of sampling.samples. Absent: the value of that field."
    )
    max_pixels: Pixels = Field(
        default_factory=list, description="Values of sampling.maxPixels. Absent: the value of that field."
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
            "a model is listed twice",
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


class EvalSpec(JobSpec):
    """What to evaluate, and with which servers."""

    pod_templates: EvalPodTemplates | None = Field(None, description="Pod templates by role: prepare, server, client.")

    model: ServedModel = Field(
        default_factory=ServedModel,  # type: ignore[arg-type]
        description="The model to evaluate. Absent: the models of sweep.models.",
    )
    engine: Literal["sglang", "vllm", "transformers", "openai"] = Field(
        defaults.ENGINE,
        description="Server software; transformers runs on a CPU, openai is a hosted service at endpoints.",
    )
    servers: int = Field(1, ge=1, le=1000, description="Number of servers that share the work.")
    min_servers: int = Field(
        1,
        ge=1,
        le=1000,
        description="Servers that must be ready before the first question is asked; others join when they are ready. "
        "In a queue: with 1, all servers are admitted together; with N of 2 or more, N are admitted together and each other server separately.",
    )
    gpus_per_server: int | None = Field(
        None,
        ge=0,
        le=16,
        description="GPUs of a server, which holds gpusPerServer / (tensorParallel x pipelineParallel) copies of the model. "
        "Absent: 8, or none for engine transformers or with endpoints.",
    )
    gpu_resource: GpuResource | None = Field(
        None,
        description="Name of the GPUs' resource, for example amd.com/gpu. Absent: the operator's setting, nvidia.com/gpu.",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=16,
        description="GPUs that share one copy of the model. 1: each GPU holds its own copy (data parallel).",
    )
    pipeline_parallel: int = Field(
        1,
        ge=1,
        le=16,
        description="Number of groups of GPUs over which the layers of a copy are divided (pipeline parallel).",
    )
    expert_parallel: bool = Field(
        False,
        description="Give each GPU of a copy whole experts of a mixture, instead of a slice of each expert (expert parallel).",
    )
    endpoints: Annotated[list[Url], Field(max_length=256)] = Field(
        default_factory=list, description="URLs of running servers; the job then starts none."
    )
    data: EvalData = Field(default_factory=EvalData, description="Files and images.")  # type: ignore[arg-type]
    api_key_secret: SecretKey | None = Field(
        None,
        description="Secret with the key of the endpoints, which is sent as a bearer token and never written into the job.",
    )
    header_secrets: Annotated[list[HeaderSecret], Field(max_length=16)] = Field(
        default_factory=list, description="Additional headers that the endpoints need."
    )
    ca_config_map: ConfigMapKey | None = Field(
        None,
        description="ConfigMap with the certificates (PEM) of the authority that signed the endpoints' certificates.",
    )
    prompt: Annotated[str, Field(max_length=4096)] = Field(
        defaults.PROMPT,
        description="Prompt template: qwen3, qwen3_amodal, grounding or amodal; or your own text with {sent} in place "
        "of the expression.",
    )
    system_prompt: Annotated[str, Field(max_length=8192)] = Field(
        "", description="System message that is sent before each question; absent: none."
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
        defaults.SCORING,
        description="Scoring profile; egm is another name of egm-eval. Profiles that end in -pixels are for models that answer "
        "in pixels, egm-eval-resized is for Qwen2.5-VL.",
    )
    scoring_file: Place | None = Field(
        None,
        description="Python file with your own scoring, instead of a profile: a function that reads the box from an answer. "
        "It is a path, hf://, s3:// or pvc://.",
    )
    scoring_entry_point: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=63)] = Field(
        "read_box", description="Name of the function in scoringFile."
    )
    box_remap: Literal["scale", "keep", "resized"] | None = Field(
        None,
        description="How answers are converted to pixels: scale (they are 0..1000), keep (they are pixels), resized (Qwen2.5-VL's). "
        "Absent: as the scoring profile does.",
    )
    sampling: Sampling = Field(default_factory=Sampling, description="Sampling of answers.")  # type: ignore[arg-type]
    sweep: Sweep | None = Field(
        None, description="Evaluate several settings on the same servers, each with separate results."
    )
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="Price of a GPU-hour in US dollars; the summary then reports the costs."
    )
    mode: Literal["throughput", "latency"] = Field(
        defaults.MODE, description="What the run measures in addition to accuracy: throughput or latency, never both."
    )
    concurrency: int = Field(
        defaults.CONCURRENCY, ge=1, le=4096, description="Maximum number of requests in flight over all servers."
    )
    max_errors: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Up to this many failed requests count as wrong answers, and a note says how many; with more there is no accuracy.",
    )

    @property
    def models(self) -> list[ServedModel]:
        """Return the models to measure, in their order."""
        return [self.model] if self.sweep is None or not self.sweep.models else self.sweep.models

    @property
    def answers_by_setting(self) -> list[int]:
        """Return the number of answers to each question, for each setting of one model."""
        sweep, drawn = self.sweep, self.sampling
        if sweep is None:
            return [drawn.samples]
        if sweep.settings:
            return [s.samples for s in sweep.settings]
        others = max(1, len(set(sweep.thinking_budgets))) * max(1, len(set(sweep.max_pixels)))
        return sorted(set(sweep.samples) if sweep.samples else {drawn.samples}) * others

    @property
    def several_models(self) -> list[str]:
        """Return the folder names of the models in a sweep over models; empty for a job with only one model."""
        return [] if self.sweep is None or not self.sweep.models else _folder_names(self.sweep.models)

    def of_model(self, name: str) -> Self:
        """Return the spec that evaluates only one model of a sweep over models, with all settings of the sweep."""
        assert self.sweep is not None
        model = self.sweep.models[self.several_models.index(name)]
        return self.model_copy(update={"model": model, "sweep": self.sweep.model_copy(update={"models": []})})

    @property
    def server_gpus(self) -> int:
        """Return the number of GPUs of each server, or its default; 0 if the job starts no servers or they run on the CPU."""
        if self.engine in ("transformers", "openai") or self.endpoints:
            return 0
        return 8 if self.gpus_per_server is None else self.gpus_per_server

    @property
    def copies(self) -> int:
        """Return the number of copies of the model behind one server; at least 1, also on a CPU."""
        return max(1, self.server_gpus // self.gpus_per_copy)

    @property
    def gpus_per_copy(self) -> int:
        """Return the number of GPUs over which one copy of the model is spread."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def _describes_servers(self) -> bool:
        """Return whether a field is set that applies only to servers that the job starts."""
        templates = self.pod_templates is not None and self.pod_templates.server is not None
        counts = (self.servers, self.min_servers, self.gpus_per_copy) != (1, 1, 1)
        return counts or bool(self.gpus_per_server or self.gpu_resource or self.expert_parallel or templates)

    changeable = frozenset(CHANGEABLE | {"servers"})
    rules = (
        Rule(
            lambda s: not (s.endpoints and s._describes_servers),
            "!(has(self.endpoints) && size(self.endpoints) > 0) || (self.servers == 1 && self.minServers == 1 "
            "&& self.tensorParallel == 1 && self.pipelineParallel == 1 && !self.expertParallel && !has(self.gpuResource) "
            "&& (!has(self.gpusPerServer) || self.gpusPerServer == 0) "
            "&& !(has(self.podTemplates) && has(self.podTemplates.server)))",
            "with endpoints, the job starts no servers: leave out servers, minServers, gpusPerServer, "
            "gpuResource, tensorParallel, pipelineParallel, expertParallel and podTemplates.server",
            "endpoints",
        ),
        Rule(
            lambda s: s.scoring_file is not None or s.scoring_entry_point == "read_box",
            "has(self.scoringFile) || self.scoringEntryPoint == 'read_box'",
            "scoringEntryPoint names a function of scoringFile, which is absent",
            "scoringEntryPoint",
        ),
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
            "apiKeySecret, headerSecrets and caConfigMap are only for endpoints; servers that the job starts need none of them",
            "endpoints",
        ),
        Rule(
            lambda s: all(re.match(r"https?://[^/@]+(/[^@]*)?$", url) for url in s.endpoints),
            "!has(self.endpoints) || self.endpoints.all(url, url.matches('^https?://[^/@]+(/[^@]*)?$'))",
            "endpoints are URLs, http://HOST:PORT or https://HOST/PATH, without user and password: put keys into apiKeySecret",
            "endpoints",
        ),
        Rule(
            lambda s: s.engine != "openai" or bool(s.endpoints),
            "self.engine != 'openai' || (has(self.endpoints) && size(self.endpoints) > 0)",
            "engine openai is a service that someone else runs: give its URLs in endpoints",
            "engine",
        ),
        Rule(
            lambda s: s.prompt in PROMPTS or "{sent}" in s.prompt,
            f"self.prompt in {list(PROMPTS)} || self.prompt.contains('{{sent}}')",
            f"prompt must be one of {', '.join(PROMPTS)}, or a text with {{sent}} in place of the expression",
            "prompt",
        ),
        Rule(
            lambda s: (
                s.box_remap in (None, "scale")
                or s.scoring in ("egm", "egm-eval", *(("answer-after-thinking",) if s.box_remap == "keep" else ()))
            ),
            "!has(self.boxRemap) || self.boxRemap == 'scale' || self.scoring in ['egm', 'egm-eval'] "
            "|| (self.boxRemap == 'keep' && self.scoring == 'answer-after-thinking')",
            "boxRemap is for scoring egm (keep is also for answer-after-thinking); the other profiles define how they read answers",
            "boxRemap",
        ),
        Rule(
            lambda s: s.scoring_file is None or (s.scoring == "egm" and s.box_remap is None),
            "!has(self.scoringFile) || (self.scoring == 'egm' && !has(self.boxRemap))",
            "scoringFile replaces the profile: leave scoring and boxRemap out",
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
            "sweep.models needs servers that the job starts, because the models are served one after another; leave endpoints out",
            "endpoints",
        ),
        Rule(
            lambda s: not s.model.name or s.model.name in {m.name for m in s.models},
            f"!({_SWEPT} && has(self.model) && (has(self.model.source) || has(self.model.trainJob))) "
            "|| self.sweep.models.exists(m, (has(m.source) && has(self.model.source) && m.source == self.model.source) "
            "|| (has(m.trainJob) && has(self.model.trainJob) && m.trainJob == self.model.trainJob))",
            "model is not one of sweep.models and would not be evaluated; add it to them, or leave it out",
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
