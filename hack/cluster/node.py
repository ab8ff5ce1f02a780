"""A real node in addition to the simulated ones (`make cluster NODE=1`): containerd, kubelet, kube-proxy, CoreDNS on this host. Needs root.

A machine can have only one, because a bridge, iptables rules and a few fixed folders belong to the host. `down` reverts what `up` has
changed. Images are built locally and imported into containerd (`image.py`); nothing is pulled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket as sockets
import string
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import firewall
import image
from controlplane import ControlPlane
from processes import Processes, Trouble

HERE = Path(__file__).parent
NODE, BRIDGE, ADDRESS, PODS = "node1", "egm0", "10.244.0.1", "10.244.0.0/24"
DNS = "169.254.20.10"  # an address added to the loopback interface, on which CoreDNS listens, as NodeLocal DNS does
SYSCTLS = ("net.ipv4.ip_forward", "vm.overcommit_memory", "kernel.panic", "kernel.panic_on_oops")
PROGRAMS = ("containerd", "ctr", "runc", "iptables", "ip", "conntrack", "busybox", "gcc", "sysctl")
CNI = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
DEBIAN = "containerd runc containernetworking-plugins iptables iproute2 conntrack busybox-static gcc libc6-dev procps"


def _run(*argv: str, check: bool = True, env: dict[str, str] | None = None, timeout: float = 60) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=timeout)
    if check and done.returncode:
        raise Trouble(f"{' '.join(argv)}: {done.stderr.strip()[-800:]}")
    return done.stdout


def refused(folder: Path) -> str:
    """Return the operations of a real node that this machine refuses, whatever is installed; empty if it allows all. `folder` holds images."""
    if os.geteuid() != 0:
        return "a real node needs root"
    folder.mkdir(parents=True, exist_ok=True)
    tree = Path("/sys/fs/cgroup")
    controllers = [tree] if (tree / "cgroup.controllers").exists() else [tree / n for n in ("memory", "cpu", "pids")]
    groups = [str(controller / f"egm-{os.getpid()}") for controller in controllers]
    forward = "/proc/sys/net/ipv4/ip_forward"
    overlay = (
        "mkdir lower upper work both && mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay both"
    )
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        for what, argv in {
            "namespaces": ["unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--fork", "true"],
            "overlay mounts": ["unshare", "--mount", "sh", "-ec", overlay],
            "bridges": ["unshare", "--net", "ip", "link", "add", "egm-probe", "type", "bridge"],
            "iptables": ["unshare", "--net", "iptables", "-t", "nat", "-S"],
            "control groups": ["sh", "-ec", 'mkdir "$@" && rmdir "$@"', "sh", *groups],
            "sysctls": ["sh", "-ec", f"value=$(cat {forward}); echo $value > {forward}"],
        }.items():
            try:
                done = subprocess.run(argv, cwd=empty, capture_output=True, text=True, timeout=20)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"{what}: {error}"
            if done.returncode:
                return f"{what}: {done.stderr.strip()[-200:]}"
    return ""


def address() -> None:
    """Create the pods' bridge, whose address is also the node's and the API server's, independent of the host's network."""
    if os.geteuid() != 0:
        raise Trouble("a real node needs root; the cluster without NODE=1 does not")
    missing = [p for p in PROGRAMS if shutil.which(p) is None] + (
        [] if any(c.is_dir() for c in CNI) else ["CNI plug-ins"]
    )
    if missing:
        raise Trouble(f"a real node needs {', '.join(missing)}; on Debian: apt-get install {DEBIAN}")
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "addr", "replace", f"{ADDRESS}/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    _run("ip", "addr", "replace", f"{DNS}/32", "dev", "lo")


def _fill(run: Path, name: str, target: Path) -> Path:
    cni = next(c for c in CNI if c.is_dir())
    values = {"run": run, "cni": cni, "bridge": BRIDGE, "pods": PODS, "node": NODE, "dns": DNS}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(string.Template((HERE / "node" / name).read_text()).substitute(values))
    return target


def _ctr(run: Path, *argv: str, check: bool = True) -> str:
    return _run("ctr", "-a", f"{run}/containerd/containerd.sock", "-n", "k8s.io", *argv, check=check)


def _images(run: Path, home: Path) -> None:
    folder = run / "images"
    folder.mkdir(exist_ok=True)
    if not (folder / "busybox.tar").exists():
        pause = folder / "pause"
        _run("gcc", "-Os", "-static", "-DVERSION=3.10", "-o", str(pause), str(home / "share" / "pause.c"))
        image.write(folder / "pause.tar", ["localhost/pause:3.10"], {"/pause": pause}, ["/pause"], {})
        busybox = Path(shutil.which("busybox") or "")
        links = {f"/bin/{a}": "busybox" for a in _run(str(busybox), "--list").split() if a != "busybox"}
        image.write(folder / "busybox.tar", ["localhost/busybox:1.35"], {"/bin/busybox": busybox}, ["sh"], links)
    for name in ("pause", "busybox"):
        _ctr(run, "images", "import", str(folder / f"{name}.tar"))


def environment(run: Path, root: Path, say: Callable[[str], None]) -> None:
    """Import this checkout's virtual environment into the node under the names of `make images`."""
    if not (root / ".venv" / "bin" / "egm").exists():
        raise Trouble("the checkout has no .venv; `make setup` creates it")
    busybox = Path(shutil.which("busybox") or "")
    applets = _run(str(busybox), "--list").split()
    target = run / "images" / "egm.tar"
    names = [f"localhost/egm-{n}" for n in ("operator:dev", "train:dev-cpu", "infer:dev-cpu")]
    image.environment(root, target, names, busybox, applets)
    say(f"image written, {target.stat().st_size / 2**30:.1f} GiB")
    _run("ctr", "-a", f"{run}/containerd/containerd.sock", "-n", "k8s.io", "images", "import", str(target), timeout=900)
    target.unlink()
    (run / "images" / "loaded.json").unlink(missing_ok=True)  # the names now refer to other images
    say("image imported")


def load(run: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Copy images from buildah's store (`make images`) to the node, as a stream without an intermediate file. Skip images that the node has."""
    record = run / "images" / "loaded.json"
    loaded: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    for name in names:
        found = _run("buildah", "images", "--quiet", "--no-trunc", name, check=False).split()
        if not found:
            raise Trouble(f"there is no image {name}; `make images` builds it")
        if loaded.get(name) == found[0] and name in _ctr(run, "images", "ls", "-q").split():
            say(f"{name} already exists")
            continue
        with tempfile.TemporaryDirectory() as folder:
            pipe = f"{folder}/image"
            os.mkfifo(pipe)
            ctr = ["ctr", "-a", f"{run}/containerd/containerd.sock", "-n", "k8s.io", "images", "import", pipe]
            taking = subprocess.Popen(ctr, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                _run("buildah", "push", "--quiet", name, f"docker-archive:{pipe}:{name}", timeout=1800)
                _, told = taking.communicate(timeout=1800)
            finally:
                taking.kill()  # without any input it would wait forever
        if taking.returncode:
            raise Trouble(f"{name} was not imported: {told.strip()[-800:]}")
        loaded[name] = found[0]
        record.write_text(json.dumps(loaded))
        say(f"{name} imported")


def up(plane: ControlPlane, home: Path, say: Callable[[str], None]) -> None:
    """Start the node's programs, and return when the node is Ready."""
    run, processes = plane.run, plane.processes
    kubelet = plane.pki.kubeconfig(
        "kubelet", f"/O=system:nodes/CN=system:node:{NODE}", plane.server, f"IP:{ADDRESS}", f"DNS:{NODE}"
    )
    plane.pki.kubeconfig("kube-proxy", "/CN=system:kube-proxy", plane.server)
    plane.pki.kubeconfig("coredns", "/CN=coredns", plane.server)
    plane.kubectl("apply", "--server-side", "-f", str(HERE / "node" / "rbac.yaml"))
    saved = run / "sysctls"  # save them, because the kubelet changes them
    if not saved.exists():
        saved.write_text(_run("sysctl", *SYSCTLS))
    _run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    _run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1", check=False)
    _fill(run, "pods.conflist", run / "cni" / "10-pods.conflist")
    for name in ("kubelet.yaml", "kube-proxy.yaml", "Corefile"):
        _fill(run, name, run / "node" / name)
    processes.start(
        "containerd", ["containerd", "--config", str(_fill(run, "containerd.toml", run / "node" / "containerd.toml"))]
    )

    def works(*argv: str) -> bool:
        with contextlib.suppress(Trouble, subprocess.TimeoutExpired):
            return bool(_ctr(run, *argv))
        return False

    processes.wait("containerd", lambda: works("version"), 30, "containerd")
    _images(run, home)
    processes.start("kubelet", [
        str(plane.bin / "kubelet"), f"--config={run}/node/kubelet.yaml", f"--kubeconfig={kubelet}", f"--root-dir={run}/kubelet",
        f"--cert-dir={run}/kubelet/pki", f"--hostname-override={NODE}", f"--node-ip={ADDRESS}",
    ])  # fmt: skip
    processes.start("kube-proxy", [str(plane.bin / "kube-proxy"), f"--config={run}/node/kube-proxy.yaml"])
    processes.start("coredns", [str(plane.bin / "coredns"), "-conf", f"{run}/node/Corefile"])
    ready = ("wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=1s")
    processes.wait("the node", lambda: plane.works(*ready), 120, "kubelet", "containerd", "kube-proxy")

    def dns() -> bool:
        with contextlib.suppress(OSError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            return bool(opener.open("http://127.0.0.1:8055/ready", timeout=2).status == 200)
        return False

    processes.wait("CoreDNS", dns, 30, "coredns")
    say(f"node {NODE} ready")


def _rules(run_table: str) -> list[str]:
    return _run("iptables", "-t", run_table, "-S", check=False).splitlines()


def _iptables() -> None:
    """Remove the chains of kubelet, kube-proxy and CNI, and the jumps into them."""
    ours = ("KUBE-", "CNI-")
    for table in ("filter", "nat", "mangle"):
        chains = [r.split()[1] for r in _rules(table) if r.startswith("-N ") and r.split()[1].startswith(ours)]
        for rule in map(shlex.split, _rules(table)):
            if rule[0] == "-A" and "-j" in rule and rule[rule.index("-j") + 1] in chains and rule[1] not in chains:
                _run("iptables", "-t", table, "-D", *rule[1:], check=False)
        for action in ("-F", "-X"):
            for chain in chains:
                _run("iptables", "-t", table, action, chain, check=False)


def down(run: Path, home: Path) -> None:
    """Stop the node and revert its changes on the host."""
    processes = Processes(run)
    for name in (firewall.NAME, "kubelet", "kube-proxy", "coredns"):
        processes.stop(name)
    socket = run / "containerd" / "containerd.sock"
    if socket.exists() and processes.alive("containerd"):  # containers outlive containerd: each pod has a shim
        for what in ("tasks", "containers"):
            for found in _ctr(run, what, "ls", "-q", check=False).split():
                _ctr(run, what, "rm", *(["-f"] if what == "tasks" else []), found, check=False)
    processes.stop("containerd")
    # shims of our containerd, identified by its socket in their command line
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[0].endswith("containerd-shim-runc-v2") and str(socket) in words:
                os.kill(int(folder.name), 9)
    with contextlib.suppress(OSError, Trouble):
        _run(str(home / "bin" / "kube-proxy"), "--cleanup", check=False)
    _iptables()
    firewall.remove_sets()
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{run}/")), reverse=True):
        _run("umount", "-l", mount, check=False)
    for link in (["link", "del", BRIDGE], ["addr", "del", f"{DNS}/32", "dev", "lo"]):
        _run("ip", *link, check=False)
    if (run / "sysctls").exists():
        _run("sysctl", "-qp", str(run / "sysctls"), check=False)
    _left_behind()


def _left_behind() -> None:
    """Remove files that containerd, runc, libcni and the kubelet leave in fixed folders, but none that others use."""
    for path in Path("/run/containerd/s").glob("*"):  # sockets of shims; our shims have ended
        with contextlib.suppress(OSError), sockets.socket(sockets.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) != 0:
                path.unlink()
    for path in Path("/var/lib/cni/results").glob("egm-pods-*"):
        path.unlink(missing_ok=True)
    groups = sorted(Path("/sys/fs/cgroup").glob("**/kubepods*/**/"), key=lambda p: -len(p.parts))
    kubelet = Path("/var/lib/kubelet/device-plugins")
    if not (kubelet / "kubelet_internal_checkpoint").exists() or not any(
        _run("pgrep", "-x", "kubelet", check=False).split()
    ):
        (kubelet / "kubelet.sock").unlink(missing_ok=True)
        (kubelet / "kubelet_internal_checkpoint").unlink(missing_ok=True)
    folders = "/run/containerd/s /run/containerd/runc/k8s.io /run/containerd/runc /run/containerd /var/lib/cni/results /var/lib/cni"
    for folder in (*groups, *map(Path, folders.split()), kubelet, kubelet.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()  # only removes empty folders
