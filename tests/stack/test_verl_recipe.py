"""The override list with the installed verl: it composes, and the code that reads a key gets our value.

Keys that only a GPU engine reads (vLLM's `max_model_len`) are followed up to the typed configuration that verl passes
to it.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict
from rl_jobs import rl_job

from grounding.api import read
from grounding.api.models import GROUP_VERSION
from grounding.api.resolved import RlJob
from grounding.api.verl_keys import verl_kinds
from grounding.train.rl import reward
from grounding.train.rl.overrides import overrides

RL = "actor_rollout_ref"


def _arguments(
    preset: str, out: Path, model: str = "/m", cpu: bool = False, resume: bool = False, **changed: object
) -> list[str]:
    return overrides(
        rl_job(preset, saveEvery=7, **changed),
        train_file=out / "train.parquet",
        validation_file=out / "val, 2.parquet",
        model=model,
        out=out,
        reward_file=Path(reward.__file__),
        cpu=cpu,
        resume_from=out / "checkpoints" / "global_step_3" if resume else None,
    )


def _compose(arguments: list[str]) -> DictConfig:
    import verl.trainer

    folder = Path(next(iter(verl.trainer.__path__))) / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=arguments)


@pytest.mark.parametrize(
    ("preset", "cpu"), [("egm-4b-rl", False), ("egm-8b-rl", False), ("egm-internvl-rl", False), ("tiny-rl", True)]
)
def test_every_override_stands_in_the_composed_configuration(preset: str, cpu: bool, tmp_path: Path) -> None:
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import validate_config

    arguments = _arguments(preset, tmp_path, cpu=cpu, resume=True)
    config = _compose(arguments)
    for override in OverridesParser.create().parse_overrides(arguments):
        found = OmegaConf.select(config, override.key_or_group)
        assert (list(found) if OmegaConf.is_list(found) else found) == override.value(), override.input_line
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)
    assert need_reference_policy(config) == (preset in ("egm-4b-rl", "egm-8b-rl")), (
        "expected a reference policy only for presets with a KL loss"
    )
    rollout = config[RL].rollout
    assert rollout.max_model_len == config.data.max_prompt_length + config.data.max_response_length
    assert rollout.enable_chunked_prefill and "+" not in rollout.name


def test_engine_overrides_win(tmp_path: Path) -> None:
    wanted = ["trainer.save_freq=99", "actor_rollout_ref.rollout.enforce_eager=True"]
    config = _compose(_arguments("egm-8b-rl", tmp_path, engineOverrides=wanted))
    assert config.trainer.save_freq == 99 and config[RL].rollout.enforce_eager is True


def test_the_typed_configurations_that_verl_makes_hold_our_values(tmp_path: Path) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = _compose(_arguments("egm-8b-rl", tmp_path, tensorParallel=2, adamBeta2=0.95))
    actor = omega_conf_to_dataclass(config[RL].actor)
    assert (actor.ppo_mini_batch_size, actor.ppo_max_token_len_per_gpu, actor.use_dynamic_bsz) == (256, 25600, True)
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.kl_loss_type) == (True, 0.005, "low_var_kl")
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode) == ("gspo", "seq-mean-token-mean")
    assert (actor.optim.lr, actor.optim.lr_scheduler_type, actor.optim.lr_warmup_steps) == (3e-6, "cosine", 30)
    assert tuple(actor.optim.betas) == (0.9, 0.95) and actor.optim.weight_decay == 0.01
    assert actor.fsdp_config.param_offload and actor.fsdp_config.optimizer_offload
    rollout = omega_conf_to_dataclass(config[RL].rollout)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.n) == (0.7, 0.9, 50, 16)
    assert (rollout.max_model_len, rollout.enable_chunked_prefill) == (18432, True)
    assert (rollout.tensor_model_parallel_size, rollout.dtype, rollout.val_kwargs.do_sample) == (2, "bfloat16", False)


def test_the_optimizer_follows_the_schedule(tmp_path: Path) -> None:
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import build_optimizer

    config = _compose(_arguments("egm-8b-rl", tmp_path))
    optim = omega_conf_to_dataclass(config[RL].actor.optim)
    made = build_optimizer([torch.nn.Parameter(torch.zeros(2))], optim)
    group = made.param_groups[0]
    assert type(made).__name__ == "AdamW" and group["lr"] == 3e-6 and group["weight_decay"] == 0.01


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "dr-grpo", "rloo"])
def test_an_algorithm_and_its_clip_range_reach_what_verl_computes(algorithm: str, tmp_path: Path) -> None:
    """verl's advantages and losses equal those computed by hand, for four answers of one token, the first outside the clip range."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = _compose(_arguments("egm-8b-rl", tmp_path, algorithm=algorithm, clipRange={"low": 0.1, "high": 0.3}))
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)
    scores, mask = torch.tensor([1.0, 0.0, 0.5, 0.25]), torch.ones(4, 1)
    advantages = _advantages(compute_advantage_for_multi_trajectories, config, scores, mask)
    centred = scores - scores.mean()
    expected = {
        "grpo": centred / (scores.std() + 1e-6),
        "gspo": centred / (scores.std() + 1e-6),
        "dr-grpo": centred,
        "rloo": scores - (scores.sum() - scores) / 3,
    }[algorithm]
    assert torch.allclose(advantages[:, 0], expected)
    actor = omega_conf_to_dataclass(config[RL].actor)
    new = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        torch.zeros(4, 1), new, advantages, mask, loss_agg_mode=actor.loss_agg_mode, config=actor
    )
    ratios, a = new.exp()[:, 0], advantages[:, 0]
    by_hand = torch.maximum(-a * ratios, -a * ratios.clamp(0.9, 1.3)).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def _advantages(compute: Any, config: DictConfig, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from verl import DataProto

    tensors = {"token_level_rewards": scores[:, None] * mask, "response_mask": mask, "responses": mask.long()}
    data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.array(["p"] * 4, dtype=object)})
    found = compute(
        data,
        batch_keys=[f"p_{session}_0" for session in range(4)],
        adv_estimator=config.algorithm.adv_estimator,
        num_repeat=4,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        config=config.algorithm,
    )
    return found.batch["advantages"]


class _Tokenizer:
    """A tokenizer that decodes to a given answer."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def decode(self, *_: Any, **__: Any) -> str:
        return self.answer


@pytest.mark.parametrize("truth", [[100, 100, 300, 300], np.array([100.0, 100.0, 300.0, 300.0])])
def test_the_reward_manager_calls_our_function_with_its_arguments(tmp_path: Path, truth: Any) -> None:
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    config = _compose(_arguments("egm-8b-rl", tmp_path))

    async def once(split: str) -> dict[str, Any]:
        # the box covers half of the true one: IoU 0.5, which is below the job's threshold of 0.75
        manager = load_reward_manager(config, _Tokenizer('[{"bbox_2d": [100, 100, 300, 200]}]'))
        rows = {
            "data_source": np.array(["grounding"], dtype=object),
            "reward_model": np.array([{"style": "rule", "ground_truth": truth}], dtype=object),
            "extra_info": np.array([{"split": split, "width": 1000, "height": 1000}], dtype=object),
        }
        tensors = {"responses": torch.ones(1, 4), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
        return await manager.run_single(DataProto.from_dict(tensors=tensors, non_tensors=rows))

    told = asyncio.run(once("train"))
    assert told["reward_score"] == 0.25 * 0.0 + (1.0 - 0.25) * 0.5
    assert told["reward_extra_info"] == {"score": 0.375, "acc": 0.0, "iou": 0.5, "parsed": 1.0, "length": 35.0}
    assert asyncio.run(once("test"))["reward_score"] == 0.0


def test_the_reward_manager_calls_the_user_s_function(tmp_path: Path) -> None:
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    own = tmp_path / "own.py"
    own.write_text(
        "def mine(data_source, solution_str, ground_truth, extra_info):\n    return {'score': 7.0 + extra_info['width']}\n"
    )
    arguments = overrides(
        rl_job("egm-8b-rl", reward=f"{{file: {own}, entryPoint: mine}}"),
        train_file=tmp_path / "train.parquet",
        validation_file=tmp_path / "val.parquet",
        model="/m",
        out=tmp_path,
        reward_file=Path(reward.__file__),
        own_reward=own,
        cpu=False,
    )
    rows = {
        "data_source": np.array(["grounding"], dtype=object),
        "reward_model": np.array([{"style": "rule", "ground_truth": [100, 100, 300, 300]}], dtype=object),
        "extra_info": np.array([{"split": "train", "width": 1000, "height": 1000}], dtype=object),
    }
    tensors = {"responses": torch.ones(1, 4), "attention_mask": torch.ones(1, 9, dtype=torch.long)}

    async def once() -> dict[str, Any]:  # the manager must be created in the event loop in which it is used
        manager = load_reward_manager(_compose(arguments), _Tokenizer('[{"bbox_2d": [100, 100, 300, 300]}]'))
        return await manager.run_single(DataProto.from_dict(tensors=tensors, non_tensors=rows))

    told = asyncio.run(once())
    assert told["reward_score"] == 1007.0 and told["reward_extra_info"]["acc"] == 1.0


def test_gspo_is_aggregated_as_in_the_reference_s_tree(tmp_path: Path) -> None:
    """Two answers of 1 and 4 tokens have the same weight; verl's loss, clipped at 0.2, equals the one computed by hand."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    actor = omega_conf_to_dataclass(_compose(_arguments("egm-8b-rl", tmp_path))[RL].actor)
    loss = get_policy_loss_fn(actor.policy_loss.loss_mode)
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    old = torch.zeros(2, 4)
    new = torch.tensor([[0.1, 9.0, 9.0, 9.0], [0.4, 0.4, 0.0, 0.8]])
    advantages = torch.tensor([[2.0] * 4, [-1.0] * 4])
    first = -2.0 * min(math.exp(0.1), 1.2)  # the ratio of a sequence is the mean of its tokens' log ratios
    second = max(math.exp((0.4 + 0.4 + 0.0 + 0.8) / 4), 1.2)
    by_hand = (first + second) / 2
    ours, told = loss(old, new, advantages, mask, loss_agg_mode=actor.loss_agg_mode, config=actor)
    assert ours.item() == pytest.approx(by_hand, rel=1e-6)
    by_length, _ = loss(old, new, advantages, mask, loss_agg_mode="token-mean", config=actor)
    assert by_length.item() == pytest.approx((first + 4 * second) / 5, rel=1e-6)
    assert abs(by_length.item() - by_hand) > 0.1, (
        "expected another loss if tokens are weighted equally, so that the test shows the effect of the key"
    )
    assert 0.0 <= told["actor/pg_clipfrac"] <= 1.0


def test_the_data_set_reads_patch_size_lengths_and_seed(tmp_path: Path, tiny_model: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from transformers import AutoProcessor
    from verl.utils.dataset.rl_dataset import RLHFDataset

    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    row = {
        "data_source": "grounding",
        "prompt": [{"role": "user", "content": "<image>\nLocate it"}],
        "images": [str(tmp_path / "a.png")],
        "reward_model": {"style": "rule", "ground_truth": [1.0, 2.0, 3.0, 4.0]},
        "extra_info": {"split": "train", "index": 0, "width": 96, "height": 64},
    }
    long = row | {"prompt": [{"role": "user", "content": "<image>\n" + "word " * 400}]}
    pq.write_table(pa.Table.from_pylist([row, long]), tmp_path / "train.parquet")
    config = _compose(_arguments("egm-8b-rl", tmp_path, promptLength=200, model=str(tiny_model)))
    config.data.filter_overlong_prompts_workers = 1
    with open_dict(config):
        config.data.cache_dir = str(tmp_path / "cache")
    processor = AutoProcessor.from_pretrained(tiny_model)
    data = RLHFDataset(config.data.train_files, processor.tokenizer, config.data, processor)
    assert (data.image_patch_size, data.max_prompt_length, data.truncation) == (16, 200, "error")
    assert len(data) == 1, "expected one row, because the other prompt is longer than promptLength"
    assert data[0]["extra_info"]["width"] == 96


def test_the_replay_buffer_looks_often(tmp_path: Path) -> None:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from grounding.train.verl import hooks

    hooks.apply()

    for preset in ("egm-8b-rl", "tiny-rl"):
        trainer = object.__new__(PPOTrainerSync)
        trainer.config, trainer.trainer_mode = _compose(_arguments(preset, tmp_path, cpu=preset == "tiny-rl")), "sync"
        trainer._add_prompts_to_generate = None
        assert hooks._replay_buffer(trainer).poll_interval == 2.0, (
            "verl's own interval is no longer 2 s: is our shorter one still needed? (the patch also saves after a SIGTERM)"
        )
        assert trainer._build_replay_buffer().poll_interval == hooks.POLL_S


def test_the_composed_configuration_has_what_the_reference_s_tree_has(tmp_path: Path) -> None:
    config = _compose(_arguments("egm-8b-rl", tmp_path, maxGradNorm=0.5))
    assert config.actor_rollout_ref.rollout.max_num_seqs == 1024
    assert config.actor_rollout_ref.actor.optim.clip_grad == 0.5


VALUES = (
    "true",
    "False",
    "3",
    "-1",
    "0.5",
    "1e-6",
    "null",
    "word",
    "a b",
    "'a, b'",
    "[1,2]",
    "{a: 1}",
    "",
    "1,2",
    "a)b",
    "range(1,3)",
    "[1",
)
SOME_KEYS = sorted(key for key, kind in verl_kinds().items() if kind != "section")


@given(
    key=st.sampled_from(SOME_KEYS),
    prefix=st.sampled_from(["", "+", "++"]),
    value=st.sampled_from(VALUES) | st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=8),
    algorithm=st.sampled_from(["grpo", "gspo", "dr-grpo", "rloo"]),
    lora=st.booleans(),
    cpu=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_validates_composes(
    key: str, prefix: str, value: str, algorithm: str, lora: bool, cpu: bool, tmp_path: Path
) -> None:
    """Hydra composes all values of a valid job with the pinned verl's schema, and the result contains them."""
    override = f"{prefix}{key}={value}"
    adapters = {"lora": {"rank": 8}} if lora else {}
    chosen = {"preset": "egm-8b-rl", "data": {"prepared": "/rows"}}
    hyperparameters = {"algorithm": algorithm, "engineOverrides": [override], **adapters}
    document = {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "a"}}
    job, found = read({**document, "spec": {**chosen, "hyperparameters": hyperparameters}})
    if found:
        return
    assert isinstance(job, RlJob)
    places = {
        "train_file": tmp_path / "t",
        "validation_file": tmp_path / "v",
        "out": tmp_path,
        "reward_file": tmp_path / "r",
    }
    arguments = overrides(job, model="/m", cpu=cpu, **places)
    config = _compose(arguments)
    [wanted] = OverridesParser.create().parse_overrides([override])
    held = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        held = held[part]
    assert held == wanted.value() or isinstance(held, str), override
    assert config[RL].model.lora_rank == (8 if lora else 0)


@pytest.mark.parametrize("preset", ["egm-4b-rl", "egm-8b-rl", "egm-internvl-rl"])
def test_old_log_probabilities_need_no_pass_only_if_nothing_reads_them(preset: str, tmp_path: Path) -> None:
    from verl.trainer.distillation import is_distillation_enabled

    from grounding.train.verl.on_policy import is_on_policy

    (tmp_path / "config.json").write_text('{"text_config": {"attention_dropout": 0.0}}')
    config = _compose(_arguments(preset, tmp_path, model=str(tmp_path)))
    answers = config.data.train_batch_size * config[RL].rollout.n
    assert is_on_policy(config, answers) and not is_distillation_enabled(config.distillation)
    assert not is_on_policy(config, 2 * answers), "expected False: the answers are padded to two mini batches"
    for key, value in {
        "data.train_batch_size": 512,
        f"{RL}.actor.ppo_epochs": 2,
        f"{RL}.actor.strategy": "megatron",
        f"{RL}.actor.loss_agg_mode": "token-sum",
        f"{RL}.model.path": "/not/there",
        f"{RL}.model.use_remove_padding": False,
        f"{RL}.model.use_fused_kernels": True,
        f"{RL}.model.lora_adapter_path": "/adapter",
        f"{RL}.rollout.calculate_log_probs": True,
        f"{RL}.rollout.enable_rollout_routing_replay": True,
        "algorithm.adv_estimator": "optimal_token_baseline",
        "algorithm.rollout_correction.bypass_mode": True,
        "algorithm.rollout_correction.rollout_is": "token",
        "algorithm.rollout_correction.rollout_rs": "token_k1",
        "algorithm.use_kl_in_reward": True,
        "distillation.enabled": True,
        "trainer.critic_warmup": 1,
        "trainer.v1.trainer_mode": "separate_async",
    }.items():
        other = config.copy()
        assert OmegaConf.select(other, key, default="absent") not in ("absent", value), key
        OmegaConf.update(other, key, value)
        assert not is_on_policy(other, answers), key
        assert is_distillation_enabled(other.distillation) == (key == "distillation.enabled")
    smaller = config.copy()
    smaller[RL].actor.ppo_mini_batch_size //= 2
    assert not is_on_policy(smaller, answers) and not is_on_policy(smaller, answers // 2)
    (tmp_path / "dropping").mkdir()
    (tmp_path / "dropping" / "config.json").write_text('{"text_config": {"attention_dropout": 0.1}}')
    config[RL].model.path = str(tmp_path / "dropping")
    assert not is_on_policy(config, answers)


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "dr-grpo", "rloo"])
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.01])
def test_without_old_log_probabilities_loss_and_gradients_are_verl_s(
    algorithm: str, entropy_coefficient: float, tmp_path: Path
) -> None:
    from tensordict import TensorDict
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.tensordict_utils import assign_non_tensor

    from grounding.train.verl import on_policy, patches

    patches.apply()
    config = _compose(_arguments("egm-8b-rl", tmp_path, algorithm=algorithm, entropyCoefficient=entropy_coefficient))
    actor = omega_conf_to_dataclass(config[RL].actor)
    torch.manual_seed(0)
    prompts, answers = [3, 2, 4], [5, 1, 3]

    def nested(lengths: list[int], low: float, high: float) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.empty(n).uniform_(low, high) for n in lengths], layout=torch.jagged)

    whole = [p + a for p, a in zip(prompts, answers, strict=True)]
    log_probs, entropy = nested(whole, -3, 0), nested(whole, 0, 2)
    data = TensorDict(
        {
            "prompts": nested(prompts, 1, 9).long(),
            "responses": nested(answers, 1, 9).long(),
            "response_mask": nested(answers, 1, 1).long(),
            "advantages": nested(answers, -1, 1),
            "ref_log_prob": nested(answers, -3, 0),
        },
        batch_size=3,
    )
    assign_non_tensor(data, dp_size=1, batch_num_tokens=9, global_batch_size=3)
    theirs, ours = data.copy(), data.copy()
    starts = log_probs.offsets()[1:].tolist()
    old = [log_probs.values()[end - n - 1 : end - 1] for end, n in zip(starts, answers, strict=True)]
    theirs["old_log_probs"] = torch.nested.as_nested_tensor(old, layout=torch.jagged)
    assign_non_tensor(ours, **{on_policy.FLAG: True})

    def run(loss: Any, data: TensorDict, **more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        values = log_probs.values().clone().requires_grad_()
        outputs = {"log_probs": torch.nested.nested_tensor_from_jagged(values, log_probs.offsets()), **more}
        if entropy_coefficient:
            outputs["entropy"] = entropy
        found, metrics = loss(actor, outputs, data)
        found.backward()
        return found.detach(), values.grad, metrics

    expected, gradients, told = run(patches._loss, theirs)
    found, same, metrics = run(patches._on_policy_loss, ours, **{on_policy.ENTROPY: entropy})
    assert torch.equal(found, expected) and torch.equal(same, gradients) and gradients.abs().sum() > 0
    assert metrics["actor/ppo_kl"].aggregate() == 0.0
    assert {name: metrics[name].aggregate() for name in told if name != "kl_coef"} == {
        name: metric.aggregate() for name, metric in told.items() if name != "kl_coef"
    }
    rows = [entropy.values()[end - n - 1 : end - 1] for end, n in zip(starts, answers, strict=True)]
    by_hand = {
        "token-mean": torch.cat(rows).mean(),
        "seq-mean-token-mean": torch.stack([row.mean() for row in rows]).mean(),
        "seq-mean-token-sum-norm": torch.stack([row.sum() for row in rows]).mean() / max(answers),
    }[actor.loss_agg_mode]
    total, count, width = (
        metrics[name].aggregate() for name in (on_policy.ENTROPY_SUM, on_policy.ENTROPY_COUNT, on_policy.ENTROPY_WIDTH)
    )
    assert on_policy.mean_entropy(total, count, width, actor.loss_agg_mode) == pytest.approx(by_hand.item(), rel=1e-6)
