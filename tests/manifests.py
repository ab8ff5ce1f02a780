"""Job manifests for tests of the checks: valid ones, and valid ones with values added, changed or removed."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from grounding.api import KINDS
from grounding.api.crd import schema
from grounding.api.manifest import submodel
from grounding.api.models import GROUP_VERSION

VALID: dict[str, list[dict[str, Any]]] = {
    "GroundingTrainJob": [
        {"preset": "tiny-rl", "data": {"shapes": {}}, "output": "s3://bucket/a"},
        {"preset": "tiny-sft", "data": {"shapes": {"train": 40}}, "output": "pvc://claim/a", "maxAttempts": 2},
        {
            "preset": "egm-8b-rl",
            "model": {"trainJob": "first"},
            "data": {"train": ["/d/a.json"], "validation": ["/d/b.jsonl"], "images": ["s3://bucket/coco"]},
            "output": "pvc://claim/b",
            "resources": {"nodes": 2, "gpusPerNode": 8, "memory": "64Gi", "cpu": 8},
            "hyperparameters": {"batchSize": 256, "rollouts": 8},
            "reward": {"type": "mix", "alpha": 0.25},
        },
        {
            "method": "sft",
            "model": {"source": "hf://owner/name"},
            "data": {"train": ["/d/a.json"], "images": ["/d/images"], "weights": [2]},
            "hyperparameters": {"learningRate": 1e-5, "epochs": 1},
            "tracking": {"wandb": {"baseUrl": "https://wandb.example"}},
            "podTemplates": {"train": {"spec": {"priorityClassName": "high"}}},
            "output": "s3://bucket/c",
        },
    ],
    "GroundingEvalJob": [
        {"model": {"source": "/m"}, "data": {"images": ["/d"]}, "output": "s3://bucket/d"},
        {
            "model": {"trainJob": "first"},
            "engine": "vllm",
            "servers": 2,
            "minServers": 2,
            "gpusPerServer": 4,
            "tensorParallel": 2,
            "data": {"shapes": {}},
            "sampling": {"temperature": 0.5, "samples": 4},
            "output": "pvc://claim/d",
        },
        {
            "model": {"source": "name"},
            "engine": "openai",
            "endpoints": ["https://host/v1"],
            "apiKeySecret": {"name": "key", "key": "k"},
            "data": {"images": ["/d"], "files": ["a.jsonl"]},
            "output": "s3://bucket/e",
        },
        {
            "sweep": {"models": [{"source": "/a"}, {"trainJob": "b"}], "thinkingBudgets": [0, 64]},
            "data": {"shapes": {}},
            "output": "s3://bucket/f",
        },
    ],
}
"""Specs by kind"""

ODD: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 5.0, 0.5, 1e30, 2**40, "", "1", "true", "0.5", "x", "X_Y", "a.b", "ein Text", "ü", "a\nb",
    [], [None], ["a", "a"], ["x.json"], [1], [{}], {}, {"a": "b"}, {"a": None}, {"a": 1}, {"shapes": {}}, "x" * 300,
    "gs://bucket/a", "/data/x", "data/x", "s3://", "s3:///x", "s3://bucket", "s3://Bucket_1/x", "s3://bucket/a/../b", "s3://bucket/a?b",
    "pvc://", "pvc://claim", "pvc://Claim/x", "pvc://claim/a/..", "hf://x", "hf://owner/name", "file:///x", "file://host/x",
    "tiny://", "tiny://nothing", "http://host/x", "https://u:p@host/x", "sglang", "transformers", "openai", "cosine", "linear", "sft", "rl",
    "tiny-sft", "egm-2b-rl", "gpu.example/x", "8Gi", "8 GB", "1k", "relative", "xyxy", "egm-reward", "keep", "resized", "penalty",
]  # fmt: skip
"""Values to which any field may be set"""
FITTING: dict[str, list[Any]] = {
    "scoringEntryPoint": ["read_box", "other", "a b"],
    "scoringFile": ["/pvc/f.py", "f.py", "s3://bucket/f.py"],
    "file": ["f.py", "/f.py", "pvc://claim/f.py"],
    "startDeadlineSeconds": [10, 600],
    "activeDeadlineSeconds": [10, 600],
    "gpusPerServer": [0, 1, 4, 8],
    "endpoints": [["http://host:1"], ["http://a", "https://b/v1"], ["host"]],
    "podTemplate": [{"spec": {"nodeName": None}}, {"spec": {"containers": None}}, {"spec": {"containers": [{"image": "x"}]}}, {"sepc": {}}],
    "podTemplates": [{"server": {"spec": {}}}, {"train": {"spec": {"hostNetwork": "yes"}}}, {"prepare": {}}, {"nobody": {}}],
    "engineOverrides": [["trainer.nothing=1"], ["actor_rollout_ref.rollout.n=4"], ["a b"], ["+data.shuffle=true", "data.shuffle=true"]],
    "keepBest": ["valLoss", "valAccuracy", "valIou/a"],
    "validationSets": [{"a": ["/d/c.jsonl"]}, {"a/b": ["/d/c.jsonl"]}, {"a": []}, {"a": None}],
    "lora": [{}, {"rank": 8, "dropout": 0.1}, {"targets": ["nothing"]}],
    "clipRange": [{"low": 0.1, "high": 0.3}, {"low": "0.1"}],
    "tolerations": [[{"key": "a", "operator": "Exists"}], [{"operator": "Maybe"}], [{"effect": None}]],
    "nodeSelector": [{"a": "b"}, {"a": 1}],
    "settings": [[{"samples": 2}], [{"thinkingBudget": 0}], [{"samples": "2"}]],
    "configMap": [{"name": "a", "key": "b"}, {"name": "A", "key": "b"}, {"name": "a"}],
    "headerSecrets": [[{"header": "X-A", "name": "s", "key": "k"}], [{"header": "X A", "name": "s", "key": "k"}]],
}  # fmt: skip
"""Values that are nearly valid, by field"""


def _fields(model: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every field below a model that can be reached without a list."""
    found = []
    for name, field in model.model_fields.items():
        here = (*path, str(field.alias or name))
        found.append(here)
        inner = submodel(field.annotation)
        if inner is not None:
            found += _fields(inner, here)
    return found


FIELDS = {
    kind: _fields(submodel(model.model_fields["spec"].annotation) or BaseModel)  # the type of `spec` is a model
    for kind, model in KINDS.items()
}


def changed(spec: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a copy of a spec with one value set; `...` removes it. A path through a list changes its first entry."""
    copied = copy.deepcopy(spec)
    at: Any = copied
    for step in path[:-1]:
        inner = at.setdefault(step, {})
        if isinstance(inner, list):
            inner = inner[0] if inner and isinstance(inner[0], dict) else None
        if not isinstance(inner, dict):
            inner = at[step] = {}
        at = inner
    if value is ...:
        at.pop(path[-1], None)
    else:
        at[path[-1]] = value
    return copied


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a manifest: a valid one with up to three fields changed."""
    kind = draw(st.sampled_from(sorted(VALID)))
    spec: Any = draw(st.sampled_from(VALID[kind]))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(FIELDS[kind]))
        near = [*_WORDS.get(path[-1], []), *FITTING.get(path[-1], []), *_TYPED.get(_type(kind, path), [])]
        value = draw(st.sampled_from([..., *near] if near and draw(st.integers(0, 3)) else ODD))
        spec = changed(spec, (*path[:-1], draw(st.sampled_from([path[-1]] * 30 + [path[-1] + "x"]))), value)
    return {"apiVersion": GROUP_VERSION, "kind": kind, "metadata": {"name": "one"}, "spec": spec}


def _words(model: type[BaseModel]) -> dict[str, list[Any]]:
    """Return the allowed values of each field by its name, as the schema of a kind lists them."""
    found: dict[str, list[Any]] = {}
    schema = model.model_json_schema(by_alias=True)
    for part in [schema, *schema["$defs"].values()]:
        for name, field in part.get("properties", {}).items():
            for option in [field, *field.get("anyOf", [])]:
                found.setdefault(name, []).extend(option.get("enum", []))
    return {name: words for name, words in found.items() if words}


def _type(kind: str, path: tuple[str, ...]) -> str:
    at: Any = SCHEMAS[kind]
    for step in path:
        at = at.get("items", at)["properties"][step]
    return str(at.get("type", ""))


SCHEMAS: dict[str, Any] = {name: schema(model)["properties"]["spec"] for name, model in KINDS.items()}
_TYPED: dict[str, list[Any]] = {
    "integer": [0, 1, 2, 4, 7, 8, 64, 600, 50000],
    "number": [0, 0.5, 1, 1e-5, 2.5],
    "boolean": [True, False],
    "string": ["a", "name", "/d/a.json", "s3://bucket/a", "pvc://claim/a"],
    "array": [[], ["/d/c.json"], ["s3://bucket/c"], [1], [64]],
    "object": [{}],
}
"""Strategy for values of the type of a field"""
_WORDS = {name: words for model in KINDS.values() for name, words in _words(model).items()}
