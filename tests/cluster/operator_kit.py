"""Shared code of the operator's cluster tests: a small synchronous client, an operator process, and jobs with annotated pods."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from egm_operator.kube.gang_forms import GangForm
from egm_operator.manifests.gangs import BACKENDS
from ruamel.yaml import YAML

from grounding.api.crd import crds

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
GROUP = "/apis/grounding.egm.dev/v1alpha1"
PATHS = {
    "gtj": (GROUP, "groundingtrainjobs"),
    "gej": (GROUP, "groundingevaljobs"),
    "pytorchjob": ("/apis/kubeflow.org/v1", "pytorchjobs"),
    "job": ("/apis/batch/v1", "jobs"),
    "pod": ("/api/v1", "pods"),
    "service": ("/api/v1", "services"),
    "event": ("/api/v1", "events"),
    "lease": ("/apis/coordination.k8s.io/v1", "leases"),
}


def kubeconfig() -> Path:
    """Return the kubeconfig of the cluster for the tests: EGM_KUBECONFIG, or that of `make cluster`."""
    return Path(os.environ.get("EGM_KUBECONFIG") or ROOT / ".cache" / "cluster" / "kubeconfig")


class ApiError(OSError):
    """The API server has refused a request."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(f"{code}: {text[:500]}")


class Api:
    """A client for JSON over HTTPS with the kubeconfig's client certificate, with one open connection per thread."""

    def __init__(self, path: Path) -> None:
        found = YAML(typ="safe").load(path.read_text())
        cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
        self.server = cluster["server"]
        self._ca = (
            base64.b64decode(cluster["certificate-authority-data"]).decode()
            if "certificate-authority-data" in cluster
            else (path.parent / cluster["certificate-authority"]).read_text()
        )
        self.ssl = ssl.create_default_context(cadata=self._ca)
        certificate, key = user.get("client-certificate"), user.get("client-key")
        with tempfile.TemporaryDirectory() as folder:
            if certificate is None:
                certificate, key = Path(folder) / "crt", Path(folder) / "key"
                certificate.write_bytes(base64.b64decode(user["client-certificate-data"]))
                key.write_bytes(base64.b64decode(user["client-key-data"]))
            self.ssl.load_cert_chain(certificate, key)
        self._local = threading.local()

    def _connection(self) -> http.client.HTTPSConnection:
        found: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        if found is None:
            where = urllib.parse.urlsplit(self.server)
            found = http.client.HTTPSConnection(str(where.hostname), where.port, context=self.ssl, timeout=30)
            self._local.connection = found
        return found

    def request(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """Send a request and return the answer. Raises `ApiError` for a refusal, `OSError` if there is no answer. If the server is busy (429),
        retry for 30 s.
        """
        for _ in range(30):
            try:
                return self._request(method, path, body, content)
            except ApiError as error:
                if error.code != 429:
                    raise
                time.sleep(1)
        return self._request(method, path, body, content)

    def _request(self, method: str, path: str, body: Any, content: str) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": content, "Accept": "application/json"}
        for again in (True, False):
            connection = self._connection()
            fresh = connection.sock is None
            try:
                connection.request(method, path, data, headers)
                answer = connection.getresponse()
                text = answer.read()
                break
            except (http.client.HTTPException, OSError) as error:
                connection.close()
                if fresh or not again:  # an older connection may have been closed by the server while idle
                    raise error if isinstance(error, OSError) else ConnectionError(repr(error)) from error
        if answer.status >= 400:
            raise ApiError(answer.status, text.decode(errors="replace"))
        return json.loads(text)

    def lines(self, path: str) -> Iterator[bytes]:
        """Yield the lines of a watch until the server ends it, on a separate connection."""
        where = urllib.parse.urlsplit(self.server)
        connection = http.client.HTTPSConnection(str(where.hostname), where.port, context=self.ssl)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ApiError(answer.status, answer.read().decode(errors="replace"))
            yield from answer

    def answer(
        self, token: str, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> tuple[int, str]:
        """Return the status and text with which the server answers a request that carries this token."""
        where = urllib.parse.urlsplit(self.server)
        context = ssl.create_default_context(cadata=self._ca)  # without our own certificate
        connection = http.client.HTTPSConnection(str(where.hostname), where.port, context=context, timeout=30)
        headers = {"Content-Type": content, "Authorization": f"Bearer {token}"}
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body).encode() if body is not None else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")

    def allowed(self, path: str, body: Any, token: str) -> bool:
        """Return whether a request with this token may create the object; fail if it is refused for another reason."""
        status, text = self.answer(token, "POST", path, body)
        assert status in (200, 201, 403), text
        return status != 403

    def path(self, kind: str, namespace: str, name: str = "") -> str:
        base, plural = PATHS[kind]
        return f"{base}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")

    def create(self, kind: str, namespace: str, body: Any) -> Any:
        return self.request("POST", self.path(kind, namespace), body)

    def get(self, kind: str, namespace: str, name: str) -> Any:
        try:
            return self.request("GET", self.path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, kind: str, namespace: str, selector: str = "") -> list[Any]:
        query = f"?labelSelector={selector}" if selector else ""
        return list(self.request("GET", self.path(kind, namespace) + query)["items"])

    def patch(self, kind: str, namespace: str, name: str, body: Any) -> Any:
        return self.request("PATCH", self.path(kind, namespace, name), body, "application/merge-patch+json")

    def delete(self, kind: str, namespace: str, name: str) -> None:
        try:
            self.request("DELETE", self.path(kind, namespace, name), {"propagationPolicy": "Background"})
        except ApiError as error:
            if error.code != 404:
                raise

    def everything(self, namespace: str) -> list[str]:
        """Return all objects in a namespace except those of Kubernetes itself, the tests' claim, and Events."""
        left = []
        groups = [
            (f"/apis/{v['groupVersion']}")
            for g in self.request("GET", "/apis")["groups"]
            for v in [g["preferredVersion"]]
        ]
        for base in ["/api/v1", *groups]:
            for resource in self.request("GET", base)["resources"]:
                if not resource["namespaced"] or "list" not in resource["verbs"] or resource["name"] in ("events",):
                    continue
                for item in self.request("GET", f"{base}/namespaces/{namespace}/{resource['name']}").get("items") or []:
                    left.append(f"{resource['name']}/{item['metadata']['name']}")
        own = {"configmaps/kube-root-ca.crt", "serviceaccounts/default", "persistentvolumeclaims/egm"}
        return sorted(set(left) - own)


def until(what: str, look: Callable[[], T], seconds: float = 60.0, pause: float = 0.1) -> T:
    """Return the first true value of `look`. Fails with the last value."""
    end, seen = time.monotonic() + seconds, None
    while time.monotonic() < end:
        seen = look()
        if seen:
            return seen
        time.sleep(pause)
    raise AssertionError(f"waited {seconds:.0f} s for {what}; last seen: {seen!r}")


_MORTAL = """
import os, sys
from egm_operator.controller import main
from egm_operator.kube import client as api
left, whole = int(sys.argv[1]), api.Api.request

async def mortal(self, method, path, **more):
    global left
    written = method != "GET" and "/leases" not in path
    try:
        return await whole(self, method, path, **more)
    except api.ApiError as error:
        # a conflict with an object of an earlier process does not count as a write; otherwise no process would get further
        written = written and error.status != 409
        raise
    finally:
        if written:
            left -= 1
            if left == 0:
                os._exit(9)

api.Api.request = mortal
main.main()
"""


class Operator:
    """A process of `python -m egm_operator`."""

    started: ClassVar[list[Operator]] = []

    def __init__(
        self, namespaces: str, log: Path, die_after: int = 0, command: Sequence[str] = (), **settings: str
    ) -> None:
        """`die_after`: the process ends as if killed, right after the answer to its n-th write to the API server; a conflict is not a
        write."""
        self.log, self.command = log, list(command) or [sys.executable, "-m", "egm_operator"]
        if die_after:
            self.command = [sys.executable, "-c", _MORTAL, str(die_after)]
        self.env = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig()),
            "PYTHONUNBUFFERED": "1",
            "EGM_OPERATOR_NAMESPACES": namespaces,
            "EGM_OPERATOR_LEASE_NAMESPACE": namespaces.split(",")[0],
            "EGM_OPERATOR_LEASE_SECONDS": "3",
            "EGM_OPERATOR_BACKOFF_BASE_SECONDS": "1",
            "EGM_OPERATOR_PROGRESS_VIA": "off",
            "EGM_OPERATOR_LOG_FORMAT": "json",
            "EGM_OPERATOR_HEALTH_PORT": "0",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Operator:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=out, stderr=out)
        self.started.append(self)
        return self

    def kill(self) -> None:
        """Kill the process with SIGKILL, so that it cannot finish anything."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Stop the process as a kubelet does; return the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=30)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def lines(self) -> list[dict[str, Any]]:
        """Return the log of the process."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def train_job(
    name: str, pods: dict[str, str] | None = None, nodes: int = 1, prepare_seconds: str = "0s", **spec: Any
) -> dict[str, Any]:
    """Return a train job whose pods do what the annotations `pods` say (hack/cluster/kwok/stages.yaml)."""
    return {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingTrainJob",
        "metadata": {"name": name},
        "spec": {
            "preset": "egm-8b-rl",
            "data": {"train": ["/data/a.json"], "validation": ["/data/b.jsonl"], "images": ["/data/coco.tar"]},
            "resources": {"nodes": nodes, "gpusPerNode": 1},
            "output": "pvc://egm/out",
            "podTemplate": {"metadata": {"annotations": pods or {}}},
            **spec,
        },
    }


def eval_job(name: str, servers: int = 2, **spec: Any) -> dict[str, Any]:
    """Return an evaluation with servers of one GPU."""
    return {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingEvalJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "hf://JamesZGQ/EGM-8B"},
            "servers": servers,
            "gpusPerServer": 1,
            "data": {"root": "/data/eval", "images": ["/data/coco.tar"]},
            "output": "s3://bucket/eval",
            **spec,
        },
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def fresh_name(prefix: str = "j") -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


class Drive:
    """Controls the pods of a namespace. `backend`: the back end that its operator uses for gangs."""

    def __init__(self, api: Api, namespace: str, backend: str = "pytorchjob") -> None:
        self.api, self.namespace, self.backend = api, namespace, backend

    @property
    def form(self) -> GangForm:
        """Return the form of the owners of gangs."""
        return BACKENDS[self.backend].form

    def gang(self, job: str, attempt: int = 1) -> Any:
        """Return the owner of an attempt's pods; None if there is none."""
        return self.api.get(self.backend, self.namespace, f"{job}-a{attempt}")

    def suspend_gang(self, job: str, suspend: bool, attempt: int = 1) -> None:
        """Suspend or resume the owner of an attempt's pods, as Kueue does."""
        body = {"spec": self.form.suspension(suspend)}
        self.api.patch(self.backend, self.namespace, f"{job}-a{attempt}", body)

    def is_first(self, pod: Any) -> bool:
        """Return whether a pod of a gang has rank 0."""
        label, value = self.form.first_label
        return bool(pod["metadata"]["labels"].get(label) == value)

    def worker(self, job: str, attempt: int = 1) -> Any:
        """Return the running pod of rank 1 of a gang of two."""
        return next(p for p in self.running(job, "rl", 2, attempt=attempt) if not self.is_first(p))

    def status(self, name: str, kind: str = "gtj") -> dict[str, Any]:
        found = self.api.get(kind, self.namespace, name)
        return dict((found or {}).get("status") or {})

    def writes(self) -> object:
        """Return a value that changes with each write of an operator: the jobs' versions, and the names of all objects."""
        made = {o["metadata"]["name"] for kind in ("job", "pytorchjob") for o in self.api.list(kind, self.namespace)}
        jobs = [o["metadata"] for kind in ("gtj", "gej") for o in self.api.list(kind, self.namespace)]
        return made, {(m["name"], m["resourceVersion"]) for m in jobs}

    def phase(
        self, name: str, *wanted: str, kind: str = "gtj", seconds: float = 60.0, pause: float = 0.1
    ) -> dict[str, Any]:
        """Wait for one of these phases; return the status."""

        def look() -> Any:
            status = self.status(name, kind)
            return status if status.get("phase") in wanted else None

        try:
            return until(f"{name} to be {wanted}", look, seconds, pause)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {json.dumps(self.status(name, kind), indent=1)}") from None

    def pods(self, job: str, role: str = "", attempt: int | None = None, kind: str = "train") -> list[Any]:
        selector = f"grounding.egm.dev/job={job},grounding.egm.dev/kind={kind}"
        if role:
            selector += f",grounding.egm.dev/role={role}"
        if attempt is not None:
            selector += f",grounding.egm.dev/attempt={attempt}"
        return self.api.list(
            "pod", self.namespace, selector.replace("=", "%3D").replace(",", "%2C").replace("/", "%2F")
        )

    def running(
        self, job: str, role: str, count: int = 1, attempt: int | None = None, kind: str = "train"
    ) -> list[Any]:
        """Wait until this many pods of a role run."""

        def look() -> list[Any] | None:
            found = [p for p in self.pods(job, role, attempt, kind) if p["status"].get("phase") == "Running"]
            return found if len(found) >= count else None

        return until(f"{count} {role} pods of {job}", look)

    def annotate(self, pod: Any, **what: str) -> None:
        """Set annotations on a pod that KWOK obeys: exit_code="1", evict="true", progress=..."""
        names = {
            k: ("grounding.egm.dev/progress" if k == "progress" else f"egm.test/{k.replace('_', '-')}") for k in what
        }
        wishes = {"metadata": {"annotations": {names[k]: v for k, v in what.items()}}}
        try:
            self.api.patch("pod", self.namespace, pod["metadata"]["name"], wishes)
        except ApiError as error:
            if error.code != 404:  # the pod's gang has ended already
                raise

    def begin(self, pod: Any) -> None:
        """Wait until a pod waits because of `egm.test/waiting`, then let it run.

        If the annotation is removed while KWOK is still writing its effect, KWOK leaves the pod waiting forever (2 of
        80 pods).
        """
        name = pod["metadata"]["name"]

        def waits() -> bool:
            status = (self.api.get("pod", self.namespace, name) or {}).get("status", {})
            return any("waiting" in container["state"] for container in status.get("containerStatuses", []))

        until(f"pod {name} to wait", waits)
        self.api.patch("pod", self.namespace, name, {"metadata": {"annotations": {"egm.test/waiting": None}}})

    def report(self, job: str, step: int, total: int = 9, **more: object) -> None:
        """Let rank 0 report a step, by an annotation of its pod."""
        for pod in self.pods(job, "rl"):
            self.annotate(pod, progress=json.dumps({"step": step, "totalSteps": total, "time": time.time(), **more}))

    def end(
        self,
        job: str,
        role: str,
        code: int = 0,
        attempt: int | None = None,
        kind: str = "train",
        count: int = 1,
        **what: str,
    ) -> None:
        """Let running pods of a role end."""
        for pod in self.running(job, role, count, attempt, kind):
            self.annotate(pod, exit_code=str(code), **what)

    def prepared(self, job: str, kind: str = "train") -> None:
        self.end(job, "prepare", 0, kind=kind)


@contextlib.contextmanager
def new_namespace(api: Api, prefix: str = "op") -> Iterator[str]:
    """Install the CRDs, create a namespace, yield its name, and delete the namespace at the end."""
    for crd in crds().values():
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}?fieldManager=tests&force=true"
        api.request("PATCH", path, crd, "application/apply-patch+yaml")
    name = fresh_name(prefix)
    api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    until("the namespace's service account", lambda: any(True for _ in _accounts(api, name)))
    _claim(api, name)
    try:
        yield name
    finally:
        api.request("DELETE", f"/api/v1/namespaces/{name}")
        api.request("DELETE", f"/api/v1/persistentvolumes/{name}")


def _claim(api: Api, namespace: str) -> None:
    """Create the claim `egm`, the output of the training jobs of these tests; it has no storage."""
    shared: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    to = {"claimRef": {"namespace": namespace, "name": "egm"}, "persistentVolumeReclaimPolicy": "Retain"}
    volume = {"capacity": {"storage": "1Gi"}, "hostPath": {"path": "/nowhere"}, **to, **shared}
    api.request("POST", "/api/v1/persistentvolumes", {"metadata": {"name": namespace}, "spec": volume})
    claims = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    wish = {"resources": {"requests": {"storage": "1Gi"}}, "volumeName": namespace, **shared}
    api.request("POST", claims, {"metadata": {"name": "egm"}, "spec": wish})
    until("the claim", lambda: api.request("GET", f"{claims}/egm")["status"].get("phase") == "Bound")


def _accounts(api: Api, namespace: str) -> list[Any]:
    return list(api.request("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts")["items"])
