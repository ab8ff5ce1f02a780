"""Patches of verl for the CPU path, and the classes that verl looks up by name. `plugin_cpu.py` applies them; `cpu.py` has the rollout
engine.

This module must not import `cpu.py`: if a worker process imports `cpu.py` first, that imports verl, which imports the plug-in and thereby
this module.
"""

from __future__ import annotations

import grounding.train.verl.cpu_platform  # noqa: F401  # registers the platform; must come before other imports of verl
from grounding.jsontypes import JsonObject

# isort: split
import itertools
import os
from datetime import timedelta
from typing import Any

import torch
import verl.models.transformers.monkey_patch as verl_monkey_patch
import verl.trainer.ppo.v1.trainer_base as verl_trainer
import verl.utils.distributed as verl_distributed
import verl.workers.engine.fsdp.transformer_impl as verl_fsdp
import verl.workers.engine_workers as verl_engine_workers
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout import base as verl_rollout_base
from verl.workers.rollout.replica import RolloutReplicaRegistry

from grounding.models.patch_embedding import use_matrix_product
from grounding.train.verl.patching import Patch
from grounding.train.verl.patching import apply as apply_patches

SESSIONS = 1 << 16  # a request's number is prompt number * SESSIONS + rollout number


_init_ray_group = verl_distributed.initialize_global_process_group_ray


def _init_ray_gloo(timeout_second: int | None = None, backend: str | None = None) -> Any:
    return _init_ray_group(timeout_second, backend or "gloo")


def _init_gloo(timeout_second: int = 36000) -> tuple[int, int, int]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_second))
    return int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _no_offload(pin_memory: bool = False) -> None:
    """Return no offload policy, because on a CPU there is nothing to offload."""


def _no_trl() -> bool:
    return False


# ---- the same seed gives the same run ----
class _Numbered:
    """Replaces the trainer's `uuid` module by one whose names sort in order of creation."""

    _count = itertools.count()

    @classmethod
    def uuid4(cls) -> str:
        return f"{next(cls._count):012d}"


@register("numbered_single_turn_agent")
class NumberedSingleTurnAgentLoop(SingleTurnAgentLoop):  # type: ignore[misc]
    """verl's single-turn loop with requests named by prompt and rollout number; `rollout.full_determinism` makes verl use the names."""

    async def run(self, sampling_params: JsonObject, **kwargs: Any) -> Any:
        kwargs.pop("priority", None)
        number = int(str(kwargs["uid"])) * SESSIONS + int(kwargs.get("session_id", 0))
        return await super().run(sampling_params, priority=number, **kwargs)


_RELEASE = "verl supports a platform without a GPU."
_GLOO = 'The name of the platform would be composed into the invalid back end "cpu:gloo,cpu:gloo".'
PATCHES = (
    Patch(
        verl_distributed,
        "initialize_global_process_group_ray",
        _init_ray_gloo,
        _GLOO,
        _RELEASE,
        "761a94d1a2e0",
        also=(verl_engine_workers,),
    ),
    Patch(verl_distributed, "initialize_global_process_group", _init_gloo, _GLOO, _RELEASE, "33a5452c4dde"),
    Patch(verl_fsdp, "CPUOffloadPolicy", _no_offload, "On a CPU there is nothing to offload.", _RELEASE, ""),
    Patch(
        verl_monkey_patch,
        "is_trl_available",
        _no_trl,
        "Newer releases of TRL lack a class that verl imports.",
        "verl only imports classes that the locked TRL has.",
        "1a123c4fa66c",
    ),
    Patch(
        verl_trainer,
        "uuid",
        _Numbered,
        "Names of prompts must sort in the order of their creation, so that the same seed gives the same run.",
        "verl names prompts by number.",
        "",
    ),
)


def _replica() -> Any:
    from grounding.train.verl.cpu import HFReplica

    return HFReplica


def apply() -> None:
    """Apply the patches of the CPU path, and register its rollout engine `hf`."""
    use_matrix_product()
    apply_patches(PATCHES)
    verl_rollout_base._ROLLOUT_REGISTRY[("hf", "async")] = "grounding.train.verl.cpu.HFServerAdapter"
    RolloutReplicaRegistry.register("hf", _replica)
