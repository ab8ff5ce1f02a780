"""The types in podTemplate: a wrong one is refused with its path, and everything that Kubernetes accepts is accepted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import read
from grounding.api.models import GROUP_VERSION
from grounding.api.pod_template import TYPES, problems

ODD: list[tuple[Any, str]] = [
    ({"spec": "x"}, "spec"),
    ({"spec": ["a"]}, "spec"),
    ({"spec": {"containers": "x"}}, "spec.containers"),
    ({"spec": {"containers": ["x"]}}, "spec.containers[0]"),
    ({"spec": {"containers": [None]}}, "spec.containers[0]"),
    ({"spec": {"containers": {"name": "main"}}}, "spec.containers"),
    ({"spec": {"containers": [{"image": "x"}]}}, "spec.containers[0].name"),
    ({"spec": {"containers": [{"name": ["a"]}]}}, "spec.containers[0].name"),
    ({"spec": {"containers": [{"name": "main", "env": ["x"]}]}}, "spec.containers[0].env[0]"),
    ({"spec": {"containers": [{"name": "main", "env": {"A": "b"}}]}}, "spec.containers[0].env"),
    ({"spec": {"containers": [{"name": "main", "env": [{"name": "A", "value": 1}]}]}}, "spec.containers[0].env[0].value"),
    ({"spec": {"containers": [{"name": "main", "ports": [{"containerPort": {}}]}]}}, "spec.containers[0].ports[0].containerPort"),
    ({"spec": {"initContainers": "x"}}, "spec.initContainers"),
    ({"spec": {"containers": [{"name": "main"}], "initContainers": [1]}}, "spec.initContainers[0]"),
    ({"spec": {"volumes": ["x"]}}, "spec.volumes[0]"),
    ({"spec": {"tolerations": "x"}}, "spec.tolerations"),
    ({"spec": {"hostNetwork": "yes"}}, "spec.hostNetwork"),
    ({"spec": {"terminationGracePeriodSeconds": True}}, "spec.terminationGracePeriodSeconds"),
    ({"spec": {"nodeselector": {}}}, "spec.nodeselector"),
    ({"spec": {"containers": None}}, "spec.containers"),
    ({"spec": {"priority": 10**30}}, "spec.priority"),
    ({"spec": {"priority": -(10**400)}}, "spec.priority"),
    ({"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": 1e30}}}]}}, "spec.containers[0].resources.limits.cpu"),
    ({"spec": {"containers": [{"name": "main", "livenessProbe": {"httpGet": {"port": 1e30}}}]}}, "spec.containers[0].livenessProbe.httpGet.port"),
    ({"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": 10**30}}}]}}, "spec.containers[0].resources.limits.cpu"),
    ({"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": math.inf}}}]}}, "spec.containers[0].resources.limits.cpu"),
    ({"spec": {"containers": [{"name": "main", "livenessProbe": {"httpGet": {"port": 10**30}}}]}}, "spec.containers[0].livenessProbe.httpGet.port"),
    ({"metadata": {"labels": {"a": 10**30}}}, "metadata.labels.a"),
    ({"metadata": "x"}, "metadata"),
    ({"metadata": {"labels": ["x"]}}, "metadata.labels"),
    ({"metadata": {"labels": {"a": 1}}}, "metadata.labels.a"),
]  # fmt: skip


def _fields(template: Any) -> list[str]:
    spec = {"preset": "egm-8b-rl", "data": {"prepared": "/d"}, "output": "s3://b/x", "podTemplate": template}
    document = {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "j"}, "spec": spec}
    return [finding.field for finding in read(document)[1]]


@pytest.mark.parametrize(("template", "field"), ODD, ids=lambda v: v if isinstance(v, str) else "")
def test_an_odd_shape_is_refused_with_its_path(template: Any, field: str) -> None:
    assert _fields(template) == [f"spec.podTemplate.{field}"]


def test_what_kubernetes_takes_passes() -> None:
    main = {
        "name": "main",
        "resources": {"limits": {"cpu": 4, "memory": "8Gi", "rdma/hca": "1"}},
        "env": [{"name": "A", "value": "b"}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
        "ports": [{"containerPort": 80}],
        "securityContext": None,
    }
    spec = {
        "containers": [main],
        "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    }
    assert _fields({"metadata": {"labels": {"team": "a"}}, "spec": spec}) == []


def test_misspelt_names_are_suggested() -> None:
    assert "did you mean nodeSelector?" in dict(problems({"spec": {"nodeselector": {}}}))["spec", "nodeselector"]


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["spec", "metadata", "containers", "name", "env", "volumes", "labels", "x", "ports", "securityContext"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150)
@given(_anything)
def test_no_template_crashes_the_check(template: Any) -> None:
    for path, sentence in problems(template):
        assert isinstance(path, tuple) and sentence


def test_the_types_are_the_client_s() -> None:
    sys.path.insert(0, str(Path(__file__).parents[3] / "hack" / "docs"))
    import pod_types

    assert json.loads(TYPES.read_bytes()) == json.loads(pod_types.document()), (
        "the file is out of date; run hack/docs/pod_types.py"
    )
