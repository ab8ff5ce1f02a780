"""Tasks that the trainer runs on every pod, without Ray."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import grounding.train.verl
from grounding.errors import Failure


class _FakeRay(ModuleType):
    """A module in place of Ray that runs each task at once in this process."""

    def __init__(self) -> None:
        super().__init__("ray")

    def remote(self, **_: object) -> Any:
        def task(function: Any) -> Any:
            found = ModuleType("task")
            found.options = lambda **_: found  # type: ignore[attr-defined]
            found.remote = function  # type: ignore[attr-defined]
            return found

        return task

    def get(self, found: list[Any]) -> list[Any]:
        return found


@pytest.fixture
def every_pod(monkeypatch: pytest.MonkeyPatch) -> Any:
    strategies = ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", _FakeRay())
    monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    name = "grounding.train.verl.every_pod"
    monkeypatch.delitem(sys.modules, name, raising=False)
    # the test's end then removes the attribute that the import sets
    monkeypatch.setattr(grounding.train.verl, "every_pod", None, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_a_full_disk_is_reported_with_the_name_of_its_pod(every_pod: Any, tmp_path: Path) -> None:
    full = partial(every_pod._require_room, tmp_path, 1 << 60)
    with pytest.raises(Failure, match=rf"^{os.uname().nodename}: {tmp_path}: the next checkpoint needs"):
        every_pod.on_each([("one", lambda: None), ("two", full)])
    assert every_pod.on_each([("one", lambda: 1), ("two", lambda: 2)]) == [1, 2]
