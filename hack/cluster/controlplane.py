"""The control plane (etcd, kube-apiserver, controller manager, scheduler) on 127.0.0.1, on free ports, without root."""

from __future__ import annotations

import json
import random
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from pki import Authority
from processes import Processes, Trouble

SERVICES = "10.96.0.0/16"
NOWHERE = (
    "192.0.2.1"  # an address of TEST-NET-1: the advertised address must not be loopback, and no one has to reach it
)
PORTS = ("etcd", "etcd-peer", "apiserver", "operator-webhook", "operator-health")
# The default limits (20 to 50 requests per second) are for clusters with many users; a benchmark would measure these limits.
FAST = ("--kube-api-qps=500", "--kube-api-burst=1000")
# All programs share two cores, of which Go's garbage collector would use a fifth; memory is available up to a point.
LAZY = {"GOGC": "400", "GOMEMLIMIT": "2GiB"}


def free_ports(names: Sequence[str] = PORTS) -> dict[str, int]:
    """Return a free port for each name, below the range that the kernel uses for outgoing connections."""
    found: dict[str, int] = {}
    for name in names:
        for port in random.sample(range(20000, 32000), 200):
            with socket.socket() as s:
                if port not in found.values() and s.connect_ex(("127.0.0.1", port)) != 0:
                    found[name] = port
                    break
        else:
            raise Trouble("no free port between 20000 and 32000")
    return found


class ControlPlane:
    """One control plane in a run folder."""

    def __init__(self, run: Path, home: Path, ports: dict[str, int], address: str | None = None) -> None:
        """`home`: folder of the programs. `address`: address of the real node, if there is one; pods reach the API server there."""
        self.run, self.bin, self.ports, self.address = run, home / "bin", ports, address
        self.processes = Processes(run)
        self.pki = Authority(run / "pki", "egm-cluster")
        self.server = f"https://127.0.0.1:{ports['apiserver']}"
        self.kubeconfig = run / "kubeconfig"

    def kubectl(self, *argv: str, stdin: object = None) -> str:
        """Run kubectl as admin and return its output. `stdin` is passed as JSON. Raises `Trouble` with kubectl's error."""
        done = subprocess.run(
            [str(self.bin / "kubectl"), f"--kubeconfig={self.kubeconfig}", *argv],
            input=json.dumps(stdin) if stdin is not None else None,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Trouble(f"kubectl {' '.join(argv)}: {done.stderr.strip()[-1500:]}")
        return done.stdout

    def works(self, *argv: str) -> bool:
        """Return whether a kubectl command succeeds."""
        try:
            return bool(self.kubectl(*argv)) or True
        except Trouble:
            return False

    def _answers(self, url: str) -> bool:
        context = ssl.create_default_context(cafile=str(self.pki.folder / "ca.crt"))
        context.load_cert_chain(self.pki.folder / "admin.crt", self.pki.folder / "admin.key")
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _certificates(self) -> None:
        names = ["IP:127.0.0.1", "IP:10.96.0.1", "DNS:localhost"]
        names += [f"DNS:kubernetes{s}" for s in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
        names += [f"IP:{self.address}"] if self.address else []
        self.pki.certificate("apiserver", "/CN=kube-apiserver", *names)
        self.pki.certificate("etcd", "/CN=etcd", "IP:127.0.0.1")
        self.pki.certificate("front-proxy", "/CN=front-proxy")
        self.pki.certificate("kubelet-client", "/CN=apiserver-kubelet-client")
        self.pki.signing_pair("serviceaccount")
        for name, subject in {
            "admin": "/O=system:masters/CN=admin",
            "kube-controller-manager": "/CN=system:kube-controller-manager",
            "kube-scheduler": "/CN=system:kube-scheduler",
            "kwok": "/O=system:masters/CN=kwok",
            "training-operator": "/O=system:authenticated/CN=system:serviceaccount:kubeflow:training-operator",
        }.items():
            path = self.pki.kubeconfig(name, subject, self.server)
            if name == "admin" and not self.kubeconfig.exists():
                path.rename(self.kubeconfig)

    def up(self) -> None:
        """Start the programs that are not running, and return when the API server is ready."""
        self._certificates()
        self._etcd()
        self._apiserver()
        for name in ("kube-controller-manager", "kube-scheduler"):
            self._controller(name)

    def _etcd(self) -> None:
        p, client, peer = self.pki.folder, self.ports["etcd"], self.ports["etcd-peer"]
        tls = [f"--cert-file={p}/etcd.crt", f"--key-file={p}/etcd.key", f"--trusted-ca-file={p}/ca.crt"]
        peers = [
            f"--peer-cert-file={p}/etcd.crt",
            f"--peer-key-file={p}/etcd.key",
            f"--peer-trusted-ca-file={p}/ca.crt",
        ]
        self.processes.start("etcd", [
            str(self.bin / "etcd"), f"--data-dir={self.run}/etcd", "--log-level=warn",
            "--unsafe-no-fsync",  # a test cluster may lose its data in a power cut
            "--quota-backend-bytes=4294967296",
            *tls, "--client-cert-auth", *peers, "--peer-client-cert-auth",
            f"--listen-client-urls=https://127.0.0.1:{client}", f"--advertise-client-urls=https://127.0.0.1:{client}",
            f"--listen-peer-urls=https://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=https://127.0.0.1:{peer}",
            f"--initial-cluster=default=https://127.0.0.1:{peer}",
        ], LAZY)  # fmt: skip
        self.processes.wait("etcd", lambda: self._answers(f"https://127.0.0.1:{client}/health"), 60, "etcd")

    def _apiserver(self) -> None:
        p = self.pki.folder
        self.processes.start("kube-apiserver", [
            str(self.bin / "kube-apiserver"),
            f"--etcd-servers=https://127.0.0.1:{self.ports['etcd']}", f"--etcd-cafile={p}/ca.crt",
            f"--etcd-certfile={p}/etcd.crt", f"--etcd-keyfile={p}/etcd.key",
            f"--secure-port={self.ports['apiserver']}",
            f"--bind-address={'0.0.0.0' if self.address else '127.0.0.1'}", f"--advertise-address={self.address or NOWHERE}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--tls-cert-file={p}/apiserver.crt", f"--tls-private-key-file={p}/apiserver.key", f"--client-ca-file={p}/ca.crt",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={p}/serviceaccount.pub", f"--service-account-signing-key-file={p}/serviceaccount.key",
            "--authorization-mode=Node,RBAC", "--allow-privileged",
            # the second plugin requires rights for blockOwnerDeletion, as OpenShift does
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
            f"--kubelet-client-certificate={p}/kubelet-client.crt", f"--kubelet-client-key={p}/kubelet-client.key",
            f"--kubelet-certificate-authority={p}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={p}/ca.crt", "--requestheader-allowed-names=front-proxy",
            "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={p}/front-proxy.crt", f"--proxy-client-key-file={p}/front-proxy.key",
            f"--audit-policy-file={Path(__file__).parent}/conf/audit.yaml", f"--audit-log-path={self.run}/logs/audit.log",
            "--audit-log-maxsize=100", "--audit-log-maxbackup=3",
        ], LAZY)  # fmt: skip
        self.processes.wait("kube-apiserver", lambda: self._answers(f"{self.server}/readyz"), 120, "kube-apiserver")

    def _controller(self, name: str) -> None:
        config = self.pki.folder / f"{name}.kubeconfig"
        argv = [str(self.bin / name), f"--kubeconfig={config}", "--leader-elect=false", "--secure-port=0", *FAST]
        if name == "kube-controller-manager":
            p = self.pki.folder
            argv += [
                "--use-service-account-credentials",
                f"--service-account-private-key-file={p}/serviceaccount.key",
                f"--root-ca-file={p}/ca.crt",
                f"--cluster-signing-cert-file={p}/ca.crt",
                f"--cluster-signing-key-file={p}/ca.key",
            ]
        self.processes.start(name, argv, LAZY)
