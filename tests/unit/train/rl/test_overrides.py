"""The overrides that verl gets, and the metrics that it returns."""

import json
from pathlib import Path

import pytest
from rl_jobs import rl_job

from grounding.errors import UserError
from grounding.train.rl import run as rl
from grounding.train.rl.overrides import overrides


def _job(preset: str, **hyperparameters: str):
    return rl_job(preset, saveEvery=7, **hyperparameters)


def _made(job, cpu: bool = False, resume: Path | None = None, **more) -> dict[str, str]:
    made = overrides(
        job,
        train_file=Path("/d/train.parquet"),
        validation_file=Path("/d/val, 2.parquet"),
        model="/m",
        out=Path("/o"),
        reward_file=Path("/r.py"),
        cpu=cpu,
        resume_from=resume,
        **more,
    )
    return dict(line.split("=", 1) for line in made)


def test_the_reference_s_figures_reach_verl() -> None:
    made = _made(_job("egm-8b-rl"))
    expected = {
        "data.train_batch_size": "256",
        "data.max_prompt_length": "16384",
        "data.max_response_length": "2048",
        "data.image_patch_size": "16",
        "actor_rollout_ref.rollout.n": "16",
        "actor_rollout_ref.rollout.temperature": "0.7",
        "actor_rollout_ref.rollout.top_k": "50",
        "actor_rollout_ref.rollout.max_model_len": "18432",
        "actor_rollout_ref.actor.optim.lr": "3e-06",
        "actor_rollout_ref.actor.optim.lr_warmup_steps": "30",
        "actor_rollout_ref.actor.use_kl_loss": "True",
        "actor_rollout_ref.actor.kl_loss_coef": "0.005",
        "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean",
        "actor_rollout_ref.actor.policy_loss.loss_mode": "gspo",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "25600",
        "reward.custom_reward_function.path": "/r.py",
        "+reward.custom_reward_function.reward_kwargs.alpha": "0.25",
        "+reward.custom_reward_function.reward_kwargs.threshold": "0.75",
        "trainer.save_freq": "7",
        "trainer.n_gpus_per_node": "8",
        "trainer.resume_mode": "disable",
    }
    assert {k: made.get(k) for k in expected} == expected
    assert made["data.val_files"] == "'/d/val, 2.parquet'"
    assert not any("custom_reward_function" in k and not k.lstrip("+").startswith("reward.") for k in made)


def test_internvl_differs_where_the_reference_does() -> None:
    made = _made(_job("egm-internvl-rl"))
    assert made["actor_rollout_ref.actor.use_kl_loss"] == "False"
    assert made["actor_rollout_ref.actor.entropy_coeff"] == "0.01"
    assert made["actor_rollout_ref.rollout.max_model_len"] == str(28672 + 4096)
    assert made["actor_rollout_ref.actor.fsdp_config.param_offload"] == "False"


def test_resume_names_the_checkpoint_and_does_not_validate_again() -> None:
    made = _made(_job("egm-8b-rl"), resume=Path("/o/checkpoints/global_step_10"))
    assert made["trainer.resume_mode"] == "resume_path"
    assert made["trainer.resume_from_path"] == "/o/checkpoints/global_step_10"
    assert made["trainer.val_before_train"] == "False"


def test_a_validation_that_a_run_died_in_is_made_up_for() -> None:
    checkpoint = Path("/o/checkpoints/global_step_10")
    first, only = (_made(_job("egm-8b-rl"), resume=checkpoint, validate=how) for how in ("first", "only"))
    assert first["trainer.val_before_train"] == only["trainer.val_before_train"] == "True"
    assert "trainer.val_only" not in first and only["trainer.val_only"] == "True"


def test_engine_overrides_come_last() -> None:
    job = _job("egm-8b-rl", engineOverrides="[trainer.save_freq=99]")
    made = overrides(
        job,
        train_file=Path("a"),
        validation_file=Path("b"),
        model="m",
        out=Path("o"),
        reward_file=Path("r"),
        cpu=False,
    )
    assert made[-1] == "trainer.save_freq=99"


def test_rollouts_log_probabilities_are_asked_for_if_something_reads_them() -> None:
    key = "actor_rollout_ref.rollout.calculate_log_probs"
    assert _made(_job("egm-8b-rl"))[key] == "False"
    assert key not in _made(_job("egm-8b-rl", miniBatchSize=128))
    assert key not in _made(_job("egm-8b-rl", engineOverrides="[algorithm.rollout_correction.bypass_mode=True]"))
    assert _made(_job("egm-8b-rl", engineOverrides=f"[{key}=True]"))[key] == "True"


@pytest.mark.parametrize("cpu", [False, True])
def test_no_key_stands_twice(cpu: bool) -> None:
    made = overrides(
        _job("tiny-rl"),
        train_file=Path("a"),
        validation_file=Path("b"),
        model="m",
        out=Path("o"),
        reward_file=Path("r"),
        cpu=cpu,
    )
    keys = [line.split("=", 1)[0].lstrip("+") for line in made]
    assert len(keys) == len(set(keys))


ATTENTION = "+actor_rollout_ref.model.override_config.attn_implementation"
MIXED = "+actor_rollout_ref.{}.fsdp_config.mixed_precision.param_dtype"


def test_without_flash_attention_another_is_named() -> None:
    assert ATTENTION not in _made(_job("egm-8b-rl"))
    assert _made(_job("egm-8b-rl"), attention="sdpa")[ATTENTION] == "sdpa"


def test_a_gpu_without_flash_attention_computes_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, cpu, expected in (
        (True, False, None),
        (False, False, "packed_rows"),
        (False, True, "sdpa"),
        (True, True, "sdpa"),
    ):
        monkeypatch.setattr(rl, "_has_flash_attention", lambda installed=installed: installed)
        assert rl._attention(cpu) == expected


def test_gradient_clip_and_the_number_of_rollouts_at_once_reach_verl() -> None:
    made = _made(_job("egm-8b-rl", maxGradNorm=0.5))
    assert made["actor_rollout_ref.actor.optim.clip_grad"] == "0.5"
    assert made["actor_rollout_ref.rollout.max_num_seqs"] == "1024"
    assert "actor_rollout_ref.rollout.max_num_seqs" not in _made(_job("tiny-rl"), cpu=True)


def test_rollouts_over_several_gpus_do_not_wait_for_flashinfers_all_reduce() -> None:
    key = "+actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config"
    said = _made(_job("egm-8b-rl", tensorParallel=2))[key]
    assert json.loads(said.strip("'")) == {"pass_config": {"fuse_allreduce_rms": False}}
    assert key not in _made(_job("egm-8b-rl")), "one GPU has no all-reduce"
    assert key not in _made(_job("egm-8b-rl", tensorParallel=2, rolloutEngine="sglang"))


@pytest.mark.parametrize(("dtype", "verl_s"), [("bfloat16", None), ("float16", "fp16"), ("float32", "fp32")])
def test_training_and_rollouts_have_the_same_precision(dtype: str, verl_s: str | None) -> None:
    made = _made(_job("egm-8b-rl", dtype=dtype))
    assert made["actor_rollout_ref.rollout.dtype"] == dtype
    assert [made.get(MIXED.format(part)) for part in ("actor", "ref")] == [verl_s, verl_s]


def test_the_cpu_path_computes_in_single_precision() -> None:
    assert _made(_job("tiny-rl", dtype="bfloat16"), cpu=True)[MIXED.format("actor")] == "fp32"


def test_a_ray_of_its_own_has_a_slot_for_every_actor() -> None:
    made = _made(_job("egm-8b-rl"), cpu_slots=64)
    assert made["ray_kwargs.ray_init.num_cpus"] == "64" and "+ray_kwargs.ray_init.num_gpus" not in made
    assert _made(_job("tiny-rl"), cpu=True)["+ray_kwargs.ray_init.num_gpus"] == "1"
    assert not any(key.lstrip("+").startswith("ray_kwargs") for key in _made(_job("egm-8b-rl"), nodes=2))


def test_a_ray_of_its_own_has_a_token_nobody_knows() -> None:
    one, two = rl._own_ray({}), rl._own_ray({})
    assert one["RAY_AUTH_MODE"] == "token" and len(one["RAY_AUTH_TOKEN"]) == 64
    assert one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]
    assert rl._own_ray({"RAY_AUTH_MODE": "disabled"})["RAY_AUTH_MODE"] == "disabled"


def test_a_frozen_tower_reaches_verl_by_the_environment() -> None:
    """verl reads no key for this; InternVL's plug-in is added with its family."""
    from grounding.train.rl.run import environment

    def made(preset: str, **more: str) -> dict[str, str]:
        return environment(_job(preset, **more), Path("/o"), Path("/m"), cpu=False, validation_rows=0)

    def key(preset: str, **more: str) -> str | None:
        return _made(_job(preset, **more)).get("actor_rollout_ref.actor.fsdp_config.use_orig_params")

    qwen, internvl = made("egm-8b-rl"), made("egm-internvl-rl")
    assert (qwen["EGM_FREEZE_VISION"], internvl["EGM_FREEZE_VISION"]) == ("0", "1")
    assert made("egm-8b-rl", freezeVision="true")["EGM_FREEZE_VISION"] == "1"
    assert made("egm-internvl-rl", freezeVision="false")["EGM_FREEZE_VISION"] == "0"
    assert (key("egm-8b-rl"), key("egm-internvl-rl"), key("egm-8b-rl", freezeVision="true")) == (None, "True", "True")
    assert qwen["VERL_USE_EXTERNAL_MODULES"] == "grounding.train.verl.plugin"
    assert internvl["VERL_USE_EXTERNAL_MODULES"].endswith("verl.plugin,grounding.train.verl.plugin_internvl")


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (16, "2"), (192, "24")])
def test_agents_share_the_cores(cores: int, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    job = _job("egm-8b-rl")

    def threads_of() -> str | None:
        return rl.environment(job, Path("/o"), Path("/m"), cpu=False, validation_rows=1).get("OMP_NUM_THREADS")

    assert threads_of() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_of() is None, "expected no value, because the user has set one"


def test_a_rollout_engine_that_is_not_installed_is_refused_with_those_that_are() -> None:
    rl.require_engine("sglang", lambda name: name == "sglang")
    with pytest.raises(UserError, match="sglang is not installed") as caught:
        rl.require_engine("sglang", lambda name: name == "vllm")
    assert "Installed here: vllm" in str(caught.value.hint)
    assert _made(rl_job("egm-8b-rl", rolloutEngine="sglang"))["actor_rollout_ref.rollout.name"] == "sglang"
