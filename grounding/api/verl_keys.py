"""Check the keys in overrides of verl's configuration (`engineOverrides`): whether the pinned verl has a key, and whether a job may set it.
Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from grounding.api.verl_values import value_problem

KEYS = Path(__file__).with_name("verl_keys.txt")
"""File with every key of the pinned verl's configuration and the kind of its value; `hack/docs/verl_keys.py` writes it"""
_STEPS = {
    "trainer.total_training_steps": "maxSteps",
    "trainer.total_epochs": "epochs",
    "data.train_batch_size": "batchSize",
    "data.gen_batch_size": "batchSize",
    "data.train_max_samples": "maxSteps",
    "trainer.val_only": "a GroundingEvalJob",
}
"""Keys that change the number of steps -> what to use instead"""
WITHOUT_READER = {
    "actor_rollout_ref.actor.freeze_vision_tower": "Use freezeVision instead.",
    "actor_rollout_ref.nccl_timeout": "Leave it out.",
    "actor_rollout_ref.rollout.multi_stage_wake_up": "Leave it out.",
    "actor_rollout_ref.rollout.multi_turn.num_repeat_rollouts": "Use rollouts instead.",
    "actor_rollout_ref.rollout.over_sample_rate": "Leave it out.",
    "data.return_raw_input_ids": "Leave it out.",
}
"""Keys that the pinned verl has but never reads -> what to do. A test compares them with verl's source."""
_IGNORED = {
    "critic": "the advantages of this project's algorithms need no critic. Leave it out.",
    "custom_reward_function": "verl 0.9 reads reward.custom_reward_function. Use reward.file of the job instead.",
    "reward_model": "verl 0.9 reads reward.reward_model. Leave it out.",
    "reward.custom_reward_function": "the job's own reward would be lost. Use reward.file of the job instead.",
    "data.reward_fn_key": "the reward always reads data_source. Leave it out.",
    "algorithm.kl_ctrl": "it is read only with use_kl_in_reward. Use klCoefficient instead.",
    "actor_rollout_ref.actor.grad_clip": "verl 0.9 reads optim.clip_grad. Use maxGradNorm instead.",
    "actor_rollout_ref.actor.clip_ratio": "the lower and the upper bound are set separately. Use clipRange instead.",
    "actor_rollout_ref.actor.ppo_micro_batch_size": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": "batches are dynamic. Use tokensPerGpu instead.",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "batches are dynamic. Use tokensPerGpu instead.",
}
"""Keys and sections that verl reads but that have no effect in a job of this project -> why, and what to do"""
_OWN = {
    "actor_rollout_ref.actor.checkpoint": "the job resumes and exports what it saves. Leave it out.",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "Use tokensPerGpu instead.",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "Use miniBatchSize instead.",
    "actor_rollout_ref.model.path": "Use model.source instead.",
    "actor_rollout_ref.rollout.max_model_len": "It follows from promptLength and responseLength.",
    "actor_rollout_ref.hybrid_engine": "the actor and the rollouts share the GPUs. Leave it out.",
    "actor_rollout_ref.actor.use_dynamic_bsz": "tokensPerGpu determines the batches. Leave it out.",
    "actor_rollout_ref.actor.use_kl_loss": "Use klCoefficient instead.",
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": "tokensPerGpu determines the batches. Leave it out.",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": "tokensPerGpu determines the batches. Leave it out.",
    "actor_rollout_ref.rollout.n": "Use rollouts instead.",
    "actor_rollout_ref.rollout.prompt_length": "Use promptLength instead.",
    "actor_rollout_ref.rollout.response_length": "Use responseLength instead.",
    "algorithm.use_kl_in_reward": "Use klCoefficient instead.",
    "data.image_key": "the rows are prepared with it. Leave it out.",
    "data.prompt_key": "the rows are prepared with it. Leave it out.",
    "data.val_max_samples": "every row of a validation counts. List fewer files in data.validation.",
    "ray_kwargs.ray_init.address": "the job starts Ray itself. Leave it out.",
    "ray_kwargs.ray_init.num_cpus": "verl waits forever if Ray has fewer CPUs than verl needs. Leave it out.",
    "actor_rollout_ref.rollout.name": "Use rolloutEngine instead.",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "Use tensorParallel instead.",
    "data.max_prompt_length": "Use promptLength instead.",
    "data.max_response_length": "Use responseLength instead.",
    "data.train_files": "Use data.train or data.prepared instead.",
    "data.val_files": "Use data.validation or data.prepared instead.",
    "trainer.checkpoint_callback_class": "it marks checkpoints as complete. Leave it out.",
    "trainer.critic_warmup": "there is no critic, and until then the model would not be trained. Use warmupSteps instead.",
    "trainer.del_local_ckpt_after_load": "the job keeps its checkpoints. Use keepCheckpoints instead.",
    "trainer.device": "it follows from resources.gpusPerNode. Leave it out.",
    "trainer.max_actor_ckpt_to_keep": "Use keepCheckpoints instead.",
    "trainer.default_local_dir": "the job looks for its checkpoints in its own folder. Leave it out.",
    "trainer.logger": "progress lines are read from the file logger. Use tracking instead.",
    "trainer.n_gpus_per_node": "Use resources.gpusPerNode instead.",
    "trainer.nnodes": "Use resources.nodes instead.",
    "trainer.resume_from_path": "the job finds its newest checkpoint itself. Leave it out.",
    "trainer.resume_mode": "the job finds its newest checkpoint itself. Leave it out.",
    "trainer.v1.trainer_mode": "a step starts when the previous one has ended. Leave it out.",
    "transfer_queue.enable": "verl's trainer passes its batches through it. Leave it out.",
    "trainer.val_before_train": "Use validateBeforeTrain instead.",
}
"""Keys and sections that the job sets itself and depends on -> what to do"""
TYPED: Mapping[str, str] = {
    "actor_rollout_ref.actor.clip_ratio_high": "clipRange",
    "actor_rollout_ref.actor.clip_ratio_low": "clipRange",
    "actor_rollout_ref.actor.entropy_coeff": "entropyCoefficient",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "offloadOptimizer",
    "actor_rollout_ref.actor.fsdp_config.param_offload": "offloadParameters",
    "actor_rollout_ref.actor.kl_loss_coef": "klCoefficient",
    "actor_rollout_ref.actor.kl_loss_type": "klType",
    "actor_rollout_ref.actor.loss_agg_mode": "lossAggregation",
    "actor_rollout_ref.actor.optim.betas": "adamBeta2",
    "actor_rollout_ref.actor.optim.clip_grad": "maxGradNorm",
    "actor_rollout_ref.actor.optim.lr": "learningRate",
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "schedule",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "warmupSteps",
    "actor_rollout_ref.actor.optim.weight_decay": "weightDecay",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "loss",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "gradientCheckpointing",
    "actor_rollout_ref.rollout.dtype": "dtype",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "gpuMemoryUtilization",
    "actor_rollout_ref.rollout.temperature": "temperature",
    "actor_rollout_ref.rollout.top_k": "topK",
    "actor_rollout_ref.rollout.top_p": "topP",
    "algorithm.adv_estimator": "advantage",
}
"""Keys of verl that a hyperparameter sets and `engineOverrides` may set instead"""
_ENGINES = ("fsdp", "fsdp2")
_LORA = (
    "actor_rollout_ref.model.lora",
    "actor_rollout_ref.model.target_",
    "actor_rollout_ref.model.exclude_modules",
    "critic.model.lora",
)


@lru_cache(maxsize=1)
def verl_kinds() -> Mapping[str, str]:
    """Return the keys of the pinned verl's configuration, each with the kind of its value."""
    return dict(line.split() for line in KEYS.read_text(encoding="utf-8").splitlines())


def verl_keys() -> frozenset[str]:
    """Return the keys of the pinned verl's configuration."""
    return frozenset(verl_kinds())


def override_problem(text: str, *, cpu: bool = False) -> str | None:
    """Return the problem of an entry of `engineOverrides`; None if it is valid. `cpu` says that the job has no GPUs, so ranks may be set by
    hand.
    """
    name, equals, value = text.partition("=")
    key = name.lstrip("+~")
    if name.startswith("~"):
        return f"{key} would be removed, and verl would fail when it reads the key. Give it another value instead."
    if not equals:
        return f"{key} has no value. Write {key}=VALUE."
    for place, why in _OWN.items():
        by_hand = cpu and place in ("trainer.n_gpus_per_node", "actor_rollout_ref.actor.checkpoint")
        if (key == place or key.startswith(f"{place}.")) and not by_hand:
            return f"{key} is set by the job itself. {why[0].upper()}{why[1:]}"
    if key.endswith(".strategy") and value not in _ENGINES:
        return f"{value} is not installed with this project. Choose {' or '.join(_ENGINES)}."
    if key in _STEPS:
        return f"{key} changes the number of steps, which the job counts itself. Use {_STEPS[key]} instead."
    if key.startswith(_LORA):
        return f"{key} sets LoRA without the job's knowledge, so the untrained model would be exported. Use hyperparameters.lora instead."
    if key in WITHOUT_READER:
        return f"{key} has no effect: verl never reads it. {WITHOUT_READER[key]}"
    for place, why in _IGNORED.items():
        if key == place or key.startswith(f"{place}."):
            return f"{key} has no effect: {why}"
    known = verl_kinds()
    if (problem := value_problem(key, value, known.get(key, "any"))) is not None:
        return problem
    if key in known:
        return None
    near = difflib.get_close_matches(key, known, 1, 0.8)
    parent = key.rpartition(".")[0]
    typo = bool(near) and known.get(parent) == "section" and near[0].rpartition(".")[0] == parent
    if name.startswith("+") and key.partition(".")[0] in known and not (typo and _alike(key, near[0])):
        return None
    hint = f" Did you mean {near[0]}?" if near else " To add a key on purpose, write + before it."
    return f"verl has no key {key}.{hint}"


def _alike(key: str, known: str) -> bool:
    """Return whether an added key is probably a typo, because its last part is nearly the same as that of a known key."""
    one, other = key.rpartition(".")[2], known.rpartition(".")[2]
    return difflib.SequenceMatcher(None, one, other).ratio() >= _SLIP


_SLIP = 0.85
