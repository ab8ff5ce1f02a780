"""The parts of bench/gpu/prove.py that need no GPU: faults of an environment, and the jobs that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from by_path import module

from grounding import api
from grounding.roles import Layout, plan

ROOT = Path(__file__).resolve().parents[2]
prove = module(ROOT / "bench" / "gpu" / "prove.py")


def test_what_differs_from_the_lock_is_a_fault_and_what_the_machine_brings_is_told() -> None:
    locked = {"a": "1", "jaraco.context": "6", "torch": "2.11.0", "nvidia-nccl-cu13": "2.28.9", "gone": "3"}
    found = {"a": "1", "jaraco-context": "6", "torch": "2.11.0+cu130", "nvidia-nccl-cu13": "2.28.8", "extra": "5"}
    found |= {"egm-grounding": "0.1.0", "pip": "26"}
    told = prove.compare(locked, found, ["nvidia-*"])
    assert told["differ"] == {"extra": [None, "5"], "gone": ["3", None]}
    assert told["given"] == {"nvidia-nccl-cu13": ["2.28.9", "2.28.8"]}
    assert (told["of_the_lock"], told["as_locked"]) == (5, 3)
    assert prove.compare(locked, found)["differ"]["nvidia-nccl-cu13"] == ["2.28.9", "2.28.8"]


def test_another_version_is_a_fault_but_its_local_part_is_not() -> None:
    assert prove.compare({"a": "1.0", "b": "1.0"}, {"a": "1.0+cu130", "b": "1.0.1"})["differ"] == {
        "b": ["1.0", "1.0.1"]
    }


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("lock", ["train", "infer-sglang", "infer-vllm"])
def test_its_jobs_are_good_jobs_on_gpus(lock: str, gpus: int, tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text("\n---\n".join(json.dumps(job) for job in prove.manifest(lock, "/a/model", gpus)))
    jobs = [api.resolve(job) for job in api.load(file)]
    api.check_references(jobs)
    layout = Layout("job.yaml", "data", "out", "/a/model")
    on_gpus = {role.name: role.gpus for job in jobs for role in plan(job, layout) if role.gpus}
    assert on_gpus == ({"sft": gpus, "rl": gpus} if lock == "train" else {"server": gpus})


def test_a_module_that_does_not_import_is_told() -> None:
    seconds, said = prove.imports(["json", "no_such_module_here", "csv"])
    assert list(seconds) == ["json"] and "no_such_module_here" in said
    assert prove.imports(["json", "csv"])[1] == ""


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run([sys.executable, prove.__file__, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "infer-sglang" in done.stdout and "--given" in done.stdout
