"""Resolved jobs: each default is applied once, some values depend on others, and resolving again changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import PRESETS, RlJob, SftJob, read, resolve
from grounding.api.explain import explain
from grounding.api.models import GROUP_VERSION
from grounding.api.resolved import HYPERPARAMETERS, ResolvedTrainJob, defaults, method_fields


def _document(hyperparameters: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"data": {"shapes": {"seed": 7}}}
    if not PRESETS.get(spec.get("preset", ""), {"model": {"source": ""}})["model"]:
        data["model"] = {"source": "/m"}  # the preset names no model
    return {
        "apiVersion": GROUP_VERSION,
        "kind": "GroundingTrainJob",
        "metadata": {"name": "a"},
        "spec": data | spec | ({"hyperparameters": hyperparameters} if hyperparameters else {}),
    }


def _resolved(hyperparameters: dict[str, Any] | None = None, **spec: Any) -> ResolvedTrainJob:
    job, found = read(_document(hyperparameters, **spec))
    assert isinstance(job, ResolvedTrainJob), found
    return job


def _values(job: ResolvedTrainJob) -> dict[str, Any]:
    return job.spec.hyperparameters.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(("method", "kind"), [("sft", SftJob), ("rl", RlJob)])
def test_a_job_without_a_preset_has_the_table_of_its_method(method: str, kind: type) -> None:
    job = _resolved(method=method, model={"source": "/m"})
    assert type(job) is kind
    values = _values(job)
    assert {k: values[k] for k in defaults(method)} == defaults(method)
    decided_in_the_run = {"microBatchSize", "tokensPerGpu", "gradientCheckpointing"} if method == "sft" else set()
    unset = {"keepBest", "lora", "maxSteps", "warmupSteps", "minPixels", "maxPixels"} | decided_in_the_run
    assert {k for k, v in values.items() if v is None} <= unset


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_has_only_fields_of_its_method_and_names_no_default_twice(preset: str) -> None:
    method, own = PRESETS[preset]["method"], PRESETS[preset]["hyperparameters"]
    assert set(own) <= method_fields(method)
    values = _values(_resolved(preset=preset))
    assert {k: values[k] for k in own} == own


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("egm-8b-rl", {"batchSize": 64}, {"miniBatchSize": 64}),
        ("egm-8b-rl", {"batchSize": 64, "miniBatchSize": 32}, {"miniBatchSize": 32}),
        ("egm-8b-rl", {"miniBatchSize": 128}, {"batchSize": 256}),
        ("egm-8b-sft", {"batchSize": 32}, {"microBatchSize": None, "tokensPerGpu": None}),
        ("egm-4b-sft", {"microBatchSize": 4}, {"microBatchSize": 4, "gradientCheckpointing": None}),
        ("tiny-sft", {"tokensPerGpu": 512}, {"microBatchSize": None, "tokensPerGpu": 512}),
        ("tiny-rl", {"epochs": 2}, {"maxSteps": None}),
        ("tiny-rl", {}, {"maxSteps": 50}),
        ("tiny-sft", {"warmupRatio": 0.1}, {"warmupSteps": None}),
        ("egm-8b-rl", {}, {"freezeVision": False}),
        ("egm-internvl-rl", {}, {"freezeVision": True}),
        ("egm-8b-sft", {}, {"keepCheckpoints": 5}),
    ],
)
def test_values_that_follow_others(preset: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
    values = _values(_resolved(given, preset=preset))
    assert {k: values[k] for k in expected} == expected


@given(
    st.sampled_from(sorted(PRESETS)),
    st.fixed_dictionaries({}, optional={"batchSize": st.integers(1, 4096), "epochs": st.integers(1, 9)}),
)
@settings(max_examples=60, deadline=None)
def test_a_resolved_job_reads_back_as_itself(preset: str, given: dict[str, Any]) -> None:
    job = _resolved(given, preset=preset, resources={"gpusPerNode": 0})
    again, found = read(job.model_dump(mode="json", by_alias=True, exclude_none=True))
    assert not found
    assert isinstance(again, ResolvedTrainJob)
    assert _values(again) == _values(job) | {
        k: _values(again)[k] for k in ("minPixels", "maxPixels") if k in _values(job)
    }
    assert resolve(job) is job


def test_explain_shows_the_default_of_each_method_and_preset() -> None:
    text = explain("gtj.spec.hyperparameters.batchSize")
    assert "default of sft: 128 (tiny-sft 16)" in text
    assert "default of rl: 256 (tiny-rl 8)" in text
    for method, model in HYPERPARAMETERS.items():
        for field in model.model_fields.values():
            if field.alias != "engineOverrides":
                assert f"default of {method}: " in explain(f"gtj.spec.hyperparameters.{field.alias}")
