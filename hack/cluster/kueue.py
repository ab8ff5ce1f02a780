"""Kueue on the test cluster: the real controller as a process of this host, with upstream's definitions, rights and webhooks.

Its configuration is upstream's own, so the integrations are the ones that an installation without any values has. Only
addresses differ, and the server of the visibility API is off, because it looks for its certificate in a fixed folder of the host.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controlplane import LAZY, ControlPlane, free_ports
from pki import Authority
from processes import Trouble

NAME = "kueue"
NAMESPACE = "kueue-system"
SERVICE = "kueue-webhook-service"
SECRET = "kueue-webhook-server-cert"
AUTHORITY = "kueue-ca"  # if the authority has another name, Kueue creates new certificates
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:kueue-controller-manager"
PYTORCHJOB = "kubeflow.org/pytorchjob"
PORTS = ("webhook", "health")
# The API service of the visibility server would make discovery fail, since nothing answers there.
LEFT_OUT = {"Deployment", "APIService"}
# Kueue removes the finalizers of these objects, so they must be deleted while it runs, users before what they use.
OBJECTS = ("workloads", "localqueues", "clusterqueues", "cohorts", "resourceflavors", "workloadpriorityclasses")


def configuration(upstream: str, ports: dict[str, int], certificates: Path, *, pytorchjob: bool) -> str:
    """Return upstream's configuration with our addresses, and with the integration of PyTorchJob if `pytorchjob`."""
    changes = {
        r"healthProbeBindAddress: \S+": f"healthProbeBindAddress: 127.0.0.1:{ports['health']}",
        r"(?m)^  bindAddress: \S+": '  bindAddress: "0"',
        r"port: 9443": f"port: {ports['webhook']}\n  host: 127.0.0.1\n  certDir: {certificates}",
        r"leaderElect: true": "leaderElect: false",
    }
    if pytorchjob:
        changes[rf'# - "{PYTORCHJOB}"'] = f'- "{PYTORCHJOB}"'
    for pattern, text in changes.items():
        upstream, count = re.subn(pattern, text, upstream)
        if count != 1:
            raise Trouble(f"Kueue's configuration has changed: {pattern!r} occurs {count} times")
    return upstream + "\nfeatureGates: {VisibilityOnDemand: false}\n"


def _documents(text: str) -> Iterator[dict[str, Any]]:
    """Yield each object of kubectl's JSON, which is one List or several objects."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        found, at = decoder.raw_decode(text, at)
        at += len(text[at:]) - len(text[at:].lstrip())
        yield from found["items"] if found["kind"] == "List" else [found]


def _clients(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each part of an object that refers to the webhooks' Service."""
    for webhook in item.get("webhooks", []):
        yield webhook["clientConfig"]
    if item["kind"] == "CustomResourceDefinition" and (conversion := item["spec"].get("conversion", {}).get("webhook")):
        yield conversion["clientConfig"]


def _objects(plane: ControlPlane, home: Path, port: int, secret: dict[str, str]) -> list[dict[str, Any]]:
    """Return upstream's objects, with a Service that leads to the process on this host."""
    rendered = plane.kubectl("kustomize", str(home / "share" / NAME / "default"))
    source = plane.run / NAME / "manifests.yaml"
    source.write_text(rendered)
    text = plane.kubectl("create", "--dry-run=client", "--validate=false", "-o", "json", "-f", str(source))
    items = [item for item in _documents(text) if item["kind"] not in LEFT_OUT]
    for item in items:
        for client in _clients(item):
            client["service"]["port"] = port
            client["caBundle"] = secret["ca.crt"]
        if item["kind"] == "Service" and item["metadata"]["name"] == SERVICE:
            item["spec"] = {
                "type": "ExternalName",
                "externalName": "127.0.0.1",
                "ports": [{"name": "https", "port": port}],
            }
        if item["kind"] == "Secret":
            item["data"] = secret
    return items


def _ports(folder: Path) -> dict[str, int]:
    saved = folder / "ports.json"
    if not saved.exists():
        saved.write_text(json.dumps(free_ports(PORTS)))
    found: dict[str, int] = json.loads(saved.read_text())
    return found


def _ready(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def up(plane: ControlPlane, home: Path, *, pytorchjob: bool) -> None:
    """Install Kueue, or start it again if it runs with other integrations; returns when its webhooks answer."""
    folder = plane.run / NAME
    folder.mkdir(exist_ok=True)
    ports = _ports(folder)
    pki = Authority(folder / "certificates", AUTHORITY)
    name = f"{SERVICE}.{NAMESPACE}.svc"
    pki.certificate("tls", f"/CN={name}", f"DNS:{name}")
    config = folder / "config.yaml"
    upstream = (home / "share" / NAME / "components" / "manager" / "controller_manager_config.yaml").read_text()
    wanted = configuration(upstream, ports, pki.folder, pytorchjob=pytorchjob)
    if plane.processes.alive(NAME):
        if config.exists() and config.read_text() == wanted:
            return
        plane.processes.stop(NAME)
    config.write_text(wanted)
    files = ("ca.crt", "ca.key", "tls.crt", "tls.key")
    secret = {file: base64.b64encode((pki.folder / file).read_bytes()).decode() for file in files}
    items = _objects(plane, home, ports["webhook"], secret)
    first = [item for item in items if item["kind"] == "Namespace"]
    for part in (first, [item for item in items if item not in first]):
        listed = {"apiVersion": "v1", "kind": "List", "items": part}
        plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=listed)
    kubeconfig = plane.pki.kubeconfig(NAME, f"/O=system:authenticated/CN={ACCOUNT}", plane.server)
    plane.processes.start(
        NAME, [str(home / "bin" / NAME), f"--kubeconfig={kubeconfig}", f"--config={config}", "--zap-log-level=2"],
        env={**LAZY, "TMPDIR": str(folder)}, cwd=folder,
    )  # fmt: skip
    plane.processes.wait(NAME, lambda: _ready(ports["health"]), 90, NAME)


def _left(plane: ControlPlane) -> list[tuple[str, str, str]]:
    """Return kind, namespace and name of each object that has a finalizer of Kueue."""
    found = []
    for kind in ("pods", *(f"{kind}.kueue.x-k8s.io" for kind in OBJECTS)):
        for item in json.loads(plane.kubectl("get", kind, "-A", "-o", "json"))["items"]:
            if any("kueue.x-k8s.io" in name for name in item["metadata"].get("finalizers", [])):
                found.append((kind, item["metadata"].get("namespace", ""), item["metadata"]["name"]))
    return found


def _remove_objects(plane: ControlPlane, seconds: float = 20.0) -> None:
    """Delete Kueue's objects while Kueue runs. Then stop it, and remove the finalizers of objects that still exist after `seconds`."""
    for kind in OBJECTS:
        plane.kubectl("delete", f"{kind}.kueue.x-k8s.io", "--all", "-A", "--wait=false")
    end = time.monotonic() + seconds
    while (left := _left(plane)) and time.monotonic() < end and plane.processes.alive(NAME):
        time.sleep(0.5)
    plane.processes.stop(NAME)
    _remove_webhooks(plane)
    for kind, namespace, name in left:
        free = ["patch", kind, name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}']
        plane.works(*free, *(["-n", namespace] if namespace else []))


def _remove_webhooks(plane: ControlPlane) -> None:
    """Delete the webhook configurations. Otherwise the API server would query the stopped controller about each pod."""
    for kind in ("mutating", "validating"):
        hooks = f"{kind}webhookconfigurations/kueue-{kind}-webhook-configuration"
        plane.kubectl("delete", hooks, "--ignore-not-found")


def down(plane: ControlPlane) -> None:
    """Remove Kueue and all its objects, so that the cluster is as before."""
    if plane.works("get", "crd", "workloads.kueue.x-k8s.io"):
        _remove_objects(plane)
    plane.processes.stop(NAME)
    _remove_webhooks(plane)
    source = plane.run / NAME / "manifests.yaml"
    if source.exists():
        plane.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", str(source))
    shutil.rmtree(plane.run / NAME, ignore_errors=True)
