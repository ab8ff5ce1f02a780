"""Compare how the operator, `egm validate` and the API server judge a job."""

from __future__ import annotations

import copy
from typing import Any

from egm_operator.plan import plan
from egm_operator.settings import Settings
from egm_operator.snapshot import Observed

from grounding.api import read
from grounding.api.checks import NULL, beyond_the_server
from grounding.api.manifest import Finding

NOW = 1_800_000_000.0
SETTINGS = Settings(pod_template="allow")
ONLY_FOR_PODS = {
    "spec.output: is missing": "an operator may have a default output; this one has none",
    "that folder is deleted with the pod": "on one machine, the folder is kept",
    "pods of several nodes exchange": "on one machine, all processes share one folder",
    "a pod has no folder": "the file exists only on this machine",
}
"""Parts of the messages with which the operator refuses jobs that can run on one machine -> the reason for the difference"""


def operators(raw: dict[str, Any]) -> str | None:
    """Return the message with which the operator refuses a new job, given as the API server stores it; None if it accepts the job."""
    stored = copy.deepcopy(raw)
    stored["metadata"] |= {"namespace": "n", "uid": "u", "generation": 1, "resourceVersion": "1"}
    stored["metadata"]["creationTimestamp"] = "2027-01-15T08:00:00Z"
    status = plan(Observed(stored), SETTINGS, NOW).status or {}
    failed = [c for c in status.get("conditions", []) if c["type"] == "Failed" and c["status"] == "True"]
    return next((c["message"] for c in failed if c["reason"] == "InvalidSpec"), None)


def disagreement(written: dict[str, Any], stored: dict[str, Any] | None) -> str | None:
    """Return how the three disagree about a manifest. `stored`: the object that the API server stores, None if it refuses."""
    job, found = read(written)
    if stored is None:
        return "only the API server refuses it" if job is not None else None
    said = operators(stored)
    if job is not None:
        fine = said is None or any(words in said for words in ONLY_FOR_PODS)
        return None if fine else f"only the operator refuses it: {said}"
    if unnamed := [finding for finding in found if not finding.rule]:
        return f"the API server takes it, and no rule says that it may: {unnamed}"
    assert {finding.rule for finding in found} <= beyond_the_server().keys()
    seen = [finding for finding in found if finding.rule != NULL]
    if seen and not (said and _words(seen[0]) in said):
        return f"the operator's condition is {said!r}, validate's words are {_words(seen[0])!r}"
    return None


def _words(finding: Finding) -> str:
    return finding.message
