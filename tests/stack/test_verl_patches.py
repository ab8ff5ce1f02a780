"""The patches of verl and Ray match the installed releases: each original is the source that its patch was written for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECK = """
from grounding.train.rl import ray_start
from grounding.train.verl import cpu_patches, hooks, internvl, patches, runner, transfer_queue

tables = [patches, cpu_patches, hooks, internvl, ray_start, runner, transfer_queue]
every = [patch for table in tables for patch in table.PATCHES]
assert not [p.title for p in every if p.applied], "importing a module has changed something"
assert not [p.title for p in every if p.has_changed()]
assert all(p.reason.endswith(".") and p.needless.endswith(".") for p in every)
for table in tables:
    table.apply()
    table.apply()
assert [p.title for p in every if not p.applied and p.wanted()] == []
assert all(vars(owner)[p.name] is p.replacement for p in every if p.wanted() for owner in p.also)
print(len(every), "patches")
"""


@pytest.mark.timeout(300)
def test_every_patch_is_for_the_installed_source_and_applies_once() -> None:
    env = os.environ | {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.endswith("patches\n"), done.stderr[-3000:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", ["verl", "grounding.train.verl.cpu", "grounding.train.verl.callback"])
def test_whatever_a_worker_imports_first_the_plug_in_applies(first: str) -> None:
    """The plug-in applies its patches even if Ray imports the module of an actor's class before anything else."""
    env = os.environ | {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
    env["VERL_USE_EXTERNAL_MODULES"] = "grounding.train.verl.plugin_cpu"
    code = f"""
import importlib
importlib.import_module("{first}")
from grounding.train.verl import cpu, cpu_patches, patches, transfer_queue
from verl.workers.rollout.replica import RolloutReplicaRegistry
assert [p.title for t in (patches, cpu_patches, transfer_queue) for p in t.PATCHES if p.wanted() and not p.applied] == []
assert RolloutReplicaRegistry.get("hf") is cpu.HFReplica
print("applied")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.endswith("applied\n"), done.stderr[-3000:]
