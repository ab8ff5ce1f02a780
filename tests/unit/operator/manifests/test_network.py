"""Access to a job's pods: the operator's policies, evaluated by the rules of Kubernetes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from egm_operator.render import UID, objects
from egm_operator.settings import Settings, load

from grounding.api import parse
from grounding.errors import UserError

OPERATOR = {"namespaceSelector": {"matchLabels": {"n": "egm-system"}}, "podSelector": {"matchLabels": {"app": "egm"}}}
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"n": "monitoring"}}}
CLOSED = {
    "network_policies": True,
    "network_telemetry_from": orjson.dumps([OPERATOR]).decode(),
    "network_scrape_from": orjson.dumps([PROMETHEUS]).decode(),
}
TRAIN = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: t}
spec:
  preset: egm-8b-rl
  data: {train: [s3://coco/a.json], validation: [s3://d/b.jsonl], images: [s3://d/coco.tar]}
"""
EVAL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: e}
spec:
  model: {source: hf://a/b}
  data: {root: s3://d, images: [s3://d/coco.tar]}
"""
SWEEP = EVAL.replace("model: {source: hf://a/b}", "sweep: {models: [{source: hf://a/b}, {source: hf://c/d}]}")
HOSTED = EVAL + "  engine: openai\n  endpoints: [https://host]\n"

Pod = tuple[str, dict[str, str]]
"""Namespace and labels"""


def made(text: str, **more: Any) -> list[dict[str, Any]]:
    return objects(parse(text)[0], {}, Settings(**{"default_output": "s3://o", **CLOSED, **more}), "team")


def pods(found: list[dict[str, Any]]) -> list[Pod]:
    templates = [o for o in found if o["kind"] == "Pod"]
    templates += [o["spec"]["template"] for o in found if o["kind"] == "Job"]
    for gang in (o for o in found if o["kind"] == "PyTorchJob"):
        templates += [replica["template"] for replica in gang["spec"]["pytorchReplicaSpecs"].values()]
    return [("team", t["metadata"]["labels"]) for t in templates]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def reaches(policies: list[dict[str, Any]], source: Pod, target: Pod, port: int) -> bool:
    """Return whether a network plug-in would let `source` connect, by the documentation of NetworkPolicy."""
    namespace, labels = target
    about = [p["spec"] for p in policies if namespace == "team" and selects(p["spec"]["podSelector"], labels)]
    if not about:
        return True
    for rule in (rule for spec in about for rule in spec["ingress"]):
        ports = [p["port"] for p in rule.get("ports", [])]
        for peer in rule["from"]:
            where = selects(peer["namespaceSelector"], {"n": source[0]}) if "namespaceSelector" in peer else (
                source[0] == namespace
            )  # fmt: skip
            if where and selects(peer.get("podSelector", {}), source[1]) and (not ports or port in ports):
                return True
    return False


@pytest.mark.parametrize("text", [TRAIN, EVAL, SWEEP, HOSTED], ids=["train", "eval", "sweep", "hosted"])
def test_only_its_own_pods_the_operator_and_prometheus_reach_a_job(text: str) -> None:
    found = made(text)
    policies = [o for o in found if o["kind"] == "NetworkPolicy"]
    assert len(policies) == 1 and found[0] is policies[0], (
        "the policy must be the first object, so that it exists before any pod"
    )
    own = pods(found)
    assert own
    strangers: list[Pod] = [
        ("team", {}),
        ("team", {**own[0][1], "grounding.egm.dev/uid": "of another job"}),
        ("other", own[0][1]),
        ("egm-system", {}),
        ("team", {"app": "egm"}),
    ]
    for target in own:
        for port in (22, 6379, 8000, 8090, 23456, 40000):
            assert all(reaches(policies, source, target, port) for source in own)
            assert not any(reaches(policies, source, target, port) for source in strangers)
            assert reaches(policies, ("egm-system", {"app": "egm"}), target, port) == (port == 8090)
            assert reaches(policies, ("monitoring", {}), target, port) == (port in (8000, 8090))


def test_a_policy_without_peers_lets_nobody_else_in() -> None:
    [policy] = [o for o in made(EVAL, network_telemetry_from="[]", network_scrape_from="[]") if "Network" in o["kind"]]
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": policy["spec"]["podSelector"]}]}]
    assert policy["spec"]["policyTypes"] == ["Ingress"] and "egress" not in policy["spec"]


def test_egress_is_limited_by_a_value() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"protocol": "TCP", "port": 443}]}
    [policy] = [o for o in made(EVAL, network_egress=orjson.dumps([rule]).decode()) if o["kind"] == "NetworkPolicy"]
    own, names, given = policy["spec"]["egress"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"] and given == rule
    assert own == {"to": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert {(p["protocol"], p["port"]) for p in names["ports"]} == {("UDP", 53), ("TCP", 53)}


def test_a_job_that_is_created_again_has_a_policy_of_its_own() -> None:
    [policy] = [o for o in made(EVAL) if o["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"grounding.egm.dev/uid": UID}
    assert policy["metadata"]["name"].startswith("e-eval-network-") and policy["metadata"]["ownerReferences"]


def test_no_policies_unless_they_are_asked_for() -> None:
    assert not [o for o in made(EVAL, network_policies=False) if o["kind"] == "NetworkPolicy"]


def test_a_pod_template_cannot_give_a_pod_the_labels_of_another_job() -> None:
    more = '  podTemplate: {metadata: {labels: {"grounding.egm.dev/uid": "another", mine: "1"}}}\n'
    assert {labels["grounding.egm.dev/uid"] for _, labels in pods(made(EVAL + more))} == {UID}
    assert {labels["mine"] for _, labels in pods(made(EVAL + more))} == {"1"}


@pytest.mark.parametrize("text", ["{}", "x", '["a"]', "null"])
def test_what_is_no_list_of_peers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="EGM_OPERATOR_NETWORK_SCRAPE_FROM"):
        load({"EGM_OPERATOR_NETWORK_SCRAPE_FROM": text})
