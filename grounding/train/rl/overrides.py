"""Turn typed hyperparameters into verl 0.9.1's Hydra overrides. Pure.

verl accepts keys that none of its code reads, so every key here was checked against the code that reads it. `docs/training.md`
compares them with the reference's script. The job's `engineOverrides` come last and take precedence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from grounding.api import Reward, RlJob
from grounding.jsontypes import Document
from grounding.models.architecture import UNADAPTED_VISION
from grounding.runtime.flashinfer import NO_FUSED_ALL_REDUCE

_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


def _text(value: Any) -> str:
    """Return a value in a form that Hydra reads back unchanged: quoted if its grammar would split it."""
    if isinstance(value, bool):
        return str(value)
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ",".join(_text(v) for v in value) + "]"
    text = str(value)
    if isinstance(value, str) and not all(c.isalnum() or c in "_./-" for c in text):
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return text


def overrides(
    job: RlJob,
    *,
    train_file: Path,
    validation_file: Path,
    model: str,
    out: Path,
    reward_file: Path,
    own_reward: Path | None = None,
    cpu: bool,
    resume_from: Path | None = None,
    validate: Literal["", "first", "only"] = "",
    nodes: int = 1,
    attention: str | None = None,
    cpu_slots: int = 40,
) -> list[str]:
    """Return the arguments of `python -m verl.trainer.main_ppo` for a resolved RL job. Paths must be the same on every node.

    `own_reward`: the file of `spec.reward.file`. `validate`: the validation that a resumed run must repeat, before training or as its only
    task. `nodes`: number of Ray nodes; if more than one, Ray already runs at `$RAY_ADDRESS`. `attention`: transformers' name of the
    trained model's attention, or None for verl's FlashAttention 2. `cpu_slots`: logical CPUs of a Ray that verl itself starts on a machine
    with GPUs.
    """
    spec, h = job.spec, job.spec.hyperparameters
    reward = spec.reward
    batch = h.batch_size
    gpus = 1 if cpu else spec.resources.gpus_per_node
    prompt, response = h.prompt_length, h.response_length
    tokens = h.tokens_per_gpu
    keys: Document = {
        "algorithm.adv_estimator": "rloo" if h.advantage == "rloo" else "grpo",
        "algorithm.norm_adv_by_std_in_grpo": h.advantage == "grpo",
        "algorithm.use_kl_in_reward": False,
        "data.train_files": str(train_file),
        "data.val_files": str(validation_file),
        "data.train_batch_size": batch,
        "data.max_prompt_length": prompt,
        "data.max_response_length": response,
        # the filter reads every picture once before the first step; on the CPU path, pictures have one known size
        "data.filter_overlong_prompts": not cpu,
        "data.filter_overlong_prompts_workers": 16,
        "data.truncation": "error",
        "data.image_key": "images",
        "data.image_patch_size": spec.model.family_facts.patch,
        "data.trust_remote_code": False,
        "data.seed": spec.seed,
        "reward.custom_reward_function.path": str(reward_file),
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.reward_type": reward.type,
        "+reward.custom_reward_function.reward_kwargs.alpha": reward.alpha,
        "+reward.custom_reward_function.reward_kwargs.threshold": reward.threshold,
        **(
            {"+reward.custom_reward_function.reward_kwargs.boxes": "resized"}
            if spec.model.family_facts.boxes == "resized"
            else {}
        ),
        **_own(spec.reward, own_reward),
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.model.enable_gradient_checkpointing": h.gradient_checkpointing,
        f"{_ACTOR}.optim.lr": h.learning_rate,
        f"{_ACTOR}.optim.lr_scheduler_type": h.schedule,
        f"{_ACTOR}.optim.lr_warmup_steps": h.warmup_steps,
        f"{_ACTOR}.optim.weight_decay": h.weight_decay,
        f"{_ACTOR}.optim.betas": [0.9, h.adam_beta2],
        f"{_ACTOR}.use_dynamic_bsz": True,
        f"{_ACTOR}.ppo_max_token_len_per_gpu": tokens,
        f"{_ACTOR}.ppo_mini_batch_size": h.mini_batch_size,
        f"{_ACTOR}.use_kl_loss": h.kl_coefficient > 0,
        f"{_ACTOR}.kl_loss_coef": h.kl_coefficient,
        f"{_ACTOR}.kl_loss_type": h.kl_type,
        f"{_ACTOR}.entropy_coeff": h.entropy_coefficient,
        f"{_ACTOR}.policy_loss.loss_mode": h.loss,
        f"{_ACTOR}.clip_ratio_low": h.clip_range.low,
        f"{_ACTOR}.clip_ratio_high": h.clip_range.high,
        # the reference's copy of verl uses this value for GSPO; verl 0.9 has a key, whose default would weight by length
        f"{_ACTOR}.loss_agg_mode": h.loss_aggregation,
        f"{_ACTOR}.optim.clip_grad": h.max_grad_norm,
        f"{_ACTOR}.fsdp_config.fsdp_size": -1,
        f"{_ACTOR}.fsdp_config.param_offload": h.offload_parameters and not cpu,
        f"{_ACTOR}.fsdp_config.optimizer_offload": h.offload_optimizer and not cpu,
        f"{_REF}.fsdp_config.param_offload": h.offload_parameters and not cpu,
        f"{_ROLLOUT}.name": "hf" if cpu else h.rollout_engine,
        f"{_ROLLOUT}.tensor_model_parallel_size": h.tensor_parallel,
        f"{_ROLLOUT}.n": h.rollouts,
        f"{_ROLLOUT}.temperature": h.temperature,
        f"{_ROLLOUT}.top_p": h.top_p,
        f"{_ROLLOUT}.top_k": h.top_k,
        f"{_ROLLOUT}.gpu_memory_utilization": h.gpu_memory_utilization,
        # without a limit, verl uses the model's 262,144 positions
        f"{_ROLLOUT}.max_model_len": prompt + response,
        f"{_ROLLOUT}.enable_chunked_prefill": True,
        f"{_ROLLOUT}.free_cache_engine": True,
        f"{_ROLLOUT}.val_kwargs.n": 1,
        f"{_ROLLOUT}.val_kwargs.do_sample": False,
        "trainer.project_name": "egm",
        "trainer.experiment_name": job.metadata.name,
        # progress lines and tracking come from this file, because verl's other loggers end a run if their server disappears
        "trainer.logger": ["console", "file"],
        "trainer.n_gpus_per_node": gpus,
        "trainer.nnodes": nodes,
        "trainer.save_freq": h.save_every,
        "trainer.test_freq": h.validate_every,
        "trainer.val_before_train": bool(validate) or (h.validate_before_train and resume_from is None),
        "trainer.total_epochs": h.epochs,
        "trainer.default_local_dir": str(out / "checkpoints"),
        "trainer.rollout_data_dir": str(out / "rollouts"),
        "trainer.validation_data_dir": str(out / "validation"),
        "trainer.checkpoint_callback_class": "grounding.train.verl.callback.MarkComplete",
        "trainer.resume_mode": "resume_path" if resume_from else "disable",
    }
    if batch == h.mini_batch_size and not any("rollout_correction" in override for override in h.engine_overrides):
        # verl would compare the rollout's log-probabilities with the actor's, for which it would process all answers again (`verl/on_policy.py`)
        keys[f"{_ROLLOUT}.calculate_log_probs"] = False
    # then FSDP must not flatten frozen and trained weights into one, also not in the reference model
    if h.freeze_vision:
        keys |= {f"{part}.fsdp_config.use_orig_params": True for part in (_ACTOR, _REF)}
    if not cpu and nodes * gpus <= 1:
        # on one GPU, FSDP 1 does not shard, and weights that it moves to the CPU also stay on the GPU
        keys |= {f"{part}.strategy": "fsdp2" for part in (_ACTOR, _REF)}
    if h.max_steps:
        keys["trainer.total_training_steps"] = h.max_steps
    if validate == "only":
        keys["trainer.val_only"] = True
    if resume_from:
        keys["trainer.resume_from_path"] = str(resume_from)
    keys |= _lora(job)
    dtype = "float32" if cpu else h.dtype
    if dtype in _MIXED:
        keys |= {f"+{part}.fsdp_config.mixed_precision.param_dtype": _MIXED[dtype] for part in (_ACTOR, _REF)}
    if attention:
        keys["+actor_rollout_ref.model.override_config.attn_implementation"] = attention
    if nodes == 1:
        # verl waits forever without a message if Ray has fewer cores than verl has actors. Each slot is an idle process of Ray, so use few
        # of them without a GPU
        slots = 24 if cpu else cpu_slots
        keys |= {"ray_kwargs.ray_init.num_cpus": slots, "+ray_kwargs.ray_init.include_dashboard": False}
    if cpu:
        keys |= _CPU
        if h.lora is None:  # a tiny model is exported with every checkpoint; a large one is merged once at the end
            keys[f"{_ACTOR}.checkpoint.save_contents"] = ["model", "optimizer", "extra", "hf_model"]
        if nodes == 1:
            keys["+ray_kwargs.ray_init.num_gpus"] = 1
    else:
        keys[f"{_ROLLOUT}.dtype"] = dtype
        keys[f"{_ROLLOUT}.max_num_seqs"] = (
            1024  # as in the reference; with verl 0.9's default of 256, further answers would wait
        )
        if h.rollout_engine == "vllm" and h.tensor_parallel > 1:
            keys[f"+{_ROLLOUT}.engine_kwargs.vllm.compilation_config"] = NO_FUSED_ALL_REDUCE
    return [f"{key}={_text(value)}" for key, value in keys.items()] + [_added(text) for text in h.engine_overrides]


def _added(override: str) -> str:
    """Return one of `engineOverrides` with ++ instead of +, because Hydra refuses + for an existing key, which this list may have added."""
    return f"+{override}" if override.startswith("+") and not override.startswith("++") else override


def _own(reward: Reward, file: Path | None) -> dict[str, str]:
    """Return the keys that pass the user's reward function to ours."""
    if file is None:
        return {}
    place = "+reward.custom_reward_function.reward_kwargs"
    return {f"{place}.own_file": str(file), f"{place}.own_name": reward.entry_point}


def _lora(job: RlJob) -> Document:
    """Return the keys for LoRA: FSDP 2, which keeps trained and frozen weights separate, and merged weights for the rollout engine."""
    h = job.spec.hyperparameters
    if h.lora is None:
        return {}
    model = "actor_rollout_ref.model"
    keys: Document = {
        f"{model}.lora_rank": h.lora.rank,
        f"{model}.lora_alpha": h.lora.alpha,
        f"{model}.target_modules": list(h.lora.targets),
        f"{model}.lora.merge": True,
        f"{_ACTOR}.strategy": "fsdp2",
        f"{_REF}.strategy": "fsdp2",
        f"+{_ACTOR}.checkpoint.save_lora_only": True,
    }
    return keys | ({f"{model}.exclude_modules": UNADAPTED_VISION} if h.freeze_vision else {})


# our name -> verl's, for precisions other than verl's default; without this, only the rollouts would change their precision
_MIXED = {"float32": "fp32", "float16": "fp16"}

# additional keys for the CPU path; see `verl/cpu.py`
_CPU: Document = {
    "trainer.device": "cpu",
    "data.dataloader_num_workers": 0,
    "reward.num_workers": 1,
    f"{_ACTOR}.strategy": "fsdp2",
    f"{_REF}.strategy": "fsdp2",
    f"{_ACTOR}.use_torch_compile": False,
    f"{_ACTOR}.fsdp_config.use_torch_compile": False,
    f"{_REF}.fsdp_config.use_torch_compile": False,
    f"{_ROLLOUT}.load_format": "auto",
    f"{_ROLLOUT}.full_determinism": True,
    f"{_ROLLOUT}.agent.num_workers": 1,
    f"{_ROLLOUT}.agent.default_agent_loop": "numbered_single_turn_agent",
    "trainer.v1.sampler.custom_sampler.path": "pkg://grounding.train.verl.cpu",
    "trainer.v1.sampler.custom_sampler.name": "OrderedReplayBuffer",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
}
