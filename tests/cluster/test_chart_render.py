"""The chart without a cluster: lint, snapshots, refused values, and settings that the operator understands.

EGM_UPDATE=1 writes the snapshots again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from egm_operator.settings import Settings, load
from ruamel.yaml import YAML

from tests.cluster.chart_kit import CHART, CI, ROOT, VERSION, granted, helm, of_kind, template

SNAPSHOTS = Path(__file__).parent / "snapshots"
# values that the chart itself sets
BY_CHART = {"namespaces", "identity", "lease_name", "lease_namespace", "health_port", "health_host", "leader_elect"}
BY_CHART |= {"network_policies", "network_telemetry_from", "network_scrape_from", "network_egress"}

IMAGES = {"trainImage": "EGM_OPERATOR_TRAIN_IMAGE", "inferImage": "EGM_OPERATOR_INFER_IMAGE"}
"""Settings that the chart derives from `image`, and their variables."""


def _short(obj: dict[str, Any]) -> dict[str, Any]:
    """Shorten definitions and dashboards to their names, because other tests check their content."""
    if obj["kind"] == "CustomResourceDefinition":
        return {**obj, "spec": "..."}
    if "-dashboard-" in obj["metadata"]["name"]:
        return {**obj, "data": dict.fromkeys(obj["data"], "...")}
    return obj


@pytest.mark.parametrize(
    ("registry", "accepted"),
    [
        ("myteam", False),
        ("myteam/egm", False),
        ("docker.io/myteam", True),
        ("host:5000", True),
        ("localhost/egm", True),
        ("host.example/egm/", True),
        ("", True),
    ],
)
def test_a_registry_without_a_host_is_refused(registry: str, accepted: bool) -> None:
    """As by images/push.sh. An empty one means that image.repository and the settings have whole names."""
    if accepted:
        prefix = f"{registry.removesuffix('/')}/" if registry else ""
        assert _container("--set", f"image.registry={registry}")["image"] == f"{prefix}egm-operator:dev"
        return
    refused = helm("template", "egm", str(CHART), VERSION, "--set", f"image.registry={registry}", check=False)
    assert refused.returncode
    assert f"nodes would pull from docker.io/{registry}. Write the host" in refused.stderr


@pytest.mark.parametrize("values", CI, ids=lambda p: p.name.removesuffix("-values.yaml"))
def test_lint_and_snapshot(values: Path, tmp_path: Path) -> None:
    helm("lint", str(CHART), VERSION, "--strict", "-f", str(values))
    objects = [_short(o) for o in template("-f", str(values))]
    names = [(o["apiVersion"], o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 1000
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    made = tmp_path / "made.yaml"
    with made.open("w") as out:
        yaml.dump_all(objects, out)
    kept = SNAPSHOTS / f"{values.name.removesuffix('-values.yaml')}.yaml"
    if os.environ.get("EGM_UPDATE") == "1":
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(made.read_text())
    assert made.read_text() == kept.read_text(), (
        "the rendered chart differs from its snapshot: check the difference, then run this test with EGM_UPDATE=1"
    )


def _key(field: str) -> str:
    first, *rest = field.split("_")
    return first + "".join(w.capitalize() for w in rest)


def _written(value: object) -> object:
    """Return a default as values.yaml has it: a list of names is one text with commas."""
    return ",".join(value) if isinstance(value, tuple) else value


def test_every_setting_of_the_operator_is_a_value_with_the_same_default() -> None:
    values = YAML(typ="safe").load((CHART / "values.yaml").read_text())["settings"]
    wanted = {_key(f): _written(getattr(Settings(), f)) for f in Settings.model_fields if f not in BY_CHART}
    assert values == wanted | dict.fromkeys(IMAGES, "")
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"]["properties"]
    assert set(schema) == set(wanted)


def _container(*argv: str) -> dict[str, Any]:
    (deployment,) = of_kind(template(*argv), "Deployment")
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


def _environment(*argv: str) -> dict[str, str]:
    return {e["name"]: e.get("value", "filled-in") for e in _container(*argv)["env"]}


@pytest.mark.parametrize(("variant", "engine"), [("cpu", "sglang"), ("gpu", "sglang"), ("gpu", "vllm")])
def test_the_images_are_those_of_make_push(variant: str, engine: str) -> None:
    """The registry and the tag are given once; three tags of three images follow as in images/names.sh."""
    script = ". images/names.sh; for i in operator train infer; do image $i; done"
    environ = {**os.environ, "VARIANT": variant, "ENGINE": engine, "TAG": "v2"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    values = f"image.registry=host:5000/egm,image.tag=v2,image.variant={variant},image.engine={engine}"
    container = _container("--set", values)
    found = {e["name"]: e.get("value") for e in container["env"]}
    assert [container["image"], *(found[v] for v in IMAGES.values())] == [
        f"host:5000/egm/{n}" for n in done.stdout.split()
    ]
    given = _environment("--set", values + ",settings.trainImage=other/train:1")
    assert given["EGM_OPERATOR_TRAIN_IMAGE"] == "other/train:1"
    assert given["EGM_OPERATOR_INFER_IMAGE"] == found["EGM_OPERATOR_INFER_IMAGE"]


def test_images_of_a_release_without_a_tag_have_the_version() -> None:
    container = _container("--set", "image.tag=,image.registry=host.example/egm")
    version = YAML(typ="safe").load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert container["image"] == f"host.example/egm/egm-operator:{version}"
    assert {"name": "EGM_OPERATOR_TRAIN_IMAGE", "value": f"host.example/egm/egm-train:{version}-gpu"} in container[
        "env"
    ]


@pytest.mark.parametrize("values", CI, ids=lambda p: p.name.removesuffix("-values.yaml"))
def test_the_operator_understands_the_environment(values: Path) -> None:
    environ = _environment("-f", str(values))
    settings = load({k: v for k, v in environ.items() if k.startswith("EGM_")})
    given = YAML(typ="safe").load(values.read_text()) or {}
    for field in Settings.model_fields:
        wanted = (given.get("settings") or {}).get(_key(field))
        if wanted is not None:
            assert getattr(settings, field) == wanted
    assert settings.namespaces == tuple(given.get("watchNamespaces", ()))
    assert settings.leader_elect and settings.lease_namespace == "egm-system"
    known = {Settings.variable(f) for f in Settings.model_fields} | {e["name"] for e in given.get("extraEnv", [])}
    assert set(environ) <= known


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("replica=2", "replica"),
        ("settings.gpuResorce=x", "gpuResorce"),
        ("metrics.serviceMonitor.enable=true", "enable"),
        ("settings.progressVia=carrier-pigeon", "progressVia"),
        ("settings.workers=0", "workers"),
        ("image.digest=sha256:12", "digest"),
        ("image.variant=tpu", "variant"),
        ("image.engine=transformers", "engine"),
        ("watchNamespaces={A_B}", "watchNamespaces"),
        ("kueue.localQueues[0].name=a", "localQueues"),
        ("settings.defaultOutput=/data", "defaultOutput"),
        ("settings.backend=jobset", "backend"),
        ("crds.install=perhaps", "install"),
    ],
)
def test_wrong_values_are_refused_with_their_name(wrong: str, told: str) -> None:
    done = helm("template", "egm", str(CHART), VERSION, "--set", wrong, check=False)
    assert done.returncode != 0 and told in done.stderr and "values" in done.stderr


def test_every_value_is_in_the_schema_and_refuses_neighbours() -> None:
    """An object of the schema that lists its keys refuses all other keys."""

    def check(schema: dict[str, Any], path: str) -> None:
        if "properties" in schema and path != "extraEnv[]":
            assert schema.get("additionalProperties") is False, path
        for key, inner in schema.get("properties", {}).items():
            check(inner, f"{path}.{key}".lstrip("."))
        if isinstance(schema.get("items"), dict):
            check(schema["items"], f"{path}[]")

    whole = json.loads((CHART / "values.schema.json").read_text())
    check(whole, "")
    for name, definition in whole["definitions"].items():
        check(definition, name)


def test_a_cluster_without_pytorchjobs_is_told_at_install_time() -> None:
    template("--api-versions", "v1/Pod")  # on a cluster without PyTorchJob, trainings are Jobs
    wanted = ("--set", "settings.backend=pytorchjob")
    done = helm("template", "egm", str(CHART), VERSION, "--api-versions", "v1/Pod", *wanted, check=False)
    assert (
        done.returncode != 0
        and "training-operator v1.9" in done.stderr
        and "trainingOperator.check=warn" in done.stderr
    )
    template("--api-versions", "v1/Pod", "--api-versions", "kubeflow.org/v1/PyTorchJob", *wanted)
    template("--api-versions", "v1/Pod", "--set", "trainingOperator.check=warn", *wanted)


def test_definitions_are_those_of_the_models_and_are_kept() -> None:
    from grounding.api.crd import crds

    kept = {o["metadata"]["name"]: o for o in of_kind(template(), "CustomResourceDefinition")}
    assert {n: o["spec"] for n, o in kept.items()} == {c["metadata"]["name"]: c["spec"] for c in crds().values()}
    for obj in kept.values():
        assert obj["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    free = of_kind(template("--set", "crds.keep=false"), "CustomResourceDefinition")
    assert free and not any("annotations" in o["metadata"] for o in free)
    assert not of_kind(template("--set", "crds.install=false"), "CustomResourceDefinition")


def test_both_forms_of_rights_are_the_same_but_for_the_cluster_s_own_scope() -> None:
    wide, narrow = template(), template("--set", "watchNamespaces={team-a,team-b}")
    assert granted(wide) - granted(narrow) == {
        ("apiextensions.k8s.io", "customresourcedefinitions", v) for v in ("list", "watch")
    }
    assert granted(narrow) <= granted(wide)
    assert not [o for o in narrow if o["kind"] == "ClusterRoleBinding"]
    everywhere = {o["metadata"]["namespace"] for o in of_kind(narrow, "RoleBinding")}
    assert everywhere == {"team-a", "team-b", "egm-system"}
    nothing_wide = template("-f", str(CHART / "ci" / "namespaced-values.yaml"))
    assert not [o["kind"] for o in nothing_wide if o["kind"].startswith(("Cluster", "CustomResource", "Validating"))]
    assert ("", "pods/proxy", "get") in granted(nothing_wide) - granted(wide)


def test_no_right_is_a_wildcard_and_secrets_cannot_be_read() -> None:
    found = granted(template("--set", "settings.progressVia=proxy"))
    assert not [r for r in found if "*" in "".join(r)]
    assert {v for g, r, v in found if r == "secrets"} == {"create"}


def test_the_pod_keeps_to_the_restricted_level() -> None:
    (deployment,) = of_kind(template(), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsUser"] >= 10000 and pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
    assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]


def test_the_policy_can_be_left_to_others() -> None:
    assert of_kind(template(), "NetworkPolicy")
    assert not of_kind(template("--set", "networkPolicy.enabled=false"), "NetworkPolicy")


def test_the_admission_policy_is_on_where_the_cluster_knows_it() -> None:
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    for kind in kinds:
        (found,) = of_kind(template(namespace="one"), kind)
        (other,) = of_kind(template(namespace="other"), kind)
        assert found["metadata"]["name"] != other["metadata"]["name"], (
            "two releases must not have objects of the same name"
        )
        assert not of_kind(template("--set", "admissionPolicy.enabled=false"), kind)
        assert not of_kind(template("--kube-version=1.29.9"), kind)
        assert of_kind(template("--kube-version=1.30.0"), kind)


def test_the_admission_policy_knows_the_accounts() -> None:
    def expressions(*argv: str) -> str:
        (policy,) = of_kind(template(*argv), "ValidatingAdmissionPolicy")
        conditions = [each["expression"] for each in policy["spec"]["matchConditions"]]
        return "\n".join([*conditions, *(each["expression"] for each in policy["spec"]["validations"])])

    assert "system:serviceaccount:egm-system:egm-operator" in expressions()
    assert "system:serviceaccount:egm-system:own" in expressions("--set", "serviceAccount.name=own")
    assert "in ['default', '']" in expressions()
    assert "in ['jobs', '']" in expressions("--set", "settings.serviceAccount=jobs")
    free = expressions("--set", "settings.podTemplate=allow")
    assert "hostPath" not in free and "!= 'egm-operator'" in free and "grounding.egm.dev/uid" in free
    assert "hostPath" in expressions("--set", "settings.podTemplate=deny")


def _network(*sets: str) -> tuple[bool, Any, Any, Any]:
    words = [word for each in sets for word in ("--set-json", each)]
    found = load({k: v for k, v in _environment(*words).items() if k.startswith("EGM_")})
    parts = found.network_telemetry_from, found.network_scrape_from, found.network_egress
    return found.network_policies, *(json.loads(part) for part in parts)


def test_jobs_networks_are_closed_but_to_the_operator_and_who_scrapes() -> None:
    enabled, telemetry, scrape, egress = _network()
    assert enabled and scrape == [] and egress == []
    [peer] = telemetry
    (deployment,) = of_kind(template(), "Deployment")
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "egm-system"}
    assert peer["podSelector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    prometheus = [{"namespaceSelector": {"matchLabels": {"team": "metrics"}}}]
    assert _network(f"networkPolicy.from={json.dumps(prometheus)}")[2] == prometheus
    assert _network("metrics.podMonitor.enabled=true")[2] == [{"namespaceSelector": {}}]
    assert _network('settings.progressVia="off"')[1] == []
    assert [list(p) for p in _network('settings.progressVia="proxy"')[1]] == [["ipBlock"], ["ipBlock"]]
    rule = [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]
    assert _network(f"networkPolicy.jobs.egress={json.dumps(rule)}")[3] == rule


def test_jobs_networks_can_be_left_open() -> None:
    closed = ("networking.k8s.io", "networkpolicies", "create")
    assert closed in granted(template())
    assert _network("networkPolicy.jobs.enabled=false")[0] is False
    assert closed not in granted(template("--set", "networkPolicy.jobs.enabled=false"))


def test_a_budget_comes_with_the_second_replica() -> None:
    assert not of_kind(template(), "PodDisruptionBudget")
    assert of_kind(template("--set", "replicas=2"), "PodDisruptionBudget")


def test_selectors_find_the_pods_that_the_operator_makes() -> None:
    """Monitors and the policy select jobs' pods by labels and ports that real pods have."""
    from egm_operator.render import objects

    from grounding.api import load as load_jobs

    jobs = {j.metadata.name: j for j in load_jobs(ROOT / "jobs" / "egm8b-pipeline.yaml")}
    both = [Settings(backend="pytorchjob"), Settings(backend="job")]
    made = [o for settings in both for j in jobs.values() for o in objects(j, jobs, settings, "n")]
    pods: list[dict[str, Any]] = [o for o in made if o["kind"] == "Pod"]
    for obj in of_kind(made, "Job"):
        pod = obj["spec"]["template"]
        pods.append(pod)
        if obj["spec"].get("completionMode") == "Indexed":  # the controller of an Indexed Job adds the label
            pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = "0"
    for gang in of_kind(made, "PyTorchJob"):
        pod = gang["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
        meta = pod["metadata"]  # the training-operator adds its own label
        pods.append(
            {**pod, "metadata": {**meta, "labels": {**meta["labels"], "training.kubeflow.org/replica-type": "master"}}}
        )
    monitors = of_kind(template("--set", "metrics.podMonitor.enabled=true"), "PodMonitor")
    assert len(monitors) == 4
    for monitor in monitors:
        labels = monitor["spec"]["selector"]["matchLabels"]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        found = [p for p in pods if labels.items() <= p["metadata"]["labels"].items()]
        assert found, labels
        for pod in found:
            assert endpoint["port"] in {p["name"] for p in pod["spec"]["containers"][0]["ports"]}
    (policy,) = of_kind(template(), "NetworkPolicy")
    peers = [e for e in policy["spec"]["egress"] if e.get("to") and "podSelector" in e["to"][0]]
    assert peers[0]["ports"] == [{"protocol": "TCP", "port": 8090}]
    assert all("grounding.egm.dev/job" in p["metadata"]["labels"] for p in pods)


def test_alerts_can_be_left_out_and_lead_to_their_runbooks() -> None:
    def alerts(*argv: str) -> dict[str, dict[str, Any]]:
        (rule,) = of_kind(template("--set", "metrics.rules.enabled=true", *argv), "PrometheusRule")
        return {r["alert"]: r for group in rule["spec"]["groups"] for r in group["rules"]}

    source = YAML(typ="safe").load((CHART / "rules" / "alerts.yaml").read_text())
    kept = {r["alert"]: r for g in source["groups"] for r in g["rules"]}
    found = alerts()
    for name, rule in found.items():
        link = rule["annotations"]["runbook_url"]
        assert link == f"docs/runbooks/{name}.md" and (ROOT / link).is_file()
        # Helm leaves the templates of Prometheus in the text as they are
        assert rule["annotations"]["summary"] == kept[name]["annotations"]["summary"]
    first = next(iter(found))
    fewer = alerts("--set", f"metrics.rules.disabled={{{first}}}", "--set", "metrics.rules.runbooks=https://x/y")
    assert set(found) - set(fewer) == {first}
    assert all(r["annotations"]["runbook_url"].startswith("https://x/y/Egm") for r in fewer.values())
    assert {p.stem for p in (ROOT / "docs" / "runbooks").glob("Egm*.md")} == set(found)
