"""What the docs say about a job's objects holds for what the operator creates, with each back end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from grounding.api.status import Phase
from tests.unit.operator.world import World, train

DOCS = Path(__file__).parents[3] / "docs"
RUNBOOKS = sorted((DOCS / "runbooks").glob("EgmTraining*.md"))
SELECTOR = re.compile(r"(?:pods|logs) -l ('[^']+'|\S+)")


def _matches(selector: str, labels: dict[str, str]) -> bool:
    """Return whether labels match a selector of the forms `a=b` and `a in (b,c)`."""
    for part in re.split(r",(?![^(]*\))", selector):
        name, equal, value = part.partition("=")
        if equal:
            values = [value]
        else:
            name, _, listed = part.partition(" in ")
            values = listed.strip("()").split(",")
        if labels.get(name) not in values:
            return False
    return True


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_selects_the_pods_of_a_training(path: Path, back_end: str) -> None:
    world = World(train(output="s3://b/o", resources={"nodes": 1, "gpusPerNode": 8}))
    world.reconcile()
    world.controllers()
    pods = world.alive("rl")
    assert pods
    for selector in SELECTOR.findall(path.read_text()):
        plain = selector.strip("'").replace("NAME", pods[0]["metadata"]["labels"]["grounding.egm.dev/job"])
        assert all(_matches(plain, pod["metadata"]["labels"]) for pod in pods), plain


# ---- Argo CD's health script ----
PHASES = {
    None: "Progressing",
    Phase.PENDING: "Progressing",
    Phase.PREPARING: "Progressing",
    Phase.RUNNING: "Progressing",
    Phase.RESTARTING: "Progressing",
    Phase.SUSPENDED: "Suspended",
    Phase.SUCCEEDED: "Healthy",
    Phase.FAILED: "Degraded",
}
"""Phase -> health in Argo CD"""


def _script() -> str:
    """Return the health script in the docs."""
    text = (DOCS / "gitops.md").read_text()
    found = re.search(r"^resource\.customizations\.health\.\S+: \|\n((?:  .*\n)+)", text, re.MULTILINE)
    assert found is not None
    return found[1]


def _lua(value: Any) -> str:
    """Return a JSON value as an expression of Lua."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{json.dumps(key)}] = {_lua(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


@pytest.mark.skipif(shutil.which("lua") is None, reason="needs Lua (Debian's package lua5.4)")
@pytest.mark.parametrize("message", [None, "step 3 of 10"])
def test_argo_cd_s_health_script_knows_every_phase(message: str | None) -> None:
    assert {*Phase} == {phase for phase in PHASES if phase is not None}
    for phase, health in PHASES.items():
        status = {"phase": str(phase)} | ({"message": message} if message else {}) if phase else None
        job = {"kind": "GroundingTrainJob"} | ({"status": status} if status else {})
        program = f"obj = {_lua(job)}\nlocal function health()\n{_script()}\nend\n"
        program += 'local hs = health()\nio.write(hs.status, "|", hs.message)'
        done = subprocess.run(["lua", "-"], input=program, capture_output=True, text=True, check=True)
        assert done.stdout == f"{health}|{(message or phase) if phase else 'no status yet'}"
