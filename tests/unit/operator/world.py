"""A small world for plans: objects, the controllers that make and end pods, a clock. Enough of each to be wrong in the ways that matter."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from egm_operator.kube.cache import Store, slim
from egm_operator.names import LABEL_ATTEMPT, LABEL_JOB, LABEL_KIND, LABEL_MODEL, LABEL_ROLE, LABEL_UID
from egm_operator.plan import Plan, plan
from egm_operator.settings import Settings
from egm_operator.snapshot import Observed, Report
from egm_operator.status import stamp

SETTINGS = Settings(backoff_base_seconds=10.0)
NOW = 1_800_000_000.0
_FINAL = ("Succeeded", "Failed")
_COUNT = itertools.count()


def train(**spec: Any) -> dict[str, Any]:
    """Return a training job as the API server holds it."""
    return _job(
        "GroundingTrainJob",
        {
            "preset": "egm-8b-rl",
            "data": {"train": ["/data/a.json"], "validation": ["/data/b.jsonl"], "images": ["/data/coco.tar"]},
            "resources": {"nodes": 2, "gpusPerNode": 8},
            "output": "pvc://claim/out",
            **spec,
        },
    )


def evaluation(**spec: Any) -> dict[str, Any]:
    """Return an evaluation job as the API server holds it."""
    return _job(
        "GroundingEvalJob",
        {
            "model": {"source": "hf://x/y"},
            "servers": 2,
            "gpusPerServer": 1,
            "data": {"root": "/d", "images": ["/i"]},
            "output": "s3://bucket/eval",
            **spec,
        },
    )


def _job(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    meta = {
        "name": "j",
        "namespace": "n",
        "uid": f"job-uid-{next(_COUNT)}",
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": stamp(NOW),
    }
    return {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": kind, "metadata": meta, "spec": spec}


class World:
    """One job and what it owns."""

    def __init__(self, raw: dict[str, Any], settings: Settings = SETTINGS) -> None:
        self.store, self.settings, self.now = Store(), settings, NOW
        self.key = (raw["kind"], raw["metadata"]["namespace"], raw["metadata"]["name"])
        self.version = 1
        self.created: list[str] = []
        self.report: Report | None = None
        self.upstream: dict[str, Any] | None = None
        self.events: list[str] = []
        self.specs: dict[str, Any] = {}
        """By an object's uid: what the store has no use for."""
        self.owners: dict[str, str] = {}
        self.store.put(raw)

    # ------------------------------------------------------------ what the API server does
    def write(self, obj: dict[str, Any]) -> str:
        """Store an object under a new version; its uid."""
        self.version += 1
        obj = copy.deepcopy(obj)
        obj["metadata"]["resourceVersion"] = str(self.version)
        obj["metadata"].setdefault("uid", f"uid-{self.version}")
        obj["metadata"].setdefault("creationTimestamp", stamp(self.now))
        self.store.put(obj)
        return str(obj["metadata"]["uid"])

    @property
    def job(self) -> dict[str, Any]:
        found = self.store.get(*self.key)
        assert found is not None
        return found

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.job.get("status") or {})

    def objects(self, kind: str) -> list[dict[str, Any]]:
        return [c for c in self.store.children(self.key) if c["kind"] == kind]

    def alive(self, role: str = "", attempt: int | None = None) -> list[dict[str, Any]]:
        """Pods that are not at their end."""
        found = []
        for pod in self.objects("Pod"):
            labels = pod["metadata"]["labels"]
            if pod["status"]["phase"] in _FINAL or (role and labels[LABEL_ROLE] != role):
                continue
            if attempt is None or labels.get(LABEL_ATTEMPT) == str(attempt):
                found.append(pod)
        return found

    def edit(self, **spec: Any) -> None:
        """The user changes the spec."""
        meta = {**self.job["metadata"], "generation": self.job["metadata"]["generation"] + 1}
        self.write({**self.job, "metadata": meta, "spec": {**self.job["spec"], **spec}})

    # ------------------------------------------------------------ what the operator does
    def plan(self) -> Plan:
        return plan(
            Observed(self.job, self.store.children(self.key), self.upstream, self.report), self.settings, self.now
        )

    def reconcile(self, writes: int = 1_000_000) -> Plan:
        """Plan, and carry out the first `writes` of what it says: fewer is a kill."""
        todo = self.plan()
        steps: list[Any] = [("create", o) for o in todo.create] + [("patch", p) for p in todo.patch]
        steps += [("event", e) for e in todo.events] + ([("status", todo.status)] if todo.status is not None else [])
        steps += [("delete", d) for d in todo.delete]
        for what, thing in steps[:writes]:
            getattr(self, f"_{what}")(thing)
        return todo

    def _create(self, obj: dict[str, Any]) -> None:
        meta = obj["metadata"]
        if self.store.get(obj["kind"], meta["namespace"], meta["name"]) is None:
            if obj["kind"] not in ("Service", "Secret"):
                self.created.append(f"{obj['kind']}/{meta['name']}")
            fresh = copy.deepcopy(obj)
            if obj["kind"] == "Pod":
                fresh["status"] = {"phase": "Pending"}
            self.specs[self.write(fresh)] = obj.get("spec")

    def _patch(self, patch: Any) -> None:
        found = self.store.get(patch.kind, "n", patch.name)
        if found is not None and found["metadata"]["uid"] == patch.uid:
            spec = {**found["spec"], **patch.body["spec"]}
            self.write({**found, "spec": spec})

    def _event(self, event: Any) -> None:
        self.events.append(event.reason)

    def _status(self, status: dict[str, Any]) -> None:
        self.write({**self.job, "status": status})

    def _delete(self, target: Any) -> None:
        found = self.store.get(target.kind, "n", target.name)
        if found is None or found["metadata"]["uid"] != target.uid:
            return
        self.store.drop(found)
        if target.kind != "Pod":
            for pod in self._owned(target.uid):
                self.store.drop(pod)

    def _owned(self, uid: str) -> list[dict[str, Any]]:
        return [p for p in self.objects("Pod") if self.owners.get(p["metadata"]["uid"]) == uid]

    # ------------------------------------------------------------ what controllers and nodes do
    def controllers(self) -> None:
        """Make missing pods, remove those of suspended owners, tell the end."""
        for owner in [*self.objects("PyTorchJob"), *self.objects("Job")]:
            pods = self._owned(owner["metadata"]["uid"])
            gang = owner["kind"] == "PyTorchJob"
            suspended = owner["spec"]["runPolicy"]["suspend"] if gang else owner["spec"]["suspend"]
            if any(c["type"] in (*_FINAL, "Complete") for c in (owner.get("status") or {}).get("conditions", [])):
                continue
            if suspended:
                for pod in pods:
                    self.store.drop(pod)
                continue
            self._make_pods(owner, pods, gang)
            pods = self._owned(owner["metadata"]["uid"])
            if any(p["status"]["phase"] == "Failed" for p in pods):
                self.write({**owner, "status": {"conditions": [{"type": "Failed", "status": "True"}]}})
                for pod in pods:
                    if pod["status"]["phase"] not in _FINAL:
                        self.store.drop(pod)
            elif pods and all(p["status"]["phase"] == "Succeeded" for p in pods):
                done = "Succeeded" if gang else "Complete"
                self.write({**owner, "status": {"conditions": [{"type": done, "status": "True"}]}})

    def _make_pods(self, owner: dict[str, Any], pods: list[dict[str, Any]], gang: bool) -> None:
        spec = self.specs.get(owner["metadata"]["uid"]) or {}
        wanted = [("", 1)]
        if gang:
            wanted = [(role.lower(), r["replicas"]) for role, r in spec["pytorchReplicaSpecs"].items()]
        have = {p["metadata"]["name"] for p in pods}
        for role, count in wanted:
            for i in range(count):
                name = f"{owner['metadata']['name']}-{role or 'pod'}-{i}"
                if name in have:
                    continue
                labels = {
                    k: v
                    for k, v in owner["metadata"]["labels"].items()
                    if k in (LABEL_JOB, LABEL_KIND, LABEL_ROLE, LABEL_ATTEMPT, LABEL_UID, LABEL_MODEL)
                }
                if role:
                    labels["training.kubeflow.org/replica-type"] = role
                meta = {"name": name, "namespace": "n", "labels": labels}
                made = self.write({"kind": "Pod", "metadata": meta, "status": {"phase": "Pending"}})
                self.owners[made] = owner["metadata"]["uid"]

    def _pod(self, pod: dict[str, Any], **status: Any) -> None:
        self.write({**pod, "status": {**pod["status"], **status}})

    def start(self) -> None:
        """Pending pods run and are ready."""
        for pod in self.alive():
            if pod["status"]["phase"] == "Pending":
                self._pod(
                    pod, phase="Running", startTime=stamp(self.now), conditions=[{"type": "Ready", "status": "True"}]
                )

    def prepares(self, code: int | None) -> None:
        """Pods that are not running yet are at preparing their own data (None), or have ended that with an exit code."""
        for pod in self.alive("rl"):
            if pod["status"]["phase"] == "Pending":
                state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
                first = [{"name": "prepare", "image": "i", "state": state}]
                self._pod(pod, phase="Failed" if code else "Pending", initContainerStatuses=first)

    def end(self, role: str, code: int, count: int = 100, message: str = "", reason: str = "") -> None:
        """Running pods of a role end."""
        for pod in [p for p in self.alive(role) if p["status"]["phase"] == "Running"][:count]:
            ended = {"exitCode": code, "finishedAt": stamp(self.now), "message": message, "reason": reason}
            self._pod(
                pod,
                phase="Failed" if code else "Succeeded",
                containerStatuses=[{"name": "c", "state": {"terminated": ended}}],
            )

    def settle(self, rounds: int = 60) -> None:
        """Let every controller act until nothing changes. Trainings and clients succeed; time advances only if nothing else changes."""
        for _ in range(rounds):
            self.controllers()
            self.start()
            todo = self.reconcile()
            if todo.create or todo.patch or todo.delete or todo.status is not None:
                continue
            roles = {p["metadata"]["labels"][LABEL_ROLE] for p in self.alive()} - {"server"}
            if roles:
                self.end(sorted(roles)[0], 0)
            elif todo.at is not None:
                self.now = max(self.now + 1, todo.at)
            elif not (self.reconcile().create or self.alive()):
                return


__all__ = ["NOW", "SETTINGS", "World", "evaluation", "slim", "train"]
