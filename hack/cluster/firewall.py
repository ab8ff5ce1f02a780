"""Enforcement of NetworkPolicies on the real node: kube-router's firewall as a process of this host. Needs root and ipset.

The node's network (a bridge and the CNI plug-ins) does not enforce policies. kube-router's firewall works with any network
whose packets pass iptables; its other parts, routes and Services, are off, because the bridge and kube-proxy provide them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from controlplane import SERVICES, ControlPlane
from processes import Trouble

NAME = "kube-router"
RIGHTS = Path(__file__).parent / "node" / "firewall.yaml"
SETS = ("KUBE-SRC-", "KUBE-DST-")  # how the names of kube-router's sets of addresses begin
SWITCH = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


def _lines(*argv: str) -> list[str]:
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def up(plane: ControlPlane, home: Path, node: str) -> None:
    """Start the firewall of the node, and return when its first rules exist. Raises `Trouble` if the host cannot run it."""
    if shutil.which("ipset") is None:
        raise Trouble("NetworkPolicies need ipset; on Debian: apt-get install ipset")
    if not SWITCH.exists() or SWITCH.read_text().strip() != "1":
        raise Trouble(
            f"NetworkPolicies need packets of bridges to pass iptables: load the kernel module br_netfilter ({SWITCH})"
        )
    plane.kubectl("apply", "--server-side", "-f", str(RIGHTS))
    config = plane.pki.kubeconfig(NAME, f"/CN={NAME}", plane.server)
    plane.processes.start(NAME, [
        str(home / "bin" / NAME), f"--kubeconfig={config}", f"--hostname-override={node}", "--run-firewall=true",
        "--run-router=false", "--run-service-proxy=false", "--run-loadbalancer=false", "--enable-cni=false",
        f"--service-cluster-ip-range={SERVICES}", "--health-port=0", "--metrics-port=0", "--v=1",
    ])  # fmt: skip
    chain = ("iptables", "-S", "KUBE-ROUTER-FORWARD")
    # pods' rules follow the chain's own rule within a sync
    plane.processes.wait("the firewall's rules", lambda: len(_lines(*chain)) > 1, 60, NAME)


def remove_sets() -> None:
    """Delete the sets of addresses of a stopped firewall, after the rules that refer to them."""
    for name in _lines("ipset", "list", "-name"):
        if name.startswith(SETS):
            subprocess.run(["ipset", "destroy", name], capture_output=True)
