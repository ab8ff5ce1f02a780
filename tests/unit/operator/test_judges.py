"""`egm validate` and the operator refuse the same jobs with the same messages; a list names what only the operator refuses."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, example, given, settings

from grounding.api import read
from grounding.api.as_written import as_stored
from grounding.api.checks import Beyond, beyond_the_server
from grounding.api.manifest import submodel
from grounding.api.models import KINDS
from tests.judges import ONLY_FOR_PODS, operators
from tests.manifests import manifests


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(manifests())
@example(
    {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingEvalJob",
        "metadata": {"name": "one"},
        "spec": {"model": {"source": "/m"}, "data": {"images": ["/d"]}, "suspendx": None, "outputx": None},
    }
)
def test_the_operator_judges_as_validate_does(manifest: dict[str, Any]) -> None:
    """Compare both without an API server; tests/cluster/test_judges.py does it with one."""
    stored = as_stored(KINDS[manifest["kind"]], manifest, submodel)
    job, found = read(stored)
    said = operators(stored)
    if job is None:
        # the operator names one mistake; it reads the fields in alphabetical order
        assert said is not None and any(each.message in said for each in found), (said, found)
    else:
        assert said is None or any(words in said for words in ONLY_FOR_PODS), said


def test_the_list_of_what_the_server_cannot_judge_is_small_and_says_why() -> None:
    found = beyond_the_server()
    assert len(found) <= 36
    assert set(found.values()) == set(Beyond)
