"""Pods of `egm render` as processes of this machine: the same commands, environment and volumes, with the paths of their mounts under a folder.

Differences from a kubelet: paths are rewritten instead of mounted, the pod's address is 127.0.0.1, a server listens on
a free port, and there is no `/progress`. `secret` holds the content of a Secret in `envFrom`. A Secret of the job gets a random value, as the
operator's `create` gives it.
"""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]


def render(manifest, **settings):
    """Return the objects that `egm render` prints for a manifest."""
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'operator'}", **settings}
    command = [sys.executable, "-m", "grounding.cli", "render", "-f", str(manifest)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [o for o in YAML(typ="safe", pure=True).load_all(done.stdout) if o]


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pod:
    """One pod. `hosts`: host names of Services -> where their pods listen here, `host:port` -> `host:port`; `tokens`: name of a Secret of the
    job -> its token."""

    def __init__(self, template, configs, root, secret, hosts=None, tokens=None):
        self.spec, self.root, self.secret, self.hosts = template["spec"], Path(root), secret, hosts or {}
        self.tokens = tokens or {}
        self.root.mkdir(parents=True)
        self.paths = {"/dev/termination-log": str(self.root / "termination-log")}
        for volume in self.spec["volumes"]:
            folder = self.root / volume["name"]
            folder.mkdir()
            if "downwardAPI" in volume:  # the volume contains the job, from an annotation
                for item in volume["downwardAPI"]["items"]:
                    name = item["fieldRef"]["fieldPath"].removeprefix("metadata.annotations['").removesuffix("']")
                    text = template["metadata"]["annotations"][name]
                    (folder / item["path"]).write_text(text.replace("/egm/", f"{self.root}/"))
            elif "configMap" in volume:
                data = configs[volume["configMap"]["name"]]["data"]
                for item in volume["configMap"]["items"]:
                    (folder / item["path"]).write_text(data[item["key"]])
            else:
                assert "emptyDir" in volume, volume
        for mount in self.spec["containers"][0]["volumeMounts"]:
            self.paths[mount["mountPath"]] = str(self.root / mount["name"])

    def here(self, text):
        for theirs, ours in self.hosts.items():
            text = text.replace(theirs, ours)
        for mounted, folder in self.paths.items():
            if text == mounted or text.startswith(f"{mounted}/"):
                return folder + text[len(mounted) :]
        return text

    def _environment(self, container):
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "EGM_DEBUG": ""}
        for source in container.get("envFrom", ()):
            assert source["secretRef"]["name"] == "storage"
            env |= self.secret
        for variable in container["env"]:
            env[variable["name"]] = self._value(variable)
        env.pop("EGM_PROGRESS_PORT", None)
        return env

    def _value(self, variable):
        """Return the value of a variable: its own, the pod's address, or the token of a Secret."""
        match variable:
            case {"value": value}:
                return self.here(value)
            case {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}:
                return "127.0.0.1"
            case {"valueFrom": {"secretKeyRef": {"name": name, "key": "token"}}}:
                return self.tokens[name]
        raise AssertionError(f"no such variable is expected: {variable}")

    def _start(self, container, **more):
        command = container["command"]
        assert command[0] == "egm"
        words = [sys.executable, "-m", "grounding.cli", *(self.here(w) for w in command[1:])]
        log = (self.root / f"{container['name']}.log").open("ab")
        env = self._environment(container) | more
        return subprocess.Popen(words, cwd=self.root, env=env, stdout=log, stderr=subprocess.STDOUT)

    def run(self, timeout=900):
        """Run the pod's containers to their ends, init containers first; fail unless all exit codes are 0."""
        for container in (*self.spec.get("initContainers", ()), *self.spec["containers"]):
            code = self._start(container).wait(timeout)
            log = self.root / f"{container['name']}.log"
            assert code == 0, f"{container['command']} ended with {code}\n{log.read_text()[-4000:]}"

    def start(self):
        """Run the pod's init containers, then start its main container; return the process."""
        for container in self.spec.get("initContainers", ()):
            assert self._start(container).wait(900) == 0
        [container] = self.spec["containers"]
        return self._start(container)

    def serve(self, timeout=300):
        """Start the pod's server; once it is ready, return (process, host:port here, host:port in the cluster)."""
        [container] = self.spec["containers"]
        port = _free_port()
        process = self._start(container, EGM_PORT=str(port), EGM_HOST="127.0.0.1")
        probe = container["readinessProbe"]["httpGet"]["path"]
        for _ in range(timeout * 4):
            assert process.poll() is None, (self.root / f"{container['name']}.log").read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{probe}", timeout=2) as reply:
                    if reply.status == 200:
                        break
            except OSError:
                pass
            time.sleep(0.25)
        there = f"{self.spec['hostname']}.{self.spec['subdomain']}.default.svc:{container['ports'][0]['containerPort']}"
        return process, f"127.0.0.1:{port}", there


def run_job(objects, root, secret):
    """Run the pods of a job's objects in the operator's order: prepare, then the training, or the servers and the client."""
    root = Path(root)
    configs = {o["metadata"]["name"]: o for o in objects if o["kind"] == "ConfigMap"}
    tokens = {o["metadata"]["name"]: secrets.token_urlsafe(32) for o in objects if o["kind"] == "Secret"}
    servers, hosts = [], {}
    try:
        for number, obj in enumerate(objects):
            where = root / f"{number}-{obj['metadata']['name']}"
            if obj["kind"] == "PyTorchJob":
                replicas = obj["spec"]["pytorchReplicaSpecs"]
                assert list(replicas) == ["Master"] and replicas["Master"]["replicas"] == 1
                Pod(replicas["Master"]["template"], configs, where, secret, tokens=tokens).run()
            elif obj["kind"] == "Job":
                Pod(obj["spec"]["template"], configs, where, secret, hosts, tokens).run()
            elif obj["kind"] == "Pod":
                process, here, there = Pod(obj, configs, where, secret, tokens=tokens).serve()
                servers.append(process)
                hosts[there] = here
            else:
                assert obj["kind"] in ("ConfigMap", "NetworkPolicy", "Secret", "Service"), obj["kind"]
    finally:
        for process in servers:
            process.terminate()
        for process in servers:
            process.wait(60)
