"""Each typed hyperparameter of RL has a reader: a line of the pinned verl that reads its key, or code of this project."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from grounding.api import read
from grounding.api.models import GROUP_VERSION
from grounding.api.resolved import RlHyperparameters, RlJob
from grounding.train.rl.overrides import overrides

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


class Reader(NamedTuple):
    """A value that differs from the preset's, the key of verl that it changes, and the file and text of verl that read this key."""

    value: Any
    key: str
    file: str
    text: str


OPTIMIZER, ENGINE = "workers/config/optimizer.py", "workers/engine/fsdp/transformer_impl.py"
TRAINER, LOSSES, CORE = "trainer/ppo/v1/trainer_base.py", "workers/utils/losses.py", "trainer/ppo/core_algos.py"
VLLM = "workers/rollout/vllm_rollout/vllm_async_server.py"
AGENTS, WORKERS = "trainer/ppo/v1/agent_loop_tq.py", "workers/engine_workers.py"
READERS: dict[str, Reader] = {
    "learning_rate": Reader(1e-6, f"{ACTOR}.optim.lr", OPTIMIZER, '"lr": config.lr'),
    "schedule": Reader("constant", f"{ACTOR}.optim.lr_scheduler_type", ENGINE, "optim_config.lr_scheduler_type"),
    "warmup_steps": Reader(7, f"{ACTOR}.optim.lr_warmup_steps", ENGINE, "optim_config.lr_warmup_steps"),
    "weight_decay": Reader(0.5, f"{ACTOR}.optim.weight_decay", OPTIMIZER, '"weight_decay": config.weight_decay'),
    "adam_beta2": Reader(0.95, f"{ACTOR}.optim.betas", OPTIMIZER, "config.betas"),
    "max_grad_norm": Reader(0.25, f"{ACTOR}.optim.clip_grad", ENGINE, "self.optimizer_config.clip_grad"),
    "epochs": Reader(9, "trainer.total_epochs", TRAINER, "self.config.trainer.total_epochs"),
    "max_steps": Reader(9, "trainer.total_training_steps", TRAINER, "self.config.trainer.total_training_steps"),
    "batch_size": Reader(512, "data.train_batch_size", TRAINER, "self.config.data.train_batch_size"),
    "mini_batch_size": Reader(64, f"{ACTOR}.ppo_mini_batch_size", TRAINER, "actor.ppo_mini_batch_size"),
    "rollouts": Reader(8, f"{ROLLOUT}.n", AGENTS, "config.n if not"),
    "prompt_length": Reader(100, "data.max_prompt_length", "utils/dataset/rl_dataset.py", '.get("max_prompt_length"'),
    "response_length": Reader(100, "data.max_response_length", "trainer/config/rollout/rollout.yaml", "data.max_response_length"),
    "temperature": Reader(0.5, f"{ROLLOUT}.temperature", AGENTS, "temperature=config.temperature"),
    "top_p": Reader(0.5, f"{ROLLOUT}.top_p", AGENTS, "top_p=config.top_p"),
    "top_k": Reader(5, f"{ROLLOUT}.top_k", AGENTS, "top_k=config.top_k"),
    "kl_coefficient": Reader(0.5, f"{ACTOR}.kl_loss_coef", LOSSES, "kl_loss * config.kl_loss_coef"),
    "kl_type": Reader("mse", f"{ACTOR}.kl_loss_type", LOSSES, "kl_penalty=config.kl_loss_type"),
    "entropy_coefficient": Reader(0.5, f"{ACTOR}.entropy_coeff", LOSSES, "config.entropy_coeff"),
    "advantage": Reader("rloo", "algorithm.adv_estimator", TRAINER, "self.config.algorithm.adv_estimator"),
    "clip_range": Reader({"high": 0.28}, f"{ACTOR}.clip_ratio_high", CORE, "config.clip_ratio_high if"),
    "loss": Reader("vanilla", f"{ACTOR}.policy_loss.loss_mode", LOSSES, 'config.policy_loss.get("loss_mode"'),
    "loss_aggregation": Reader("token-mean", f"{ACTOR}.loss_agg_mode", LOSSES, "config.loss_agg_mode"),
    "tokens_per_gpu": Reader(30000, f"{ACTOR}.ppo_max_token_len_per_gpu", WORKERS, "self.config.actor.ppo_max_token_len_per_gpu"),
    "gradient_checkpointing": Reader(
        False, "actor_rollout_ref.model.enable_gradient_checkpointing", ENGINE, "model_config.enable_gradient_checkpointing"
    ),
    "offload_parameters": Reader(False, f"{ACTOR}.fsdp_config.param_offload", ENGINE, "self.engine_config.param_offload"),
    "offload_optimizer": Reader(False, f"{ACTOR}.fsdp_config.optimizer_offload", ENGINE, "self.engine_config.optimizer_offload"),
    "rollout_engine": Reader("sglang", f"{ROLLOUT}.name", WORKERS, "get_rollout_class(rollout_config.name"),
    "gpu_memory_utilization": Reader(0.5, f"{ROLLOUT}.gpu_memory_utilization", VLLM, "self.config.gpu_memory_utilization"),
    "tensor_parallel": Reader(2, f"{ROLLOUT}.tensor_model_parallel_size", WORKERS, "rollout_config.tensor_model_parallel_size"),
    "lora": Reader({"rank": 8}, "actor_rollout_ref.model.lora_rank", ENGINE, '"r": self.model_config.lora_rank'),
    "dtype": Reader("float16", f"{ROLLOUT}.dtype", VLLM, "self.config.dtype"),
    "save_every": Reader(3, "trainer.save_freq", TRAINER, "self.config.trainer.save_freq"),
    "validate_every": Reader(3, "trainer.test_freq", TRAINER, "self.config.trainer.test_freq"),
    "validate_before_train": Reader(False, "trainer.val_before_train", TRAINER, 'self.config.trainer.get("val_before_train"'),
}  # fmt: skip
OURS = {
    "keep_checkpoints": ("grounding/train/verl/hooks.py", "keep_checkpoints"),
    "keep_best": ("grounding/train/verl/hooks.py", "keep_best"),
    "freeze_vision": ("grounding/train/verl/patches.py", "freeze_vision"),
    "engine_overrides": ("grounding/train/rl/overrides.py", "h.engine_overrides"),
    "algorithm": ("grounding/api/resolved.py", 'ALGORITHMS.get(given["algorithm"]'),
}
"""Fields that this project reads itself: the file and the text"""
ROOT = Path(__file__).parents[4]


def _job(**hyperparameters: Any) -> RlJob:
    spec = {"preset": "egm-8b-rl", "data": {"prepared": "/rows"}, "hyperparameters": hyperparameters}
    document = {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "a"}, "spec": spec}
    job, found = read(document)
    assert isinstance(job, RlJob), found
    return job


def _keys(job: RlJob) -> dict[str, str]:
    places = {"train_file": Path("/t"), "validation_file": Path("/v"), "out": Path("/o"), "reward_file": Path("/r")}
    arguments = overrides(job, model="/m", cpu=False, **places)
    return dict(argument.lstrip("+").split("=", 1) for argument in arguments)


def test_no_typed_hyperparameter_is_without_a_reader() -> None:
    assert {*READERS, *OURS} == set(RlHyperparameters.model_fields)
    assert not READERS.keys() & OURS.keys()


@pytest.mark.parametrize("field", READERS)
def test_a_field_changes_its_key_and_verl_reads_it(field: str) -> None:
    reader, alias = READERS[field], str(RlHyperparameters.model_fields[field].alias)
    before, after = _keys(_job()), _keys(_job(**{alias: reader.value}))
    assert before.get(reader.key) != after[reader.key]
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")
    source = (Path(spec.origin).parent / reader.file).read_text(encoding="utf-8")
    assert reader.text in source, f"{reader.file} of verl does not read {reader.key}"


@pytest.mark.parametrize("field", OURS)
def test_a_field_of_ours_is_read_by_us(field: str) -> None:
    file, text = OURS[field]
    assert text in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [
        ("grpo", ("grpo", "True", "vanilla", "token-mean")),
        ("gspo", ("grpo", "True", "gspo", "seq-mean-token-mean")),
        ("dr-grpo", ("grpo", "False", "vanilla", "seq-mean-token-sum-norm")),
        ("rloo", ("rloo", "False", "vanilla", "token-mean")),
    ],
)
def test_an_algorithm_sets_its_keys(algorithm: str, keys: tuple[str, ...]) -> None:
    names = ("algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo")
    names += (f"{ACTOR}.policy_loss.loss_mode", f"{ACTOR}.loss_agg_mode")
    found = _keys(_job(algorithm=algorithm))
    assert tuple(found[name] for name in names) == keys


def test_a_field_given_by_itself_wins_over_the_algorithm() -> None:
    found = _keys(_job(algorithm="grpo", lossAggregation="seq-mean-token-sum", clipRange={"high": 0.28}))
    assert found[f"{ACTOR}.loss_agg_mode"] == "seq-mean-token-sum"
    assert (found[f"{ACTOR}.clip_ratio_low"], found[f"{ACTOR}.clip_ratio_high"]) == ("0.2", "0.28")


@pytest.mark.parametrize(
    ("given", "key", "value", "file", "text"),
    [
        ({"alpha": 8}, "actor_rollout_ref.model.lora_alpha", "8", ENGINE, '"lora_alpha": self.model_config.lora_alpha'),
        ({"targets": ["q_proj"]}, "actor_rollout_ref.model.target_modules", "[q_proj]", ENGINE, "self.model_config.target_modules"),
        ({}, "actor_rollout_ref.model.exclude_modules", "'.*[.](visual|vision_tower)[.].*'", ENGINE, "self.model_config.exclude_modules"),
        ({}, "actor_rollout_ref.model.lora.merge", "True", ENGINE, 'self.model_config.lora.get("merge"'),
        ({}, f"{ACTOR}.checkpoint.save_lora_only", "True", "utils/checkpoint/checkpoint_manager.py", "save_lora_only"),
    ],
)  # fmt: skip
def test_every_field_of_lora_is_read(given: dict[str, Any], key: str, value: str, file: str, text: str) -> None:
    assert _keys(_job(lora=given, freezeVision=True))[key] == value
    assert key not in _keys(_job(freezeVision=True))
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")
    assert text in (Path(spec.origin).parent / file).read_text(encoding="utf-8")
