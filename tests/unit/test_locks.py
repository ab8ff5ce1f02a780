"""The images' lock files: every line is pinned and hashed, all have one torch, none names this machine. tests/images resolves them again."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from by_path import module

ROOT = Path(__file__).resolve().parents[2]
locks = module(ROOT / "images" / "locks.py")
EVERY = [pytest.param(x, id=x.name) for x in locks.LOCKS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _name(requirement: str) -> str:
    return re.split(r"[\[=<>!~; ]", requirement)[0].lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize("lock", EVERY)
def test_every_package_has_an_exact_version_and_hashes(lock: Any) -> None:
    text = "\n".join(line for line in lock.path.read_text().splitlines() if not line.lstrip().startswith("#"))
    entries = re.sub(r" *\\\n *", " ", text).strip().splitlines()
    assert len(entries) == len(locks.versions(text)) > 5
    bad = [
        e[:60]
        for e in entries
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[^ ]+( ;[^\\]*?)?( --hash=sha256:[0-9a-f]{64})+", e.strip())
    ]
    assert not bad


@pytest.mark.parametrize("lock", EVERY)
def test_no_host_and_no_path_is_in_it(lock: Any) -> None:
    assert not re.search(r"://|--(index|extra-index|find-links)|/(home|tmp|root|work|opt)/", lock.path.read_text())


def test_every_input_has_its_lock_and_every_lock_its_place() -> None:
    folders = {p.parent for p in (ROOT / "images").glob("*/requirements*")}
    assert {x.path for x in locks.LOCKS} == {p for f in folders for p in f.glob("requirements*.txt")}


@pytest.mark.parametrize("lock", [x for x in EVERY if x.values[0].tested])
def test_what_runs_without_a_gpu_is_what_the_tests_run_with(lock: Any) -> None:
    tested: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        tested.setdefault(package["name"], set()).add(package["version"])
    other = {n: v for n, v in locks.versions(lock.path.read_text()).items() if v not in tested.get(n, set())}
    assert not other


@pytest.mark.parametrize("lock", [x for x in EVERY if x.values[0].cpu])
def test_cpu_locks_leave_out_what_only_gpu_kernels_load(lock: Any) -> None:
    assert not set(PROJECT["tool"]["uv"]["exclude-dependencies"]) & locks.versions(lock.path.read_text()).keys()


@pytest.mark.parametrize("lock", [x for x in EVERY if x.values[0].project])
def test_the_projects_requirements_are_in_it(lock: Any) -> None:
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in lock.extras:
        wanted += [r for r in PROJECT["project"]["optional-dependencies"][extra] if not r.startswith("egm-grounding")]
    found = locks.versions(lock.path.read_text())
    plain = {n.replace(".", "-"): v for n, v in found.items()}
    assert not [r for r in wanted if _name(r) not in plain]
    exact = {_name(r): r.split("==")[1].split(";")[0].strip() for r in wanted if "==" in r}
    assert {n: plain[n] for n in exact} == exact


def test_training_and_engines_share_one_torch_and_one_transformers() -> None:
    found = {x.name: locks.versions(x.path.read_text()) for x in locks.LOCKS if x.name not in ("build", "operator")}
    for package in ("torch", "torchvision", "transformers"):
        assert len({v[package] for v in found.values()}) == 1
    assert found["train"]["vllm"] == found["infer-vllm"]["vllm"]
    assert "kernels" not in found["infer-sglang"]


def test_the_operator_has_neither_torch_nor_what_data_and_evaluation_need() -> None:
    found = locks.versions((ROOT / "images/operator/requirements.txt").read_text())
    assert not {"torch", "numpy", "pyarrow", "pillow", "boto3", "transformers"} & found.keys()


def test_a_line_that_changes_is_told() -> None:
    assert locks.difference({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b: 2 -> 3", "c: absent -> 4"]


def test_installer_and_builder_are_those_of_make_and_pyproject() -> None:
    found = locks.versions((ROOT / "images/build/requirements.txt").read_text())
    assert f"UV_VERSION := {found['uv']}" in (ROOT / "Makefile").read_text()
    assert PROJECT["build-system"]["requires"] == [f"hatchling=={found['hatchling']}"]
