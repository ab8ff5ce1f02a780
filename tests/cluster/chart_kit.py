"""Shared code of the chart's tests: Helm, rendered objects, a kubeconfig of the chart's service account, requests in the audit log."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.cluster.operator_kit import Api, Operator, free_port, kubeconfig

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "egm"
AUDIT = ROOT / ".cache" / "cluster" / "logs" / "audit.log"
CI = sorted((CHART / "ci").glob("*-values.yaml"))

Right = tuple[str, str, str]
"""A right: API group, resource (with its subresource), verb."""


def helm_program() -> str:
    """Return the path of Helm: $HELM, the program that `make cluster` has built, or the one on PATH."""
    sys.path.insert(0, str(ROOT / "hack" / "cluster"))
    try:
        import binaries  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    built = binaries.cache() / "bin" / "helm"
    found = os.environ.get("HELM") or (str(built) if built.exists() else shutil.which("helm"))
    assert found, "helm was not found; `make cluster` builds it"
    return found


# the Helm that `make cluster` builds has no default Kubernetes version
VERSION = "--kube-version=1.34.4"


def helm(*argv: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Helm against the tests' cluster. Fails with Helm's output."""
    done = subprocess.run(
        [helm_program(), *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "KUBECONFIG": str(kubeconfig())},
    )
    if check:
        assert done.returncode == 0, f"helm {' '.join(argv)}:\n{done.stdout}\n{done.stderr}"
    return done


def template(
    *argv: str, chart: Path = CHART, namespace: str = "egm-system", release: str = "egm"
) -> list[dict[str, Any]]:
    """Return the objects that Helm would send."""
    text = helm("template", release, str(chart), VERSION, "--namespace", namespace, *argv).stdout
    return [obj for obj in YAML(typ="safe").load_all(text) if obj]


def of_kind(objects: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [o for o in objects if o["kind"] == kind]


def rights(rules: Iterable[Mapping[str, Any]]) -> set[Right]:
    """Return each right in the rules of a role."""
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


def granted(objects: Iterable[dict[str, Any]]) -> set[Right]:
    """Return all rights in the operator's roles; the roles for users are left out."""
    own = [o for o in objects if o["kind"] in ("Role", "ClusterRole") and "-operator" in o["metadata"]["name"]]
    return {right for role in own for right in rights(role["rules"])}


def account_kubeconfig(api: Api, namespace: str, account: str, path: Path) -> Path:
    """Return a kubeconfig with a token of a service account, as its pod would have."""
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    token = api.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", asked)["status"][
        "token"
    ]
    admin = YAML(typ="safe").load(kubeconfig().read_text())["clusters"][0]["cluster"]
    if "certificate-authority" in admin:
        ca = base64.b64encode((kubeconfig().parent / admin["certificate-authority"]).read_bytes()).decode()
    else:
        ca = admin["certificate-authority-data"]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": admin["server"], "certificate-authority-data": ca}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    path.chmod(0o600)
    return path


def deployed(api: Api, namespace: str, folder: Path, release: str = "egm", **settings: str) -> Operator:
    """Return the operator of a release as a process that is not started: with the Deployment's environment and its account's rights.

    Images do not run here, so this function fills in what the kubelet would (the pod's name) and a free port. Nothing
    may connect to the addresses of simulated pods, so progress is read from annotations.
    """
    name = f"{release}-operator"
    pod = api.request("GET", f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}")["spec"]["template"]["spec"]
    # the API server treats an empty value as absent
    env = {e["name"]: e.get("value", "") for e in pod["containers"][0]["env"] if "valueFrom" not in e}
    config = account_kubeconfig(api, namespace, pod["serviceAccountName"], folder / f"{name}.kubeconfig")
    env |= {
        "KUBECONFIG": str(config),
        "EGM_OPERATOR_HEALTH_PORT": str(free_port()),
        "EGM_OPERATOR_HEALTH_HOST": "127.0.0.1",
    }
    env["EGM_OPERATOR_PROGRESS_VIA"] = "off"
    return Operator(namespace, folder / f"{name}.log", **{**env, **settings})


def audited(user: str) -> Iterator[dict[str, Any]]:
    """Yield a user's requests to the API server, oldest first, including rotated log files."""
    files = [*sorted(AUDIT.parent.glob("audit-*.log")), AUDIT]
    for path in files:
        with path.open() as lines:
            for line in lines:
                if user in line:
                    try:
                        entry = json.loads(line)
                    except json.JSONDecodeError:  # this line is still being written
                        continue
                    if entry["user"]["username"] == user:
                        yield entry


def account_user(namespace: str, account: str = "egm-operator") -> str:
    return f"system:serviceaccount:{namespace}:{account}"


def used(entries: Iterable[dict[str, Any]]) -> tuple[set[Right], list[str]]:
    """Return the rights that requests used, and the requests that were denied."""
    found: set[Right] = set()
    denied: list[str] = []
    for entry in entries:
        about = entry.get("objectRef")
        if not about or "resource" not in about:
            continue  # everyone may do discovery
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        group, verb, status = about.get("apiGroup", ""), entry["verb"], entry.get("responseStatus") or {}
        # a refusal by admission also counts, except for a namespace that another test has deleted
        refused = status.get("code") == 403 and "being terminated" not in status.get("message", "")
        if entry.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid" or refused:
            denied.append(f"{verb} {group}/{resource} {about.get('namespace', '')}/{about.get('name', '')}")
        found.add((group, resource, verb))
    return found, denied
