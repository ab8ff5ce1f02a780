"""Pod templates by role: each applies only to its pods, over the template of all pods."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from egm_operator.render import objects
from egm_operator.settings import Settings

from grounding.api import parse
from grounding.api.redaction import without_secrets
from grounding.errors import UserError
from tests.unit.operator.world import evaluation, train

LARGE = {"spec": {"nodeSelector": {"gpu": "h100"}, "containers": [{"name": "main", "resources": {"requests": {"cpu": "64"}}}]}}  # fmt: skip


def _templates(job: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Return metadata and spec of every pod."""
    made = objects(parse(yaml.safe_dump(job))[0], {}, Settings(**settings), "n")
    templates: list[dict[str, Any]] = [o for o in made if o["kind"] == "Pod"]
    templates += [o["spec"]["template"] for o in made if o["kind"] == "Job"]
    templates += [r["template"] for o in made if o["kind"] == "PyTorchJob" for r in o["spec"]["pytorchReplicaSpecs"].values()]  # fmt: skip
    return templates


def _pods(job: dict[str, Any], **settings: Any) -> dict[str, dict[str, Any]]:
    """Return the first pod spec of each role."""
    found: dict[str, dict[str, Any]] = {}
    for template in _templates(job, **settings):
        found.setdefault(template["metadata"]["labels"]["grounding.egm.dev/role"], template["spec"])
    return found


def _cpu(pod: dict[str, Any]) -> str:
    return str(pod["containers"][0]["resources"]["requests"]["cpu"])


def test_the_servers_template_goes_to_the_servers_only() -> None:
    pods = _pods(evaluation(output="pvc://out/x", podTemplates={"server": LARGE}))
    assert {role: (_cpu(pod), pod.get("nodeSelector")) for role, pod in pods.items()} == {
        "server": ("64", {"gpu": "h100"}),
        "prepare": ("1", None),
        "evaluate": ("1", None),
    }


def test_a_role_s_template_is_merged_over_that_of_all_pods() -> None:
    everywhere = {"spec": {"tolerations": [{"key": "gpu", "operator": "Exists"}], "nodeSelector": {"zone": "a"}}}
    own = {"spec": {"nodeSelector": {"zone": None, "gpu": "h100"}}}
    pods = _pods(train(output="pvc://out/x", podTemplate=everywhere, podTemplates={"train": own}))
    assert pods["rl"]["nodeSelector"] == {"gpu": "h100"} and pods["prepare"]["nodeSelector"] == {"zone": "a"}
    assert all({"key": "gpu", "operator": "Exists"} in pod["tolerations"] for pod in pods.values())


def test_requests_follow_from_gpus() -> None:
    eight = _pods(train(output="pvc://out/x", resources={"nodes": 1, "gpusPerNode": 8}))
    assert eight["rl"]["containers"][0]["resources"]["requests"] == {
        "nvidia.com/gpu": "8", "cpu": "24", "memory": "96Gi",
    }  # fmt: skip
    assert _cpu(eight["prepare"]) == "1"
    one = _pods(evaluation(output="pvc://out/x"))
    assert _cpu(one["server"]) == "3" and _cpu(one["evaluate"]) == "1"


def test_a_job_names_its_kind_of_gpu() -> None:
    amd = {"nodes": 1, "gpusPerNode": 8, "gpuResource": "amd.com/gpu"}
    trained = _pods(train(output="pvc://out/x", resources=amd))["rl"]["containers"][0]["resources"]
    served = _pods(evaluation(output="pvc://out/x", gpuResource="nvidia.com/mig-3g.40gb"))["server"]
    assert trained["limits"] == {"amd.com/gpu": "8"} and "nvidia.com/gpu" not in trained["requests"]
    assert served["containers"][0]["resources"]["limits"] == {"nvidia.com/mig-3g.40gb": "1"}
    with pytest.raises(UserError, match="gpuResource"):
        parse(yaml.safe_dump(train(resources={**amd, "gpuResource": "gpu"})))


@pytest.mark.parametrize("job", [train(output="pvc://out/x"), evaluation(output="pvc://out/x")], ids=["train", "eval"])
def test_no_mesh_holds_a_pod_open_and_no_autoscaler_ends_one(job: dict[str, Any]) -> None:
    made = _templates(job)
    assert len(made) > 1
    for template in made:
        labels, notes = template["metadata"]["labels"], template["metadata"]["annotations"]
        assert labels["sidecar.istio.io/inject"] == "false" and notes["linkerd.io/inject"] == "disabled"
        kept = labels["grounding.egm.dev/role"] != "prepare"
        assert notes.get("cluster-autoscaler.kubernetes.io/safe-to-evict") == ("false" if kept else None)
        assert notes.get("karpenter.sh/do-not-disrupt") == ("true" if kept else None)
    meshed = {
        **job,
        "spec": {**job["spec"], "podTemplate": {"metadata": {"labels": {"sidecar.istio.io/inject": "true"}}}},
    }
    assert {t["metadata"]["labels"]["sidecar.istio.io/inject"] for t in _templates(meshed)} == {"true"}


def test_a_cluster_that_chooses_users_gets_none() -> None:
    for pod in _pods(evaluation(output="pvc://out/x"), run_as_user=0).values():
        level = pod["securityContext"]
        assert level["runAsNonRoot"] is True and not level.keys() & {"runAsUser", "runAsGroup", "fsGroup"}
    assert _pods(evaluation(output="pvc://out/x"))["server"]["securityContext"]["runAsUser"] == 1000


def test_a_role_s_template_may_do_no_more_than_that_of_all_pods() -> None:
    job = evaluation(podTemplates={"server": {"spec": {"hostNetwork": True}}})
    with pytest.raises(UserError) as error:
        _pods(job)
    assert error.value.field == "spec.podTemplates.server.spec.hostNetwork"
    with pytest.raises(UserError, match="does not allow a podTemplate"):
        _pods(
            evaluation(podTemplates={"client": {"spec": {}, "metadata": {"labels": {"a": "b"}}}}), pod_template="deny"
        )
    _pods(job, pod_template="allow")


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (evaluation(podTemplates={"server": {"spec": {"containers": [{"nme": "main"}]}}}), "spec.podTemplates.server.spec.containers"),
        (evaluation(podTemplates={"train": {}}), "spec.podTemplates.train"),
        (train(podTemplates={"server": {}}), "spec.podTemplates.server"),
        (train(podTemplates={"train": {"spec": {"nodeSelector": ["a"]}}}), "spec.podTemplates.train.spec.nodeSelector"),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_their_place(job: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        parse(yaml.safe_dump(job))
    assert field in str(error.value)


def test_values_of_their_environment_are_hidden() -> None:
    env = [{"name": "KEY", "value": "secret-word"}]
    job = evaluation(podTemplates={"client": {"spec": {"containers": [{"name": "main", "env": env}]}}})
    assert "secret-word" not in str(without_secrets(job))
