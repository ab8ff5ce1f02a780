#!/usr/bin/env python3
"""A real Kubernetes for tests, without containers, registries or root: `make cluster`, `make cluster-env`, `make cluster-down`.

    cluster.py up [--fake-nodes N] [--node]   start a control plane, N simulated nodes with 8 GPUs, the training-operator; --node adds a real node
    cluster.py env                            print shell exports: KUBECONFIG, KUBECTL, HELM
    cluster.py kueue [--pytorchjob | --off]   start Kueue on the running cluster (--pytorchjob: with that integration), or remove it
    cluster.py firewall                       enforce NetworkPolicies on the real node of the running cluster
    cluster.py restart PROGRAM                stop one program and start it again, such as kube-apiserver
    cluster.py image                          import this checkout's virtual environment as the operator's images into the real node
    cluster.py load NAME...                   import images from buildah's store into the real node
    cluster.py down                           stop the programs and remove the run folder
    cluster.py build [--node | --kueue | --firewall]   only build the programs
    cluster.py packages                       print the Debian packages that a real node needs
    cluster.py check                          check whether this machine can run a real node; if not, print why and exit with code 3

All state is in one run folder (`--run`, by default .cache/cluster of this checkout). See docs/cluster.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import binaries
import firewall
import kueue
import simulated
from controlplane import ControlPlane, free_ports
from processes import Processes, Trouble

ROOT = Path(__file__).resolve().parents[2]
BEGUN = time.monotonic()
REFUSED = 3


def say(text: str) -> None:
    """Print a progress message on stderr, because stdout is for exports."""
    sys.stderr.write(f"[{time.monotonic() - BEGUN:5.1f} s] {text}\n")


def _plane(run: Path, home: Path, state: dict) -> ControlPlane:  # type: ignore[type-arg]
    address = None
    if state["node"]:
        import node

        address = node.ADDRESS
    return ControlPlane(run, home, state["ports"], address)


def up(run: Path, fake_nodes: int, real: bool) -> None:
    """Start the programs that are not running yet."""
    home = binaries.ensure(say, node=real)
    saved = run / "state.json"
    if saved.exists():
        state = json.loads(saved.read_text())
        if real and not state["node"]:
            raise Trouble("the cluster was started without a real node; run `make cluster-down` first")
        if state["home"] != str(home):
            raise Trouble(
                "the running cluster has other versions than hack/cluster pins; run `make cluster-down` first"
            )
    else:
        state = {"ports": free_ports(), "node": real, "home": str(home)}
        saved.write_text(json.dumps(state))
    plane = _plane(run, home, state)
    if state["node"]:
        import node

        node.address()
    plane.up()
    say("control plane ready")
    simulated.nodes(plane, home, fake_nodes, taint=state["node"])
    simulated.training_operator(plane, home)
    say("training-operator ready")
    if state["node"]:
        node.up(plane, home, say)
    for what in (
        ["wait", "--for=condition=Ready", "node/fake-0", "--timeout=1s"],
        ["get", "serviceaccount", "default"],
    ):
        if fake_nodes or what[0] == "get":
            plane.processes.wait("simulated nodes", lambda w=what: plane.works(*w), 60, "kwok")  # type: ignore[misc]
    say(f'cluster ready: eval "$(make -s cluster-env)" ; logs in {run / "logs"}')


def env(run: Path) -> None:
    """Print the shell exports."""
    saved = run / "state.json"
    if not saved.exists() or not Processes(run).alive("kube-apiserver"):
        raise Trouble("no cluster is running for this checkout; `make cluster` starts one")
    bin_ = Path(json.loads(saved.read_text())["home"]) / "bin"
    values = {"KUBECONFIG": run / "kubeconfig", "KUBECTL": bin_ / "kubectl", "HELM": bin_ / "helm"}
    for name, value in values.items():
        sys.stdout.write(f"export {name}={shlex.quote(str(value))}\n")


def add_kueue(run: Path, *, pytorchjob: bool, off: bool) -> None:
    """Start Kueue on the running cluster, or remove it."""
    saved = run / "state.json"
    if not saved.exists() or not Processes(run).alive("kube-apiserver"):
        raise Trouble("no cluster is running for this checkout; `make cluster` starts one")
    state = json.loads(saved.read_text())
    plane = _plane(run, Path(state["home"]), state)
    if off:
        kueue.down(plane)
        say("Kueue removed")
        return
    kueue.up(plane, binaries.ensure_addon(binaries.KUEUE, say), pytorchjob=pytorchjob)
    say(f"Kueue {binaries.version(binaries.KUEUE)} ready")


def add_firewall(run: Path) -> None:
    """Start the enforcement of NetworkPolicies on the real node."""
    saved = run / "state.json"
    if not saved.exists() or not Processes(run).alive("kubelet"):
        raise Trouble("no real node is running; `make node` starts one")
    import node

    state = json.loads(saved.read_text())
    firewall.up(_plane(run, Path(state["home"]), state), binaries.ensure_addon(binaries.FIREWALL, say), node.NODE)
    say(f"NetworkPolicies are enforced by kube-router {binaries.version(binaries.FIREWALL)}")


def down(run: Path) -> None:
    """Stop the programs in reverse order and remove the run folder. Other processes are not touched."""
    processes = Processes(run)
    saved = run / "state.json"
    if saved.exists() and json.loads(saved.read_text())["node"]:
        import node

        node.down(run, Path(json.loads(saved.read_text())["home"]))
    for name in reversed(processes.names()):
        processes.stop(name)
    shutil.rmtree(run, ignore_errors=True)
    say("cluster stopped")


def main() -> int:
    """Parse the arguments, lock the run folder, and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / ".cache" / "cluster", help="run folder")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up")
    start.add_argument("--fake-nodes", type=int, default=8)
    start.add_argument("--node", action="store_true", help="also start a real node (needs root)")
    commands.add_parser("restart").add_argument("program")
    build = commands.add_parser("build")
    build.add_argument("--node", action="store_true", help="also build the programs of a real node")
    build.add_argument("--kueue", action="store_true", help="only Kueue")
    build.add_argument("--firewall", action="store_true", help="only what enforces NetworkPolicies")
    addon = commands.add_parser("kueue")
    addon.add_argument(
        "--pytorchjob", action="store_true", help="with the integration of PyTorchJob, which is off by default"
    )
    addon.add_argument("--off", action="store_true", help="stop Kueue and remove it")
    commands.add_parser("load").add_argument("names", nargs="+")
    for name in ("env", "down", "image", "firewall", "packages", "check"):
        commands.add_parser(name)
    arguments = parser.parse_args()
    run: Path = arguments.run.resolve()
    try:
        if sys.platform != "linux":
            raise Trouble("the test cluster needs Linux; set EGM_KUBECONFIG to run the tests on an existing cluster")
        if arguments.command == "build":
            if arguments.kueue or arguments.firewall:
                home = binaries.ensure_addon(binaries.KUEUE if arguments.kueue else binaries.FIREWALL, say)
            else:
                home = binaries.ensure(say, node=arguments.node)
            sys.stdout.write(f"{home}\n")
            return 0
        if arguments.command in ("packages", "check"):
            import node

            if arguments.command == "packages":
                sys.stdout.write(f"{node.DEBIAN}\n")
                return 0
            why = node.refused(run.parent)
            sys.stdout.write(f"{why}\n" if why else "")
            return REFUSED if why else 0
        if arguments.command == "env":
            env(run)
            return 0
        if arguments.command == "down" and not run.exists():
            return 0
        run.mkdir(parents=True, exist_ok=True)
        with (run.parent / f"{run.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if arguments.command == "up":
                run.mkdir(parents=True, exist_ok=True)  # a `down` that held the lock may have removed it
                up(run, arguments.fake_nodes, arguments.node)
            elif arguments.command == "down":
                down(run)
            elif arguments.command == "kueue":
                add_kueue(run, pytorchjob=arguments.pytorchjob, off=arguments.off)
            elif arguments.command == "firewall":
                add_firewall(run)
            elif arguments.command in ("image", "load"):
                import node

                if not Processes(run).alive("containerd"):
                    raise Trouble("no real node is running; `make node` starts one")
                if arguments.command == "image":
                    node.environment(run, ROOT, say)
                else:
                    node.load(run, arguments.names, say)
            else:
                Processes(run).restart(arguments.program)
        return 0
    except Trouble as trouble:
        sys.stderr.write(f"error: {trouble}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
