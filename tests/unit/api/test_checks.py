"""Checks of a whole job: each refuses the jobs that it is meant for, with field and line, and no others."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import PRESETS, ManifestError, load, parse, read
from grounding.api.checks import RL, SFT, TRAIN
from grounding.api.families import FAMILIES
from grounding.api.hyperparameters import VISION_LAYERS
from grounding.api.manifest import refuse_placeholders
from grounding.api.models import GROUP_VERSION
from grounding.api.places import placeholders
from grounding.api.resolved import RlHyperparameters
from grounding.api.verl_keys import TYPED, WITHOUT_READER, verl_keys
from grounding.api.verl_values import CHOICES, POSITIVE, SHARES
from grounding.errors import UserError

ROOT = Path(__file__).parents[3]
SFT_DATA = {"train": ["/d/x.json"], "images": ["/d/pictures"]}
RL_DATA = {"prepared": "/d/rows"}
RL_FILES = {"train": ["/d/x.json"], "images": ["/d/pictures"]}


def _document(preset: str, hyperparameters: dict[str, Any], **spec: Any) -> dict[str, Any]:
    data = SFT_DATA if PRESETS[preset]["method"] == "sft" else RL_DATA
    whole = {"preset": preset, "data": data, "hyperparameters": hyperparameters} | spec
    return {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "a"}, "spec": whole}


def _fields(document: dict[str, Any]) -> set[str]:
    return {finding.field for finding in read(document)[1]}


H = "spec.hyperparameters."
REFUSED = [
    ("egm-2b-rl", {}, {}, "spec.model"),
    ("tiny-sft", {}, {"model": {"source": "tiny://internvl", "family": "qwen3.5"}}, "spec.model.source"),
    ("egm-8b-sft", {"batchSize": 100, "microBatchSize": 8}, {}, H + "batchSize"),
    ("egm-8b-sft", {}, {"resources": {"gpusPerNode": 6}}, H + "batchSize"),
    ("egm-8b-sft", {"minPixels": 60000}, {}, H + "minPixels"),
    ("egm-8b-sft", {"maxPixels": 50000}, {"model": {"source": "/m", "family": "internvl"}}, "spec.hyperparameters"),
    ("egm-8b-sft", {}, {"data": {"train": ["/d/x.json"]}}, "spec.data.images"),
    (
        "egm-8b-sft",
        {},
        {"data": SFT_DATA | {"validation": ["/v.json"], "validationSets": {"a": ["/w.json"]}}},
        "spec.data",
    ),
    ("egm-8b-sft", {}, {"data": SFT_DATA | {"weights": [1, 2]}}, "spec.data"),
    ("egm-8b-sft", {}, {"data": SFT_DATA | {"weights": [0]}}, "spec.data.weights[0]"),
    ("egm-8b-rl", {}, {"data": RL_DATA | {"validationSets": {"a": ["/v.jsonl"]}}}, "spec.data"),
    (
        "egm-8b-rl",
        {},
        {"data": RL_FILES | {"validationSets": {"a": ["/v.jsonl"], "b": ["/v.jsonl"]}}},
        "spec.data.validationSets",
    ),
    ("egm-8b-rl", {}, {"data": RL_FILES | {"validationSets": {"a": []}}}, "spec.data.validationSets"),
    ("egm-8b-rl", {}, {"data": RL_FILES | {"validationSets": {"a/b": ["/v.jsonl"]}}}, "spec.data.validationSets"),
    ("egm-8b-rl", {"keepBest": "b"}, {"data": RL_FILES | {"validationSets": {"a": ["/v.jsonl"]}}}, H + "keepBest"),
    (
        "egm-8b-rl",
        {"keepBest": "valIou/b"},
        {"data": RL_FILES | {"validationSets": {"a": ["/v.jsonl"]}}},
        H + "keepBest",
    ),
    ("egm-8b-rl", {"keepBest": "valLoss"}, {"data": RL_FILES | {"validation": ["/v.jsonl"]}}, H + "keepBest"),
    ("egm-8b-rl", {"keepBest": "valIou", "saveEvery": 3}, {}, H + "saveEvery"),
    ("egm-8b-sft", {"keepBest": "valLoss"}, {}, H + "keepBest"),
    ("egm-8b-sft", {}, {"data": SFT_DATA | {"prompt": "amodal"}}, "spec.data"),
    ("egm-8b-rl", {"responseLength": 16384}, {}, H + "responseLength"),
    ("egm-8b-rl", {"promptLength": 25000}, {}, H + "responseLength"),
    ("egm-8b-rl", {"tensorParallel": 3}, {}, H + "tensorParallel"),
    ("egm-8b-rl", {"schedule": "linear"}, {}, H + "schedule"),
    ("egm-8b-rl", {"batchSize": 64, "miniBatchSize": 256}, {}, H + "miniBatchSize"),
    ("egm-8b-rl", {"loss": "gpg", "clipRange": {"high": 0.28}}, {}, H + "clipRange"),
    ("egm-8b-rl", {}, {"resources": {"gpusPerNode": 6}}, "spec.resources.gpusPerNode"),
    ("egm-8b-rl", {}, {"data": RL_DATA | {"train": ["x"], "validation": ["v"]}}, "spec.data"),
    ("egm-8b-rl", {"engineOverrides": ["actor_rollout_ref.actr.clip_ratio=0.1"]}, {}, H + "engineOverrides[0]"),
    ("egm-8b-rl", {"engineOverrides": ["+nonsense.key=1"]}, {}, H + "engineOverrides[0]"),
    ("egm-8b-rl", {"engineOverrides": ["trainer.total_epochs=5"]}, {}, H + "engineOverrides[0]"),
    ("egm-8b-rl", {"engineOverrides": ["++trainer.total_training_steps=5"]}, {}, H + "engineOverrides[0]"),
    ("egm-8b-rl", {"engineOverrides": ["actor_rollout_ref.model.lora_rank=8"]}, {}, H + "engineOverrides[0]"),
    ("egm-8b-rl", {"engineOverrides": ["actor_rollout_ref.model.target_parameters=[x]"]}, {}, H + "engineOverrides[0]"),
    ("egm-8b-rl", {"lora": {"rank": 8, "dropout": 0.1}}, {}, H + "lora.dropout"),
    ("egm-8b-rl", {"rolloutEngine": "sglang"}, {"resources": {"gpusPerNode": 0}}, H + "rolloutEngine"),
    ("egm-8b-rl", {"rolloutEngine": "tgi"}, {}, H + "rolloutEngine"),
    ("egm-8b-rl", {"lora": {"targets": ["q_proj", "fc1"]}}, {}, H + "lora.targets"),
    ("egm-8b-sft", {"lora": {"targets": ["qkv"]}}, {}, H + "lora.targets"),
    ("egm-8b-sft", {"lora": {"targets": ["q_projs"]}}, {}, H + "lora.targets[0]"),
    ("egm-8b-sft", {"lora": {"targets": []}}, {}, H + "lora.targets"),
    ("egm-8b-sft", {"lora": {"r": 8}}, {}, H + "lora.r"),
    ("egm-8b-rl", {"klCoefficient": 0, "klType": "mse"}, {}, H + "klType"),
    ("egm-8b-rl", {"warmupSteps": 500, "maxSteps": 100}, {}, H + "warmupSteps"),
    ("egm-8b-sft", {"warmupSteps": 5, "warmupRatio": 0.1}, {}, H + "warmupRatio"),
    ("egm-8b-sft", {"validateEvery": 10}, {}, H + "validateEvery"),
    ("egm-8b-sft", {"validateBeforeTrain": False}, {}, H + "validateBeforeTrain"),
    ("egm-8b-sft", {"maxLength": 40}, {}, H + "maxLength"),
    ("egm-8b-rl", {}, {"reward": {"type": "sigmoid", "alpha": 0.3}}, "spec.reward.alpha"),
    ("egm-8b-rl", {}, {"data": RL_DATA | {"prompt": "amodal"}}, "spec.data.prompt"),
    ("egm-8b-rl", {}, {"data": {"shapes": {"reasoning": True}}}, "spec.data.shapes.reasoning"),
    ("egm-8b-rl", {}, {"data": {"shapes": {}, "images": ["/x"]}}, "spec.data.images"),
    (
        "egm-8b-rl",
        {},
        {"data": RL_FILES | {"validation": ["/v.jsonl"], "train": ["/x.json", "/x.json"]}},
        "spec.data.train",
    ),
    ("egm-8b-sft", {}, {"data": SFT_DATA | {"train": ["/d/rows.csv"]}}, "spec.data.train"),
    ("egm-8b-sft", {}, {"data": SFT_DATA | {"validation": ["/d/x.json"]}}, "spec.data.validation"),
    ("egm-8b-rl", {}, {"model": {"trainJob": "a"}}, "spec.model.trainJob"),
    ("egm-8b-rl", {}, {"queue": "A b"}, "spec.queue"),
    ("egm-8b-rl", {}, {"schedulerName": "A b"}, "spec.schedulerName"),
    ("egm-8b-rl", {}, {"priorityClassName": "High!"}, "spec.priorityClassName"),
    ("egm-8b-rl", {}, {"resources": {"memory": "64"}}, "spec.resources.memory"),
    ("egm-8b-rl", {}, {"resources": {"memory": "64M"}}, "spec.resources.memory"),
    ("egm-8b-rl", {}, {"resources": {"sharedMemory": "64"}}, "spec.resources.sharedMemory"),
    ("egm-8b-rl", {}, {"tracking": {"wandb": {"baseUrl": "wandb.mine"}}}, "spec.tracking.wandb.baseUrl"),
    *(
        ("egm-8b-rl", {}, {"output": place}, "spec.output")
        for place in ("http://x/y", "s3:///x", "hf://a/b", "s4://b/x")
    ),
    ("egm-8b-rl", {}, {"model": {"source": "https://huggingface.co/a/b"}}, "spec.model.source"),
    ("egm-8b-rl", {}, {"data": {"prepared": "gs://b/rows"}}, "spec.data.prepared"),
    *(
        ("egm-8b-rl", {"engineOverrides": [text]}, {}, H + "engineOverrides[0]")
        for text in (
            "trainer.n_gpus_per_node=4",
            "trainer.default_local_dir=/tmp/x",
            "trainer.resume_mode=auto",
            "trainer.logger=[wandb]",
            "trainer.checkpoint_callback_class=x.Y",
            "trainer.save_freq",
            "~trainer.save_freq",
            "actor_rollout_ref.actor.checkpoint.save_contents=[model]",
            "actor_rollout_ref.actor.strategy=megatron",
            "actor_rollout_ref.actor.clip_ratio=0.1",
            "actor_rollout_ref.rollout.name=sglang",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.model.path=/x",
            "data.max_response_length=8192",
            "data.val_files=/x",
        )
    ),
    *(
        ("egm-8b-rl", {"engineOverrides": [text]}, {}, H + "engineOverrides[0]")
        for text in (
            "actor_rollout_ref.actor.use_dynamic_bsz=False",
            "actor_rollout_ref.actor.use_kl_loss=False",
            "actor_rollout_ref.hybrid_engine=False",
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=False",
            "actor_rollout_ref.rollout.response_length=10",
            "algorithm.use_kl_in_reward=True",
            "data.image_key=pictures",
            "data.val_max_samples=10",
            "ray_kwargs.ray_init.num_cpus=2",
            "trainer.critic_warmup=100000",
            "trainer.device=cpu",
            "trainer.max_actor_ckpt_to_keep=1",
            "trainer.v1.trainer_mode=async",
            # values that verl or Hydra refuses
            "actor_rollout_ref.actor.entropy_coeff=abc",
            "actor_rollout_ref.actor.entropy_coeff=",
            "actor_rollout_ref.actor.optim.betas=0.9",
            "actor_rollout_ref.actor.optim.lr_scheduler_type=linear",
            "actor_rollout_ref.actor.policy_loss.loss_mode=ppo",
            "actor_rollout_ref.actor.ppo_epochs=0",
            "actor_rollout_ref.actor={entropy_coeff: 1}",
            "actor_rollout_ref.rollout.enforce_eager=maybe",
            "actor_rollout_ref.rollout.gpu_memory_utilization=1.5",
            "actor_rollout_ref.rollout.mode=sync",
            "actor_rollout_ref.rollout.temperature=0",
            "algorithm.adv_estimator=gae",
            "data.shuffle=True,False",
            "trainer.save_freq=range(1,3)",
            "trainer.save_freq=-1",
            "trainer.log_val_generations='2",
            "trainer.log_val_generations=[2",
            "trainer.project_name=a)b",
            "trainer.project_name=a#b",
            "trainer=x",
            "+trainer.save_fred=5",
        )
    ),
    (
        "egm-8b-rl",
        {"engineOverrides": ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"]},
        {},
        H + "engineOverrides",
    ),
    ("egm-8b-rl", {"engineOverrides": ["algorithm.filter_groups.enable=True"]}, {}, H + "engineOverrides"),
    (
        "egm-8b-rl",
        {"learningRate": 1e-6, "engineOverrides": ["actor_rollout_ref.actor.optim.lr=1e-5"]},
        {},
        H + "learningRate",
    ),
    ("egm-8b-rl", {"topP": 0.5, "engineOverrides": ["+actor_rollout_ref.rollout.top_p=0.9"]}, {}, H + "topP"),
    ("egm-8b-rl", {"maxGradNorm": 0}, {}, H + "maxGradNorm"),
    ("egm-8b-rl", {"batchSize": "256"}, {}, H + "batchSize"),
    ("egm-8b-rl", {"learningRate": "1e-6"}, {}, H + "learningRate"),
    ("egm-8b-rl", {"freezeVision": "yes"}, {}, H + "freezeVision"),
    ("egm-8b-rl", {"lora": {"rank": "8"}}, {}, H + "lora.rank"),
    ("egm-8b-rl", {}, {"seed": "7"}, "spec.seed"),
    ("egm-8b-rl", {}, {"suspend": "false"}, "spec.suspend"),
    ("egm-8b-rl", {"klType": "full"}, {}, H + "klType"),
    *(
        ("egm-8b-rl", {name: value}, {"resources": {"gpusPerNode": 0}}, H + name)
        for name, value in {
            "gpuMemoryUtilization": 0.5,
            "offloadParameters": True,
            "offloadOptimizer": True,
            "rolloutEngine": "vllm",
            "tensorParallel": 2,
        }.items()
    ),
    ("egm-8b-rl", {}, {"resources": {"gpusPerNode": 0, "gpuResource": "amd.com/gpu"}}, "spec.resources.gpuResource"),
    ("egm-8b-rl", {}, {"resources": {"memory": "64Gi", "sharedMemory": "70G"}}, "spec.resources.sharedMemory"),
    ("egm-8b-rl", {}, {"startDeadlineSeconds": 60, "activeDeadlineSeconds": 60}, "spec.startDeadlineSeconds"),
    ("egm-8b-rl", {}, {"podTemplates": {"prepare": {"spec": {}}}, "output": "s3://b/x"}, "spec.podTemplates.prepare"),
    ("egm-8b-rl", {"engineOverrides": ["trainer.save_freq=1", "+trainer.save_freq=2"]}, {}, H + "engineOverrides[1]"),
    ("egm-8b-rl", {"maxSteps": None}, {}, H + "maxSteps"),
    *(
        ("egm-8b-rl", {name: value}, {}, H + name)
        for name, value in {"microBatchSize": 4, "maxLength": 100, "minPixels": 784, "warmupRatio": 0.5}.items()
    ),
    *(
        ("egm-8b-sft", {name: value}, {}, H + name)
        for name, value in {"rollouts": 4, "klCoefficient": 0.1, "loss": "gspo", "engineOverrides": ["a=1"]}.items()
    ),
]


@pytest.mark.parametrize(("preset", "values", "spec", "field"), REFUSED)
def test_what_cannot_work_or_has_no_effect(
    preset: str, values: dict[str, Any], spec: dict[str, Any], field: str
) -> None:
    assert _fields(_document(preset, values, **spec)) == {field}


def test_every_check_has_a_case() -> None:
    tried = {field.removeprefix("spec.") for *_, field in REFUSED}
    assert {check.field for check in (*TRAIN, *SFT, *RL)} <= tried


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("egm-8b-rl", {"batchSize": 64}),
        ("egm-8b-rl", {"tensorParallel": 4, "engineOverrides": ["actor_rollout_ref.actor.clip_ratio_c=5"]}),
        ("egm-8b-rl", {"engineOverrides": ["+actor_rollout_ref.rollout.engine_kwargs.vllm.seed=1"]}),
        ("egm-8b-sft", {"batchSize": 64, "schedule": "linear"}),
        ("egm-8b-sft", {"lora": {"rank": 8, "dropout": 0.1}}),
        ("egm-8b-sft", {"lora": {"targets": ["qkv"]}, "freezeVision": False}),
        ("egm-8b-rl", {"lora": {}}),
        ("egm-8b-rl", {"keepBest": "valIou"}),
        ("egm-8b-rl", {"keepBest": "valIou/of-prepared"}),
        *(
            ("egm-8b-rl", {"engineOverrides": [text]})
            for text in (
                "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
                "actor_rollout_ref.rollout.enforce_eager=true",
                "actor_rollout_ref.rollout.engine_kwargs.vllm={seed: 1}",
                "+actor_rollout_ref.rollout.enforce_eager=True",
                "actor_rollout_ref.actor.optim.betas=[0.9,0.95]",
                "actor_rollout_ref.actor.clip_ratio_c=5.0",
                "algorithm.adv_estimator=opo",
                "data.seed=null",
                "trainer.project_name='a, b'",
                "trainer.save_freq=5",
                "trainer.test_freq=-1",
                "trainer.validation_data_dir=${trainer.default_local_dir}/v",
            )
        ),
        (
            "egm-8b-rl",
            {"engineOverrides": ["algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=score"]},
        ),
        ("egm-8b-rl", {"learningRate": 1e-6, "engineOverrides": ["trainer.save_freq=5"]}),
        ("tiny-rl", {"tensorParallel": 1, "offloadParameters": False}),
    ],
)
def test_what_works_passes(preset: str, values: dict[str, Any]) -> None:
    assert not _fields(_document(preset, values))


@pytest.mark.parametrize("memory", ["65536Mi", "68719476736", "64Gi", "1.5T", "512Mi", "67108864k"])
@pytest.mark.parametrize("field", ["memory", "sharedMemory"])
def test_enough_memory_passes_in_any_unit(field: str, memory: str) -> None:
    assert not _fields(_document("egm-8b-rl", {}, resources={field: memory}))


def test_every_problem_has_its_line() -> None:
    text = """apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: a}
spec:
  preset: egm-8b-rl
  data: {prepared: /d/p}
  hyperparameters:
    batch_size: 64
    maxLength: 5
    schedule: linear
"""
    with pytest.raises(ManifestError) as caught:
        parse(text, "job.yaml")
    assert {(p.line, p.path.rpartition(".")[2]) for p in caught.value.problems} == {
        (8, "batch_size"),
        (9, "maxLength"),
        (10, "schedule"),
    }
    assert "did you mean batchSize?" in str(caught.value)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 64), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_a_batch_that_passes_is_shared_equally(preset: str, batch: int, gpus: int) -> None:
    job, _ = read(_document(preset, {"batchSize": batch}, resources={"gpusPerNode": gpus}))
    if job is not None:
        plain = job.model_dump(by_alias=True)["spec"]["hyperparameters"]
        share = plain["rollouts"] * batch if "rollouts" in plain else batch
        assert share % max(1, gpus) == 0


@pytest.mark.parametrize("output", ["s3://your-bucket/x", "s3://my-bucket/x", "s3://bucket-name/x"])
def test_a_place_that_was_not_filled_in_is_a_placeholder(output: str) -> None:
    job, found = read(_document("egm-8b-rl", {}, output=output))
    assert job is not None, found
    assert [field for field, _ in placeholders(job)] == ["output"]


def test_an_example_is_valid_and_is_not_started() -> None:
    for file in sorted((ROOT / "jobs").glob("egm*.yaml")):
        jobs = load(file)
        assert [field for job in jobs for field, _ in placeholders(job)] == ["output"] * len(jobs)
        with pytest.raises(UserError, match="placeholder"):
            refuse_placeholders(jobs, file)


def test_the_schema_of_keys_is_that_of_the_pinned_verl() -> None:
    if find_spec("verl") is None:
        pytest.skip("verl is not installed")
    command = [sys.executable, str(ROOT / "hack" / "docs" / "verl_keys.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0
    assert "actor_rollout_ref.actor.optim.clip_grad" in verl_keys()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.actor.freeze_vision_tower=True", "Use freezeVision"),
        ("+actor_rollout_ref.actor.freeze_vision_tower=True", "Use freezeVision"),
        ("critic.optim.lr=1", "no critic"),
        ("custom_reward_function.path=/r.py", "Use reward.file"),
        ("reward.custom_reward_function.name=mine", "Use reward.file"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "Use tokensPerGpu"),
        ("algorithm.kl_ctrl.kl_coef=0.1", "Use klCoefficient"),
    ],
)
def test_a_key_without_effect_is_refused_with_what_to_use(override: str, words: str) -> None:
    (finding,) = read(_document("egm-8b-rl", {"engineOverrides": [override]}))[1]
    assert finding.field == H + "engineOverrides[0]" and "has no effect" in finding.message and words in finding.message


def _of_verl(path: str, pattern: str) -> set[str]:
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")
    return set(re.findall(pattern, (Path(spec.origin).parent / path).read_text(encoding="utf-8")))


def test_the_words_of_a_key_are_those_of_the_pinned_verl() -> None:
    algos = "trainer/ppo/core_algos.py"
    place = "actor_rollout_ref.actor."
    assert set(CHOICES[place + "policy_loss.loss_mode"]) == _of_verl(algos, r'@register_policy_loss\("(\w+)"\)')
    assert {*CHOICES["algorithm.adv_estimator"], "gae"} == _of_verl(algos, r'\n    [A-Z_]+ = "(\w+)"(?=\n)')
    assert set(CHOICES[place + "loss_agg_mode"]) <= _of_verl(algos, r'"([a-z-]+)"')
    assert set(CHOICES[place + "kl_loss_type"]) <= _of_verl(algos, r'"(\w+)"')
    scheduler = _of_verl("workers/config/optimizer.py", r"lr_scheduler_type in \[([^]]*)\]")
    assert scheduler >= {", ".join(f'"{word}"' for word in CHOICES[place + "optim.lr_scheduler_type"])}
    assert {*CHOICES, *POSITIVE, *SHARES, *TYPED} <= verl_keys()
    assert set(TYPED.values()) <= {field.alias for field in RlHyperparameters.model_fields.values()}


HANDED_ON = ("ray_kwargs.", "transfer_queue.", "global_profiler.", "critic.", "reward.reward_model.")
"""Sections whose keys are read by other packages, or that are refused completely"""


def test_keys_without_a_reader_are_those_whose_name_is_nowhere_in_the_pinned_verl() -> None:
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")
    used: set[str] = set()
    for file in Path(spec.origin).parent.rglob("*.py"):
        used.update(re.findall(r"""[."']([A-Za-z_]\w*)""", file.read_text(encoding="utf-8", errors="replace")))
    keys = verl_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    lonely = {key for key in keys - sections if key.rpartition(".")[2] not in used and not key.startswith(HANDED_ON)}
    assert {key for key in lonely if ".turbo_config." not in key and ".model.lora." not in key} == set(WITHOUT_READER)


def test_the_layers_of_every_family_s_vision_tower_are_known() -> None:
    assert VISION_LAYERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("more", "field", "words"),
    [
        ({"endpoints": ["api.x.com/v1"]}, "spec.endpoints", "endpoints are URLs"),
        ({"endpoints": ["ftp://api.x.com/v1"]}, "spec.endpoints", "endpoints are URLs"),
        ({"endpoints": ["https://user:secret@api.x.com/v1"]}, "spec.endpoints", "put keys into apiKeySecret"),
        ({"endpoints": ["https://api.x.com/base/v1", "http://10.0.0.1:30000"]}, "", ""),
        (
            {"data": {"root": "https://huggingface.co/datasets/a/b", "images": ["/i"]}},
            "spec.data.root",
            "this cannot be read",
        ),
        (
            {"data": {"files": ["http://x/y.jsonl"], "images": ["/i"]}},
            "spec.data.files[0]",
            "this cannot be read",
        ),
        ({"data": {"images": ["https://x/coco.tar"]}}, "spec.data.images[0]", "this cannot be read"),
    ],
)
def test_places_and_endpoints_of_an_evaluation(more: dict[str, Any], field: str, words: str) -> None:
    spec = {"model": {"source": "m"}, "data": {"files": ["/d/x.jsonl"], "images": ["/i"]}} | more
    document = {"apiVersion": GROUP_VERSION, "kind": "GroundingEvalJob", "metadata": {"name": "a"}, "spec": spec}
    found = read(document)[1]
    assert [f.field for f in found] == ([field] if field else [])
    assert not words or words in found[0].message
