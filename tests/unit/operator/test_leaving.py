"""Objects that are being deleted are polled, because a watch that began too late never reports their deletion."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import egm_operator.controller.main
import pytest
from egm_operator.controller.main import Operator
from egm_operator.settings import Settings

LABELS = {"grounding.egm.dev/job": "j", "grounding.egm.dev/kind": "train"}


def _pod(name: str, leaving: bool) -> dict[str, Any]:
    meta = {"name": name, "namespace": "n", "uid": f"u-{name}", "resourceVersion": "5", "labels": LABELS}
    return {"kind": "Pod", "metadata": meta | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if leaving else {})}


class _Cluster:
    def __init__(self, there: dict[str, dict[str, Any]]) -> None:
        self.there, self.asked, self.api = there, set[str](), SimpleNamespace(clock=lambda: 0.0)

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.asked.add(name)
        return self.there.get(name)


def test_only_what_leaves_is_asked_for_and_what_has_gone_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egm_operator.controller.main, "_LEAVING_S", 0.01)
    slow = _pod("slow", True)
    cluster = _Cluster({"slow": slow})

    async def run() -> Operator:
        operator = Operator(cluster, Settings())  # type: ignore[arg-type]
        for pod in (_pod("gone", True), slow, _pod("stays", False)):
            operator.store.put(pod)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(operator._ask_after_the_leaving(), 0.3)
        return operator

    operator = asyncio.run(run())
    assert cluster.asked == {"gone", "slow"}
    assert operator.store.leaving() == {("Pod", "n", "slow")} and len(operator.store) == 2
