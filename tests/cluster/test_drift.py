"""GitOps tools see no difference without a change: applying a job again changes nothing, also after the operator has written a status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from egm_operator.plan import plan
from egm_operator.snapshot import Observed

from tests.judges import SETTINGS

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def _versions(kubectl: Any) -> dict[str, str]:
    found = kubectl.get("gtj,gej")["items"]
    return {f"{item['kind']}/{item['metadata']['name']}": item["metadata"]["resourceVersion"] for item in found}


def _write_status(kubectl: Any) -> None:
    """Write the first status that the operator would write to every job."""
    for item in kubectl.get("gtj,gej")["items"]:
        status = plan(Observed(item), SETTINGS, 1_800_000_000.0).status
        assert status, item["metadata"]["name"]
        kind = {"GroundingTrainJob": "gtj", "GroundingEvalJob": "gej"}[item["kind"]]
        body = json.dumps({"status": status})
        kubectl("patch", kind, item["metadata"]["name"], "--subresource=status", "--type=merge", "-p", body)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_a_job_applied_again_is_unchanged(kubectl: Any, path: Path) -> None:
    text = path.read_text()
    kubectl("apply", "-f", "-", stdin=text)
    assert set(re.findall(r" (\w+)$", kubectl("apply", "-f", "-", stdin=text), re.M)) == {"unchanged"}
    _write_status(kubectl)
    assert set(re.findall(r" (\w+)$", kubectl("apply", "-f", "-", stdin=text), re.M)) == {"unchanged"}
    different = kubectl.run("diff", "-f", "-", stdin=text)
    assert different.returncode == 0 and not different.stdout, different.stdout + different.stderr


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_a_server_side_apply_again_writes_nothing(kubectl: Any, path: Path) -> None:
    def apply(*more: str) -> None:
        kubectl("apply", "--server-side", "--field-manager=gitops", *more, "-f", "-", stdin=path.read_text())

    apply()
    before = _versions(kubectl)
    apply()
    assert _versions(kubectl) == before
    _write_status(kubectl)
    before = _versions(kubectl)
    apply()
    assert _versions(kubectl) == before
    # no manager owns a field with a default of the API server, so a tool that forces its fields removes nothing
    apply("--force-conflicts")
    assert _versions(kubectl) == before
