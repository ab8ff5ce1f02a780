"""`egm doctor --cluster`: the findings that follow from answers of the API server."""

from __future__ import annotations

import dataclasses
import datetime

import pytest
from egm_operator.cli.doctor import RIGHTS, Claim, Leader, Pull, Workload, World, judge, leaders_of, pulls_of
from egm_operator.kinds import JOBS

from grounding.runtime.verdicts import exit_code

WELL = World(
    server="v1.34.0",
    namespace="team-a",
    kinds=frozenset({*JOBS, "PyTorchJob"}),
    operators=(Workload("egm", "egm", 1, 1),),
    trainers=(Workload("kubeflow", "training-operator", 1, 1),),
    gpus=8,
    pulls=(),
    classes=("fast", "slow"),
    default_class="fast",
)


def found(**changes: object) -> dict[str, tuple[str, str, str]]:
    verdicts = judge(dataclasses.replace(WELL, **changes))
    return {v.subject: (v.state, v.message, v.cure) for v in verdicts if v.state != "ok"}


def test_a_cluster_with_all_of_it() -> None:
    assert found() == {} and exit_code(judge(WELL)) == 0


@pytest.mark.parametrize(("changes", "subject", "state", "words"), [
    ({"kinds": frozenset({"PyTorchJob"})}, "kinds", "failed", "helm install egm charts/egm"),
    ({"kinds": frozenset(JOBS)}, "training-operator", "note", "Indexed Jobs"),
    ({"operators": ()}, "operator", "failed", "helm install"),
    ({"operators": (Workload("egm", "egm", 1, 0),)}, "operator", "failed", "kubectl -n egm describe deployment egm"),
    ({"operators": (Workload("egm", "egm", 1, 0),), "leaders": (Leader("egm", "a"),)}, "operator", "failed", "0 of 1 ready"),
    ({"operators": None}, "operator", "note", "your rights"),
    ({"trainers": ()}, "training-operator", "failed", "kubeflow/training-operator), or set backend to job"),
    ({"denied": ("create groundingtrainjobs",)}, "rights", "failed", "you may not create groundingtrainjobs"),
    ({"gpus": 0}, "GPUs", "warning", "device plug-in"),
    ({"gpus": None}, "GPUs", "note", "your rights"),
    ({"pulls": (Pull("a-0", "reg/egm-train:x", "not found"),)}, "images", "failed", "reg/egm-train:x of pod a-0"),
    ({"pulls": None}, "images", "note", "your rights"),
    ({"default_class": ""}, "storage", "note", "fast, slow"),
    ({"classes": None}, "storage", "note", "your rights"),
    ({"claims": (Claim("data", ""),)}, "storage", "failed", "claim data does not exist"),
    ({"claims": (Claim("data", "Lost"),)}, "storage", "failed", "claim data is Lost"),
])  # fmt: skip
def test_each_fault_has_one_verdict(changes: dict[str, object], subject: str, state: str, words: str) -> None:
    wrong = found(**changes)
    assert list(wrong) == [subject] and wrong[subject][0] == state
    assert words in wrong[subject][1] + wrong[subject][2]
    assert wrong[subject][2] or state == "note"


def test_an_operator_may_be_a_process_without_a_deployment() -> None:
    world = dataclasses.replace(WELL, operators=(), leaders=(Leader("default", "laptop-42"),))
    [verdict] = [v for v in judge(world) if v.subject == "operator"]
    assert verdict.state == "ok" and "laptop-42 holds the Lease in default" in verdict.message


def test_only_a_lease_that_was_renewed_in_time_has_a_holder() -> None:
    def lease(holder: str | None, renewed: str | None) -> dict[str, object]:
        spec = {"holderIdentity": holder, "renewTime": renewed, "leaseDurationSeconds": 15}
        return {"metadata": {"namespace": "egm"}, "spec": spec}

    now = datetime.datetime(2026, 1, 1, 0, 1, 0, tzinfo=datetime.UTC).timestamp()
    leases = [
        lease("a", "2026-01-01T00:00:50.000000Z"),
        lease("late", "2026-01-01T00:00:00.000000Z"),
        lease("", "2026-01-01T00:00:59.000000Z"),
        lease(None, None),
        {"metadata": {"namespace": "egm"}},
    ]
    assert leaders_of(leases, now) == (Leader("egm", "a"),)


def test_a_claim_that_is_bound_with_its_first_pod_is_well() -> None:
    assert found(claims=(Claim("data", "Pending"), Claim("more", "Bound"))) == {}
    assert list(found(claims=(Claim("data", "Pending"),), classes=(), default_class="")) == ["storage"]


def test_an_image_is_named_once_whichever_container_waits_for_it() -> None:
    def pod(name: str, key: str, reason: str) -> dict[str, object]:
        state = {"waiting": {"reason": reason, "message": "manifest unknown"}}
        return {"metadata": {"name": name}, "status": {key: [{"image": "reg/train:x", "state": state}]}}

    pods = [
        pod("a", "initContainerStatuses", "ImagePullBackOff"),
        pod("b", "containerStatuses", "ErrImagePull"),
        pod("c", "containerStatuses", "ContainerCreating"),
        {"metadata": {"name": "d"}},
    ]
    assert pulls_of(pods) == (Pull("a", "reg/train:x", "manifest unknown"),)


def test_the_rights_are_those_of_the_role_that_the_chart_gives() -> None:
    assert {r for _, r, _ in RIGHTS} == {*(kind.plural for kind in JOBS.values()), "pods", "pods/log"}
