"""The job API: the two kinds of jobs, their presets, and a reader of manifests that reports line numbers."""

from grounding.api.common import ModelRef, Shapes
from grounding.api.eval_spec import EvalData, EvalSpec, Sampling
from grounding.api.hyperparameters import Hyperparameters
from grounding.api.manifest import ManifestError, Problem, check_references, load, load_job, parse, read
from grounding.api.models import KINDS, GroundingEvalJob, GroundingTrainJob, Job
from grounding.api.presets import PRESETS
from grounding.api.resolved import (
    ResolvedEvalJob,
    ResolvedJob,
    ResolvedTrainJob,
    RlHyperparameters,
    RlJob,
    SftHyperparameters,
    SftJob,
    resolve,
)
from grounding.api.train_spec import Reward, TrainData, TrainSpec

__all__ = [
    "KINDS",
    "PRESETS",
    "EvalData",
    "EvalSpec",
    "GroundingEvalJob",
    "GroundingTrainJob",
    "Hyperparameters",
    "Job",
    "ManifestError",
    "ModelRef",
    "Problem",
    "ResolvedEvalJob",
    "ResolvedJob",
    "ResolvedTrainJob",
    "Reward",
    "RlHyperparameters",
    "RlJob",
    "Sampling",
    "SftHyperparameters",
    "SftJob",
    "Shapes",
    "TrainData",
    "TrainSpec",
    "check_references",
    "load",
    "load_job",
    "parse",
    "read",
    "resolve",
]
