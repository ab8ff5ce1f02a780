"""Start simulated nodes with GPUs (KWOK, with our stages in `kwok/`) and the real Kubeflow training-operator as processes."""

from __future__ import annotations

import base64
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from controlplane import FAST, LAZY, ControlPlane
from pki import Authority

HERE = Path(__file__).parent
GPUS = 8
SERVICE = "training-operator.kubeflow.svc"


def _node(index: int, *, taint: bool) -> dict[str, object]:
    capacity = {"cpu": "128", "memory": "1Ti", "ephemeral-storage": "10Ti", "pods": "1000", "nvidia.com/gpu": str(GPUS)}
    name = f"fake-{index}"
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "type": "kwok",
        "topology.kubernetes.io/zone": f"zone-{index % 2}",
    }
    taints = [{"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}] if taint else []
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "spec": {"taints": taints},
        "status": {"capacity": capacity, "allocatable": capacity},
    }


def nodes(plane: ControlPlane, home: Path, count: int, *, taint: bool) -> None:
    """Start KWOK and create `count` nodes with eight GPUs. `taint` keeps away pods without a toleration (if there is a real node)."""
    stages = [*sorted((home / "share" / "kwok").glob("*.yaml")), *sorted((HERE / "kwok").glob("*.yaml"))]
    config = plane.run / "kwok.yaml"
    config.write_text("\n---\n".join(p.read_text() for p in stages))
    plane.processes.start("kwok", [
        str(plane.bin / "kwok"), f"--kubeconfig={plane.pki.folder}/kwok.kubeconfig", f"--config={config}",
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--node-ip=192.0.2.2", "--cidr=10.245.0.0/16",
        "--node-lease-duration-seconds=40",
    ], LAZY)  # fmt: skip
    there = set(plane.kubectl("get", "nodes", "-o", "name").split())
    wanted = [_node(i, taint=taint) for i in range(count) if f"node/fake-{i}" not in there]
    if wanted:
        plane.kubectl("create", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": wanted})


def _operator_manifests(plane: ControlPlane, home: Path, ca: bytes) -> Path:
    """Write upstream's manifests (CRD, RBAC, webhook) without its Deployment, with a Service that points to the process on this host."""
    folder = plane.run / "training-operator" / "manifests"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / "share" / "training-operator", folder)
    port = plane.ports["operator-webhook"]
    bundle = base64.b64encode(ca).decode()
    webhooks = "\n".join(
        f"    - {{op: add, path: /webhooks/{i}/clientConfig/service/port, value: {port}}}\n"
        f"    - {{op: add, path: /webhooks/{i}/clientConfig/caBundle, value: {bundle}}}"
        for i in range(5)
    )
    # The API server accepts an ExternalName as the webhook's host, and still checks the certificate for the Service's name.
    (folder / "kustomization.yaml").write_text(f"""
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: kubeflow
resources:
- crds/kubeflow.org_pytorchjobs.yaml
- rbac/cluster-role-binding.yaml
- rbac/role.yaml
- rbac/service-account.yaml
- webhook
- service.yaml
patches:
- target: {{kind: Service, name: training-operator}}
  patch: |
    - op: replace
      path: /spec
      value: {{type: ExternalName, externalName: "127.0.0.1", ports: [{{name: webhook-server, port: {port}}}]}}
- target: {{kind: ValidatingWebhookConfiguration}}
  patch: |
{webhooks}
""")
    return folder


def training_operator(plane: ControlPlane, home: Path) -> None:
    """Start the training-operator as its service account, with working webhooks.

    Its certificates are created here and stored where its pod would have the mounted Secret, so that it does not wait for them."""
    folder = plane.run / "training-operator"
    if plane.processes.alive("training-operator"):
        return
    pki = Authority(folder / "k8s-webhook-server" / "serving-certs", "training-operator-ca")
    pki.certificate("tls", f"/CN={SERVICE}", f"DNS:{SERVICE}")
    if not plane.works("get", "namespace", "kubeflow"):
        plane.kubectl("create", "namespace", "kubeflow")
    data = {
        name: base64.b64encode((pki.folder / name).read_bytes()).decode()
        for name in ("ca.crt", "ca.key", "tls.crt", "tls.key")
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "training-operator-webhook-cert", "namespace": "kubeflow"},
        "data": data,
    }
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=secret)
    # server-side, because the CRD is too large for the annotation of a client-side apply; forced, because the operator may own caBundle
    manifests = _operator_manifests(plane, home, (pki.folder / "ca.crt").read_bytes())
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(manifests))
    health = plane.ports["operator-health"]
    plane.processes.start("training-operator", [
        str(plane.bin / "training-operator"), f"--kubeconfig={plane.pki.folder}/training-operator.kubeconfig",
        "--enable-scheme=pytorchjob", "--controller-threads=4", *FAST,
        "--pytorch-init-container-image=localhost/busybox:1.35",
        f"--pytorch-init-container-template-file={HERE}/conf/init-container.yaml",
        "--metrics-bind-address=0", f"--health-probe-bind-address=127.0.0.1:{health}",
        f"--webhook-server-port={plane.ports['operator-webhook']}",
    ], env={**LAZY, "MY_POD_NAMESPACE": "kubeflow", "TMPDIR": str(folder)}, cwd=folder)  # fmt: skip

    def ready() -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{health}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    plane.processes.wait("training-operator", ready, 60, "training-operator")
