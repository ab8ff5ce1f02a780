"""The builders of objects: rights and files of pods, owners of objects, and merging of a user's template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from egm_operator.manifests.merge import merge
from egm_operator.names import GANG_ROLES, child
from egm_operator.render import UID, objects, render
from egm_operator.settings import Settings, load
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grounding.api import ResolvedEvalJob, parse
from grounding.api import load as load_jobs
from grounding.api.models import TrainSpec
from grounding.errors import UserError
from grounding.evaluate.engines import get_engine
from grounding.evaluate.role import serve_options
from tests.unit.operator.world import World, evaluation, train

JOBS = Path(__file__).parents[4] / "jobs"
SETTINGS = Settings(default_output="pvc://egm/runs")


def _pod_specs(obj: dict[str, Any]) -> list[dict[str, Any]]:
    if obj["kind"] == "Pod":
        return [obj["spec"]]
    if obj["kind"] == "Job":
        return [obj["spec"]["template"]["spec"]]
    if obj["kind"] == "PyTorchJob":
        return [r["template"]["spec"] for r in obj["spec"]["pytorchReplicaSpecs"].values()]
    return []


def _job(text: str, settings: Settings = SETTINGS) -> dict[str, dict[str, Any]]:
    found = objects(parse(text)[0], None, settings, "ns")
    return {f"{o['kind']}/{o['metadata']['name']}": o for o in found}


TRAIN = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: t}
spec:
  preset: egm-8b-rl
  data: {train: [pvc://coco/a.json], validation: [/d/b.jsonl], images: [/d/coco.tar]}
  hyperparameters: {batchSize: 240}  # 240 is a multiple of the 24 GPUs of 3 nodes
  resources: {nodes: 3, gpusPerNode: 8, sharedMemory: 64Gi, topology: rack}
"""


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.name)
def test_every_pod_is_restricted_and_every_object_owned(path: Path) -> None:
    jobs = load_jobs(path)
    for job in jobs:
        for obj in objects(job, {j.metadata.name: j for j in jobs}, SETTINGS, "ns"):
            owner = obj["metadata"]["ownerReferences"][0]
            assert owner["controller"] and owner["blockOwnerDeletion"] and owner["name"] == job.metadata.name
            assert obj["metadata"]["namespace"] == "ns" and len(obj["metadata"]["name"]) <= 63
            for spec in _pod_specs(obj):
                assert spec["automountServiceAccountToken"] is False
                assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"] == {
                    "type": "RuntimeDefault"
                }
                for container in [*spec["containers"], *spec.get("initContainers", [])]:
                    context = container["securityContext"]
                    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
                    assert context["capabilities"] == {"drop": ["ALL"]}
                    assert container["command"][:2] == ["egm", "role"]
                    named = {v["name"] for v in spec["volumes"]}
                    assert {m["name"] for m in container["volumeMounts"]} <= named


def test_a_gang() -> None:
    gang = _job(TRAIN)["PyTorchJob/t-a1"]
    master, worker = gang["spec"]["pytorchReplicaSpecs"]["Master"], gang["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert (master["replicas"], worker["replicas"]) == (1, 2) and master["template"] == worker["template"]
    assert gang["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "schedulingPolicy": {"minAvailable": 3}}
    spec = master["template"]["spec"]
    assert (
        spec["containers"][0]["name"] == "pytorch"
        and spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    )
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}} in spec["volumes"]
    term = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert term["topologyKey"] == "rack" and term["labelSelector"]["matchLabels"] == {"grounding.egm.dev/uid": UID}


def _environment(template: dict[str, Any]) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in template["spec"]["containers"][0]["env"]}


def test_a_gang_of_core_kubernetes() -> None:
    found = _job(TRAIN + "  backend: job\n")
    assert not [name for name in found if name.startswith("PyTorchJob/")]
    spec = found["Job/t-a1"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == ("Indexed", 3, 3, 0)  # fmt: skip
    assert spec["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert "suspend" not in spec and "managedBy" not in spec
    template, [(name, service)] = spec["template"], [(n, o) for n, o in found.items() if n.startswith("Service/")]
    env, host = _environment(template), name.partition("/")[2]
    assert (env["WORLD_SIZE"], env["MASTER_PORT"], env["MASTER_ADDR"]) == ("3", "23456", f"t-a1-0.{host}.ns.svc")
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["RANK"] == {"fieldRef": {"fieldPath": index}}
    assert template["spec"]["subdomain"] == host and template["spec"]["restartPolicy"] == "Never"
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert "grounding.egm.dev/attempt" not in service["spec"]["selector"]  # later attempts have the same Service
    assert list(found).index(name) < list(found).index("Job/t-a1")


def test_a_gang_of_one_needs_no_name() -> None:
    found = _job(TRAIN.replace("nodes: 3", "nodes: 1") + "  backend: job\n")
    assert not [name for name in found if name.startswith(("Service/", "Secret/"))]
    template = found["Job/t-a1"]["spec"]["template"]
    assert _environment(template)["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in _environment(template)
    assert "subdomain" not in template["spec"]


def test_both_back_ends_run_the_same_pod() -> None:
    """Only the names of container and port differ, and the pod's rank, which the controller of a PyTorchJob sets."""
    here = _job(TRAIN + "  backend: job\n")["Job/t-a1"]["spec"]["template"]
    there = _job(TRAIN)["PyTorchJob/t-a1"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    ours, theirs = _environment(here), _environment(there)
    ranks = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"}
    assert ours.keys() - theirs.keys() == ranks and {k: v for k, v in ours.items() if k not in ranks} == theirs
    for template in (here, there):
        template["spec"].pop("subdomain", None)
        for name in ("name", "ports", "env"):
            template["spec"]["containers"][0].pop(name)
    assert here == there


def test_a_queued_gang_of_core_kubernetes_waits_suspended() -> None:
    job = _job(TRAIN + "  backend: job\n  queue: q\n")["Job/t-a1"]
    assert job["spec"]["suspend"] is True and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"


@pytest.mark.parametrize("name", ["t", "8b", "8" * 63])
def test_a_service_s_name_begins_with_a_letter(name: str) -> None:
    text = TRAIN.replace("name: t}", f"name: {name!r}}}") + "  backend: job\n"
    [service] = [n.partition("/")[2] for n in _job(text) if n.startswith("Service/")]
    assert service[0].isalpha() and len(service) <= 63


def test_the_roles_of_gangs_are_the_methods_of_training() -> None:
    assert get_args(TrainSpec.model_fields["method"].annotation) == ("sft", "rl") and sorted(GANG_ROLES) == [
        "rl",
        "sft",
    ]


def test_pods_of_several_nodes_share_a_token_that_nobody_writes_down() -> None:
    found = _job(TRAIN)
    name, secret = next((n.partition("/")[2], o) for n, o in found.items() if n.startswith("Secret/t-token-"))
    assert "data" not in secret and "stringData" not in secret
    container = found["PyTorchJob/t-a1"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": "token"}}} in container["env"]
    assert not [n for n in _job(TRAIN.replace("nodes: 3", "nodes: 1")) if n.startswith("Secret/")]


def test_claims_are_mounted_and_the_job_s_file_names_their_paths() -> None:
    found = _job(TRAIN)
    template = found["Job/t-prepare"]["spec"]["template"]
    text = template["metadata"]["annotations"]["grounding.egm.dev/job.yaml"]
    job = orjson.loads(text)
    assert job["spec"]["data"]["train"] == ["/egm/claims/coco/a.json"] and "podTemplate" not in job["spec"]
    assert parse(text)[0].metadata.name == "t"  # the pods must be able to read this text
    spec = template["spec"]
    file = next(v for v in spec["volumes"] if v["name"] == "job")["downwardAPI"]["items"]
    assert file == [
        {"path": "job.yaml", "fieldRef": {"fieldPath": "metadata.annotations['grounding.egm.dev/job.yaml']"}}
    ]
    mounts = {m["mountPath"]: m for m in spec["containers"][0]["volumeMounts"]}
    assert mounts["/egm/claims/coco"]["readOnly"] and mounts["/egm/work"]["subPath"] == "runs/ns/t"
    claims = {v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {"egm", "coco"} and "initContainers" not in spec


def test_without_a_shared_claim_each_pod_prepares_for_itself() -> None:
    found = _job(TRAIN + "  output: s3://b/t\n")
    assert "Job/t-prepare" not in found
    gang = found["PyTorchJob/t-a1"]
    spec = gang["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    first = spec["initContainers"][0]
    assert (
        first["command"][2] == "prepare"
        and "ports" not in first
        and "nvidia.com/gpu" not in first["resources"]["requests"]
    )
    assert {"name": "EGM_OUTPUT", "value": "s3://b/t"} in first["env"]


@pytest.mark.parametrize(
    ("template", "period", "role"),
    [
        ("", 120, "110.0"),
        ("  podTemplate: {spec: {terminationGracePeriodSeconds: 600}}\n", 600, "590.0"),
        ("  podTemplate: {spec: {terminationGracePeriodSeconds: 20}}\n", 20, "15.0"),
    ],
)
def test_containers_know_the_grace_period_of_their_pod(template: str, period: int, role: str) -> None:
    found = _job(TRAIN + "  output: s3://b/t\n" + template)
    spec = found["PyTorchJob/t-a1"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == period
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {"name": "EGM_GRACE_SECONDS", "value": role} in container["env"]


def test_what_the_user_mounts_for_main_is_there_when_data_is_prepared() -> None:
    text = (
        TRAIN
        + """  output: s3://b/t
  podTemplate:
    spec:
      containers:
        - {name: main, image: mine:1, env: [{name: A, value: b}], volumeMounts: [{name: data, mountPath: /data}], resources: {limits: {x/y: 1}}}
      volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
"""
    )
    spec = _job(text)["PyTorchJob/t-a1"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    (first,), (main,) = spec["initContainers"], spec["containers"]
    for container in (first, main):
        assert container["image"] == "mine:1" and {"name": "A", "value": "b"} in container["env"]
        assert "/data" in [m["mountPath"] for m in container["volumeMounts"]]
    assert first["command"][2] == "prepare" and "x/y" not in first["resources"].get("limits", {})
    assert {"name": "CUDA_VISIBLE_DEVICES", "value": "-1"} in first["env"]


def test_secrets_are_referenced_never_copied() -> None:
    text = TRAIN + "  tracking: {wandb: {apiKeySecret: {name: keys, key: wandb}, project: p}}\n"
    gang = _job(text, Settings(default_output="s3://b/o", storage_secret="s3-credentials"))["PyTorchJob/t-a1"]
    container = gang["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "wandb"}}} in container[
        "env"
    ]
    assert container["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]


@pytest.mark.parametrize(
    ("hosts", "told"), [((), {}), (("w.example", "m:5000"), {"EGM_TRACKING_HOSTS": "w.example,m:5000"})]
)
def test_who_submits_a_job_does_not_choose_the_home_of_a_tracking_key(
    hosts: tuple[str, ...], told: dict[str, str]
) -> None:
    """The storage Secret may contain a key, and a manifest must not choose the server that gets it."""
    text = TRAIN + "  tracking: {wandb: {baseUrl: https://evil.example}, mlflow: {trackingUri: https://evil.example}}\n"
    gang = _job(text, Settings(default_output="s3://b/o", tracking_hosts=hosts))["PyTorchJob/t-a1"]
    container = gang["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert "evil.example" not in str(env.values())
    assert {name: value for name, value in env.items() if name == "EGM_TRACKING_HOSTS"} == told


EVAL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: e}
spec:
  model: {source: MODEL}
  data: {root: /d, images: [/d/coco.tar]}
"""


@pytest.mark.parametrize(
    "model", ["model: {source: hf://a/b}", "sweep: {models: [{source: hf://a/b}, {source: hf://c/d}]}"]
)
def test_servers_ask_for_a_key_that_only_the_client_has_and_nobody_writes_down(model: str) -> None:
    found = objects(parse(EVAL.replace("model: {source: MODEL}", model))[0], {}, SETTINGS, "ns")
    [secret] = [obj for obj in found if obj["kind"] == "Secret"]
    assert set(secret) == {"apiVersion", "kind", "metadata", "type"}, (
        "expected a Secret without data: the value is drawn when the Secret is created"
    )
    assert found.index(secret) < min(i for i, obj in enumerate(found) if obj["kind"] == "Pod")
    reference = {"secretKeyRef": {"name": secret["metadata"]["name"], "key": "token"}}
    for obj in found:
        for spec in _pod_specs(obj):
            asked = obj["metadata"]["labels"]["grounding.egm.dev/role"] in ("server", "evaluate")
            [main] = spec["containers"]
            keys = [each for each in main["env"] if each["name"] == "EGM_API_KEY"]
            assert keys == ([{"name": "EGM_API_KEY", "valueFrom": reference}] if asked else [])
            for first in spec.get("initContainers", []):
                assert "EGM_API_KEY" not in {each["name"] for each in first["env"]}
            assert "EGM_API_KEY" not in orjson.dumps(main["command"]).decode()


def test_a_hosted_service_s_key_headers_and_certificates_reach_the_client_by_reference() -> None:
    more = """
  engine: openai
  endpoints: [https://host/gateway/v1]
  apiKeySecret: {name: keys, key: openai}
  headerSecrets: [{header: X-Team, name: other, key: team}]
  caConfigMap: {name: authority, key: root.pem}
"""
    found = _job(EVAL.replace("MODEL", "gpt-x") + more)
    assert not any("server" in name for name in found), "expected no object of a server, because the job uses endpoints"
    spec = found["Job/e-eval-client-1"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    by_name = {each["name"]: each for each in container["env"]}
    for variable, secret, key in (("EGM_API_KEY", "keys", "openai"), ("EGM_HEADER_X_TEAM", "other", "team")):
        assert by_name[variable] == {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
    [mount] = [m for m in container["volumeMounts"] if m["name"] == "ca"]
    assert by_name["EGM_CA_FILE"]["value"] == mount["mountPath"] + "/ca.pem" and mount["readOnly"]
    [volume] = [v for v in spec["volumes"] if v["name"] == "ca"]
    assert volume["configMap"] == {"name": "authority", "items": [{"key": "root.pem", "path": "ca.pem"}]}
    other = _pod_specs(found["Job/e-eval-prepare"])[0]["containers"][0]
    assert not {"EGM_API_KEY", "EGM_HEADER_X_TEAM"} & {each["name"] for each in other["env"]}


@pytest.mark.parametrize(
    ("more", "copies"),
    [("tensorParallel: 8", 1), ("tensorParallel: 4", 2), ("tensorParallel: 4\n  pipelineParallel: 2", 1)],
)
def test_a_large_model_s_servers_and_client_agree_on_the_copies(more: str, copies: int) -> None:
    model = EVAL.replace("MODEL", "hf://Qwen/Qwen3-VL-235B-A22B-Thinking")
    found = _job(f"{model}  servers: 2\n  gpusPerServer: 8\n  {more}\n")
    servers = [obj for name, obj in found.items() if name.startswith("Pod/e-eval-server-")]
    assert len(servers) == 2
    for obj in servers:
        [container] = obj["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        [job] = parse(obj["metadata"]["annotations"]["grounding.egm.dev/job.yaml"])
        assert isinstance(job, ResolvedEvalJob)
        argv = get_engine("sglang").command("/m", serve_options(job, "0.0.0.0", 30000, 32768))
        shared = " ".join(argv)
        assert f"--dp-size {copies} --tp-size {job.spec.tensor_parallel}" in shared
        assert ("--pp-size 2" in shared) == ("pipeline" in more)
    client = found["Job/e-eval-client-1"]["spec"]["template"]
    [job] = parse(client["metadata"]["annotations"]["grounding.egm.dev/job.yaml"])
    assert isinstance(job, ResolvedEvalJob) and job.spec.copies == copies
    assert get_engine(job.spec.engine).routing(job.spec.copies).copies == copies


def test_the_user_s_template_is_merged_by_key() -> None:
    text = (
        TRAIN
        + """
  podTemplate:
    metadata:
      labels: {team: vision, grounding.egm.dev/job: other}
      annotations: {note: x, grounding.egm.dev/job.yaml: other}
    spec:
      tolerations: [{key: gpu, operator: Exists}]
      containers:
      - {name: main, env: [{name: NCCL_DEBUG, value: INFO}, {name: HOME, value: /scratch}], volumeMounts: [{name: d, mountPath: /d}]}
      - {name: sidecar, image: x}
      volumes: [{name: d, persistentVolumeClaim: {claimName: data}}]
"""
    )
    gang = _job(text)["PyTorchJob/t-a1"]
    template = gang["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert (
        template["metadata"]["labels"]["team"] == "vision"
        and template["metadata"]["labels"]["grounding.egm.dev/job"] == "t"
    )
    notes = template["metadata"]["annotations"]
    assert notes["note"] == "x" and notes["grounding.egm.dev/job.yaml"].startswith("{")
    main, sidecar = template["spec"]["containers"]
    env = {e["name"]: e.get("value") for e in main["env"]}
    assert (
        (env["NCCL_DEBUG"], env["HOME"]) == ("INFO", "/scratch")
        and main["name"] == "pytorch"
        and sidecar["name"] == "sidecar"
    )
    assert main["image"] == SETTINGS.train_image and {m["mountPath"] for m in main["volumeMounts"]} >= {
        "/d",
        "/egm/job",
        "/tmp",
    }
    assert {"key": "gpu", "operator": "Exists"} in template["spec"]["tolerations"]


def test_queue_and_priority_are_passed_on() -> None:
    gang = _job(TRAIN + "  queue: q\n  priorityClassName: high\n")["PyTorchJob/t-a1"]
    assert gang["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    policy = gang["spec"]["runPolicy"]
    assert policy["suspend"] and policy["schedulingPolicy"] == {"minAvailable": 3, "priorityClass": "high"}
    assert gang["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["priorityClassName"] == "high"


LABELLED = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata:
  name: t
  labels:
    kueue.x-k8s.io/queue-name: gpus
    kueue.x-k8s.io/priority-class: urgent
    team: vision
    example.com/cost-centre: "7"
    app.kubernetes.io/instance: deployed-by-a-tool
    argocd.argoproj.io/instance: deployed-by-a-tool
  annotations:
    kueue.x-k8s.io/podset-required-topology: cloud.example.com/rack
    provreq.kueue.x-k8s.io/ValidUntilSeconds: "60"
    scheduling.volcano.sh/queue-name: research
    kubectl.kubernetes.io/last-applied-configuration: "{}"
spec:
  preset: egm-8b-rl
  schedulerName: volcano
  data: {train: [pvc://coco/a.json], validation: [/d/b.jsonl], images: [/d/coco.tar]}
  resources: {nodes: 2, gpusPerNode: 8}
"""
OURS = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "urgent"}
OF_THE_JOB = {"team": "vision", "example.com/cost-centre": "7"}


@pytest.mark.parametrize("backend", ["pytorchjob", "job"])
def test_a_job_s_labels_and_annotations_are_handed_down(backend: str) -> None:
    found = _job(LABELLED + f"  backend: {backend}\n")
    gang = found["PyTorchJob/t-a1" if backend == "pytorchjob" else "Job/t-a1"]
    pod = (
        gang["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        if backend == "pytorchjob"
        else gang["spec"]["template"]
    )
    labels = gang["metadata"]["labels"]
    assert OURS.items() <= labels.items() and OF_THE_JOB.items() <= pod["metadata"]["labels"].items()
    assert gang["metadata"]["annotations"] == {"provreq.kueue.x-k8s.io/ValidUntilSeconds": "60"}
    annotations = pod["metadata"]["annotations"]
    assert annotations["kueue.x-k8s.io/podset-required-topology"] == "cloud.example.com/rack"
    assert annotations["scheduling.volcano.sh/queue-name"] == "research" and pod["spec"]["schedulerName"] == "volcano"
    assert "kubectl.kubernetes.io/last-applied-configuration" not in annotations
    for obj in found.values():
        have = obj["metadata"]["labels"]
        assert OF_THE_JOB.items() <= have.items() and "app.kubernetes.io/instance" not in have
        assert not [name for name in have if "argoproj" in name], (
            "expected no label of Argo CD, which would take the object for one of its own"
        )
    data = found["Job/t-prepare"]
    assert not OURS.keys() & data["metadata"]["labels"].keys(), (
        "the preparing Job must not have the labels of the queue, because it needs no GPU"
    )
    assert "kueue.x-k8s.io/podset-required-topology" not in data["spec"]["template"]["metadata"]["annotations"]


def test_volcano_has_a_queue_of_its_own() -> None:
    policy = _job(LABELLED)["PyTorchJob/t-a1"]["spec"]["runPolicy"]
    assert policy["suspend"] and policy["schedulingPolicy"] == {"minAvailable": 2, "queue": "research"}


def test_servers_have_the_labels_too() -> None:
    text = "apiVersion: grounding.egm.dev/v1alpha1\nkind: GroundingEvalJob\nmetadata: {name: e, labels: {team: vision, "
    text += "kueue.x-k8s.io/queue-name: gpus}}\nspec: {model: {source: hf://x/y}, data: {root: /d, images: [/i]}}\n"
    found = _job(text)
    labels, annotations = (found["Pod/e-eval-server-0"]["metadata"][part] for part in ("labels", "annotations"))
    assert labels["team"] == "vision" and labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert labels["kueue.x-k8s.io/pod-group-name"] == labels["grounding.egm.dev/group"]
    assert annotations["kueue.x-k8s.io/pod-group-total-count"] == "1"
    assert annotations["kueue.x-k8s.io/retriable-in-group"] == "false", (
        "expected false; otherwise Kueue keeps the pods and the quota forever"
    )
    client = found["Job/e-eval-client-1"]["metadata"]["labels"]
    assert client["team"] == "vision" and "kueue.x-k8s.io/queue-name" not in client, (
        "expected a client without a queue, so that it never waits for quota"
    )


def test_a_job_without_a_place_for_its_output() -> None:
    with pytest.raises(UserError, match=r"spec\.output"):
        render([JOBS / "demo.yaml"], Settings(), "default")


_VALUE = st.recursive(
    st.one_of(st.integers(0, 3), st.sampled_from(["a", "b"])),
    lambda inner: st.dictionaries(st.sampled_from(["x", "y", "spec"]), inner, max_size=3),
    max_leaves=6,
)
_NAMED = st.lists(
    st.fixed_dictionaries({"name": st.sampled_from("abc")}, optional={"v": _VALUE}),
    max_size=3,
    unique_by=lambda e: e["name"],
)
_TEMPLATE = st.fixed_dictionaries(
    {}, optional={"containers": _NAMED, "env": _NAMED, "tolerations": st.lists(_VALUE, max_size=2), "x": _VALUE}
)


@given(_TEMPLATE, _TEMPLATE)
def test_merging_is_idempotent_keeps_keys_apart_and_changes_neither_side(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    before = copy.deepcopy((ours, theirs))
    merged = merge(ours, theirs)
    assert (ours, theirs) == before and merge(merged, theirs) == merged and merge(ours, {}) == ours
    for field in ("containers", "env"):
        names = [e["name"] for e in merged.get(field, [])]
        assert len(names) == len(set(names))
        assert set(names) == {e["name"] for e in [*ours.get(field, []), *theirs.get(field, [])]}


@given(
    st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True),
    st.sampled_from(["a1", "prepare", "client-12"]),
)
def test_names_fit_and_do_not_collide(job: str, suffix: str) -> None:
    name = child(job, suffix)
    assert len(name) <= 52 and name.endswith(suffix) and child(job, suffix) == name
    if len(job) < 63:
        assert child(job + "x", suffix) != name


_WORDS = st.sampled_from(["x", "1", "j", "j-1", "eval", "a1", "m2", "server-0", "client", "prepare", "train", "x" * 40])
_NAMES = st.lists(_WORDS, min_size=1, max_size=4).map(lambda words: "-".join(words)[:63].rstrip("-"))
_JOBS = st.tuples(st.sampled_from(["train", "job", "evaluation", "sweep"]), _NAMES)


def _children(kind: str, name: str) -> set[tuple[str, str]]:
    """Return kind and name of the objects that two attempts of a job create."""
    if kind in ("train", "job"):
        world = World(train(backend="pytorchjob" if kind == "train" else "job", maxAttempts=2), name=name)
    else:
        models = {"models": [{"source": f"hf://x/{n}"} for n in ("a", "b")]}
        swept = {"model": None, "sweep": models} if kind == "sweep" else {}
        spec = {key: value for key, value in evaluation(**swept)["spec"].items() if value is not None}
        world = World({**evaluation(), "spec": spec | {"output": "pvc://claim/out", "maxAttempts": 2}}, name=name)
    while not world.status.get("completionTime"):
        world.controllers()
        world.start()
        world.reconcile()
        world.end("prepare", 0)
        world.end("rl", 1 if world.status.get("attempt") == 1 else 0)
        world.end("evaluate", 0)
        world.now += 20
    assert world.status["phase"] == "Succeeded", world.status
    return world.names


@example(("train", "x-eval"), ("evaluation", "x"))
@example(("job", "x-eval"), ("sweep", "x"))
@example(("evaluation", "1"), ("evaluation", "j-1"))
@given(_JOBS, _JOBS)
@settings(max_examples=30, deadline=None)
def test_no_object_of_a_job_has_the_name_of_another_job_s(one: tuple[str, str], other: tuple[str, str]) -> None:
    kinds = {"train": "train", "job": "train", "evaluation": "evaluation", "sweep": "evaluation"}
    if (kinds[one[0]], one[1]) == (kinds[other[0]], other[1]):
        return  # the same job
    assert not _children(*one) & _children(*other)


def test_settings_from_the_environment() -> None:
    found = load(
        {
            "EGM_OPERATOR_NAMESPACES": "b, a",
            "EGM_OPERATOR_WORKERS": "3",
            "EGM_OPERATOR_LEADER_ELECT": "false",
            "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "1.5",
        }
    )
    assert (
        found.namespaces == ("a", "b")
        and found.workers == 3
        and not found.leader_elect
        and found.backoff_base_seconds == 1.5
    )
    for name, value in (
        ("EGM_OPERATOR_WORKERS", "many"),
        ("EGM_OPERATOR_WORKERS", "0"),
        ("EGM_OPERATOR_LEADER_ELECT", "perhaps"),
        ("EGM_OPERATOR_PROGRESS_VIA", "pigeon"),
        ("EGM_OPERATOR_HEALTH_PORT", "70000"),
        ("EGM_OPERATOR_GRACE_SECONDS", "-1"),
        ("EGM_OPERATOR_BACKOFF_BASE_SECONDS", "nan"),
        ("EGM_OPERATOR_LOG_FORMAT", "xml"),
        ("EGM_OPERATOR_WORKRES", "3"),
    ):
        with pytest.raises(UserError, match=name):
            load({name: value})


def test_settings_are_defaults_wherever_they_are_made_and_a_service_s_variables_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EGM_OPERATOR_WORKERS", "3")
    assert Settings().workers == 8
    of_service = {"EGM_OPERATOR_SERVICE_HOST": "10.0.0.1", "EGM_OPERATOR_PORT_8080_TCP": "tcp://10.0.0.1:8080"}
    of_service |= {"EGM_OPERATOR_PORT": "tcp://10.0.0.1:8080", "EGM_OPERATOR_METRICS_SERVICE_PORT_HTTP": "8080"}
    assert load({**of_service, "EGM_OPERATOR_LEASE_NAME": "", "EGM_WORKERS": "x"}) == Settings()


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[4] / "docs" / "operator.md").read_text()
    for name in Settings.model_fields:
        assert f"`{Settings.variable(name)}`" in text, name


def test_every_reason_is_documented() -> None:
    from egm_operator.status import Reason

    text = (Path(__file__).parents[4] / "docs" / "operator.md").read_text()
    assert [r for r in Reason if f"`{r}`" not in text] == []
