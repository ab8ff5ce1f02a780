"""The limits of a podTemplate at each setting: no field that weakens the restricted level is accepted, and no harmless field is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from egm_operator.manifests import policy
from egm_operator.render import objects
from egm_operator.settings import Settings

from grounding.api import parse
from grounding.errors import UserError

TRAIN = {
    "apiVersion": "grounding.egm.dev/v1alpha1",
    "kind": "GroundingTrainJob",
    "metadata": {"name": "t", "namespace": "n"},
    "spec": {"preset": "egm-8b-rl", "data": {"prepared": "pvc://data/p"}, "output": "pvc://out/x"},
}
HOST = {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}


def _pods(template: Any, **settings: Any) -> list[dict[str, Any]]:
    job = {**TRAIN, "spec": {**TRAIN["spec"], "podTemplate": template}}
    return list(_templates(objects(parse(yaml.safe_dump(job))[0], None, Settings(**settings), "n")))


def _templates(node: Any) -> Any:
    """Yield every pod template below a node."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}) if isinstance(node.get("spec"), dict) else False:
            yield node
        for value in node.values():
            yield from _templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from _templates(value)


def _main(**container: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "main", **container}]}}


ESCAPES: dict[str, dict[str, Any]] = {
    "hostNetwork": {"spec": {"hostNetwork": True}},
    "hostPID": {"spec": {"hostPID": True}},
    "volumes[": {"spec": HOST},
    "serviceAccountName": {"spec": {"serviceAccountName": "egm-operator"}},
    "automountServiceAccountToken": {"spec": {"automountServiceAccountToken": True}},
    "automountServiceAccountToken ": {"spec": {"automountServiceAccountToken": None}},
    "runAsNonRoot": {"spec": {"securityContext": None}},
    "seccompProfile": {"spec": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}},
    "sysctls": {"spec": {"securityContext": {"sysctls": [{"name": "kernel.shmmax", "value": "1"}]}}},
    "privileged": _main(securityContext={"privileged": True}),
    "allowPrivilegeEscalation": _main(securityContext={"allowPrivilegeEscalation": True}),
    "capabilities.drop": _main(securityContext={"capabilities": None}),
    "capabilities.add": _main(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}),
    "runAsUser": _main(securityContext={"runAsUser": 0}),
    "procMount": _main(securityContext={"procMount": "Unmasked"}),
    "ports": _main(ports=[{"containerPort": 1, "hostPort": 1}]),
    "envFrom[": _main(envFrom=[{"secretRef": {"name": "somebody-elses"}}]),
    "env[": _main(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "somebody-elses", "key": "k"}}}]),
    "volumes[ ": {"spec": {"volumes": [{"name": "s", "secret": {"secretName": "somebody-elses"}}]}},
    "volumes[  ": {"spec": {"volumes": [{"name": "s", "projected": {"sources": [{"secret": {"name": "other"}}]}}]}},
    "projected": {
        "spec": {"volumes": [{"name": "s", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]}
    },
    "containers[1].securityContext.privileged": {
        "spec": {"containers": [{"name": "side", "image": "x", "securityContext": {"privileged": True}}]}
    },
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_template_undoes_the_restricted_level(name: str) -> None:
    with pytest.raises(UserError) as refused:
        _pods(ESCAPES[name])
    assert name.strip() in str(refused.value.field)
    assert _pods(ESCAPES[name], pod_template="allow")
    with pytest.raises(UserError, match="does not allow a podTemplate"):
        _pods(ESCAPES[name], pod_template="deny")


def test_what_is_harmless_passes_and_sidecars_are_restricted_too() -> None:
    template = _main(
        image="mine:1",
        env=[{"name": "A", "value": "b"}, {"name": "T", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "t"}}}],
        securityContext={"runAsUser": 2000},
    )
    template["spec"] |= {
        "volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}],
        "terminationGracePeriodSeconds": 600,
    }
    template["spec"]["containers"].append({"name": "side", "image": "x"})
    pods = _pods(template, pod_template_secrets=("hub",), storage_secret="s3")
    assert pods
    for pod in pods:
        side = next(c for c in pod["spec"]["containers"] if c["name"] == "side")
        assert side["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert list(policy.violations(pod["spec"], Settings(storage_secret="s3"), frozenset({"s3", "hub"}))) == []


def test_without_a_template_nothing_is_judged() -> None:
    job = parse(yaml.safe_dump(TRAIN))[0]
    assert objects(job, {}, Settings(pod_template="deny", image_registries=("registry.example",)), "n")


def test_images_come_from_allowed_registries() -> None:
    allowed = {"image_registries": ("localhost", "registry.example/team")}
    assert _pods(_main(image="registry.example/team/x:1"), **allowed)
    with pytest.raises(UserError, match="not from an allowed registry"):
        _pods(_main(image="registry.example.evil/x"), **allowed)


def test_a_pod_of_a_job_cannot_pass_for_the_operator() -> None:
    labels = {"app.kubernetes.io/name": "egm", "app.kubernetes.io/component": "operator", "team": "a"}
    for pod in _pods({"metadata": {"labels": labels}}):
        assert pod["metadata"]["labels"]["team"] == "a"
        assert "app.kubernetes.io/component" not in pod["metadata"]["labels"]
