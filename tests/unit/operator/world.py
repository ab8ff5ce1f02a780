"""A small simulation for plans: objects, the controllers that create and end pods, and a clock, with all faults that matter."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from egm_operator.kinds import JOB
from egm_operator.kube.cache import Store, slim
from egm_operator.kube.gang_forms import FORMS, GangForm
from egm_operator.kube.objects import ObjectWarning, owns_gang
from egm_operator.manifests.gangs import BACKENDS
from egm_operator.manifests.merge import merge
from egm_operator.names import (
    GANG_ROLES,
    LABEL_ATTEMPT,
    LABEL_GROUP,
    LABEL_GROUP_SIZE,
    LABEL_JOB,
    LABEL_KIND,
    LABEL_MODEL,
    LABEL_ROLE,
    LABEL_UID,
)
from egm_operator.plan import Plan, plan
from egm_operator.settings import Settings
from egm_operator.snapshot import Observed, Report, divided
from egm_operator.status import stamp

from grounding.api.handed_down import QUEUE_LABEL

SETTINGS = Settings(backoff_base_seconds=10.0, backend="pytorchjob")
"""The fixture `back_end` replaces these settings."""
NOW = 1_800_000_000.0
_FINAL = ("Succeeded", "Failed")
GATED = [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gates"}]
"""Conditions of a pod that Kueue holds back from the scheduler"""
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


def form() -> GangForm:
    """Return the form of gangs with these settings."""
    return BACKENDS[SETTINGS.backend].form


class World:
    """One job and its objects."""

    def __init__(
        self,
        raw: dict[str, Any],
        settings: Settings | None = None,
        default_queue: bool = False,
        grace_seconds: float = 0.0,
        name: str = "",
    ) -> None:
        """`name`: the job's name, if it is not called j."""
        raw = {**raw, "metadata": {**raw["metadata"], **({"name": name} if name else {})}}
        self.store, self.settings, self.now = Store(), SETTINGS if settings is None else settings, NOW
        self.key = (raw["kind"], raw["metadata"]["namespace"], raw["metadata"]["name"])
        self.version = 1
        self.created: list[str] = []
        self.names: set[tuple[str, str]] = set()
        """Kind and name of all objects that were created"""
        self.report: Report | None = None
        self.upstream: dict[str, Any] | None = None
        self.events: list[str] = []
        self.specs: dict[str, Any] = {}
        """Spec of each object by its uid; the store keeps only a part of it"""
        self.parents: dict[str, str] = {}
        """uid of an object -> name of the pod with which Kueue admits it, or an empty string"""
        self.owners: dict[str, str] = {}
        self.default_queue = default_queue
        """True if the namespace has a LocalQueue called default, into which Kueue takes every Job that names no queue"""
        self.grace_seconds = grace_seconds
        """How long a running server still exists after its deletion"""
        self.dead: set[str] = set()
        """uids of the pods whose node is dead: they stay in deletion unless they are deleted by force"""
        self.warnings: list[ObjectWarning] = []
        self.writes = 0
        self.store.put(raw)

    # ------------------------------------------------------------ the API server
    def write(self, obj: dict[str, Any]) -> str:
        """Store an object under a new version; return its uid."""
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

    def gangs(self) -> list[dict[str, Any]]:
        """Return the owners of gangs."""
        return [c for c in self.store.children(self.key) if owns_gang(c)]

    def batch_jobs(self) -> list[dict[str, Any]]:
        """Return the Jobs of roles that run once."""
        return [c for c in self.objects("Job") if not owns_gang(c)]

    def alive(self, role: str = "", attempt: int | None = None) -> list[dict[str, Any]]:
        """Return the pods that have not ended."""
        found = []
        for pod in self.objects("Pod"):
            labels = pod["metadata"]["labels"]
            if pod["status"]["phase"] in _FINAL or (role and labels[LABEL_ROLE] != role):
                continue
            if attempt is None or labels.get(LABEL_ATTEMPT) == str(attempt):
                found.append(pod)
        return found

    def create_again(self) -> None:
        """Delete the job, and create another of the same name. The cluster deletes all objects except pods on dead nodes."""
        job = {k: v for k, v in self.job.items() if k != "status"}
        for child in self.store.children(self.key):
            self._drop(child)
        self.store.drop(self.job)
        meta = {"uid": f"job-uid-{next(_COUNT)}", "generation": 1, "creationTimestamp": stamp(self.now)}
        self.write({**job, "metadata": {**job["metadata"], **meta}})

    def edit(self, **spec: Any) -> None:
        """Change the spec, as a user does."""
        meta = {**self.job["metadata"], "generation": self.job["metadata"]["generation"] + 1}
        self.write({**self.job, "metadata": meta, "spec": {**self.job["spec"], **spec}})

    # ------------------------------------------------------------ the operator
    def plan(self) -> Plan:
        own, earlier = divided(self.store.children(self.key), self.job)
        seen = Observed(self.job, own, self.upstream, self.report, self.warnings, earlier=earlier)
        return plan(seen, self.settings, self.now)

    def reconcile(self, writes: int = 1_000_000) -> Plan:
        """Plan, and carry out the first `writes` writes; fewer than all means that the operator is killed."""
        todo = self.plan()
        steps: list[Any] = [("create", o) for o in todo.create] + [("patch", p) for p in todo.patch]
        steps += [("event", e) for e in todo.events] + ([("status", todo.status)] if todo.status is not None else [])
        steps += [("delete", d) for d in todo.delete] + [("create", o) for o in todo.further]
        for what, thing in steps[:writes]:
            getattr(self, f"_{what}")(thing)
            self.writes += 1
        return todo

    def _create(self, obj: dict[str, Any]) -> None:
        meta = obj["metadata"]
        self.names.add((obj["kind"], meta["name"]))
        if self.store.get(obj["kind"], meta["namespace"], meta["name"]) is None:
            if obj["kind"] not in ("Service", "Secret"):
                self.created.append(f"{obj['kind']}/{meta['name']}")
            fresh = copy.deepcopy(obj)
            if obj["kind"] == "Pod":
                fresh["status"] = {"phase": "Pending"}
                if self.default_queue:
                    fresh["metadata"]["labels"].setdefault(QUEUE_LABEL, "default")
                if fresh["metadata"]["labels"].get(QUEUE_LABEL):
                    fresh["status"]["conditions"] = GATED
            pods = [
                owner["name"] for owner in meta["ownerReferences"] if owner["kind"] == "Pod" and owner["controller"]
            ]
            if obj["kind"] in FORMS and not pods:
                self._webhook(fresh)
            uid = self.write(fresh)
            self.specs[uid], self.parents[uid] = obj.get("spec"), "".join(pods)

    def _patch(self, patch: Any) -> None:
        found = self.store.get(patch.kind, "n", patch.name)
        if found is not None and found["metadata"]["uid"] == patch.uid:
            if found["metadata"]["labels"].get(QUEUE_LABEL):
                assert FORMS[patch.kind].suspended(patch.body["spec"]), (
                    "the operator resumed an object that is in a queue"
                )
            spec, meta = {**found["spec"], **patch.body["spec"]}, dict(found["metadata"])
            marks = {**meta.get("annotations", {}), **patch.body.get("metadata", {}).get("annotations", {})}
            meta["annotations"] = {k: v for k, v in marks.items() if v is not None}
            self.write({**found, "metadata": meta, "spec": spec})

    def _webhook(self, obj: dict[str, Any]) -> None:
        """Do what Kueue's webhook does to a new Job or PyTorchJob."""
        labels = obj["metadata"]["labels"]
        if self.default_queue:
            labels.setdefault(QUEUE_LABEL, "default")
        if labels.get(QUEUE_LABEL):
            obj["spec"] = merge(obj["spec"], FORMS[obj["kind"]].suspension(True))

    def kueue(self, admits: bool) -> None:
        """Admit all objects in queues, or preempt them and suspend the clients that belong to their admission, as Kueue does."""
        staying = [pod for pod in self.alive("server") if not self._leaves(pod)]
        servers = {pod["metadata"]["name"] for pod in staying}
        for owner in [*self.objects("PyTorchJob"), *self.objects("Job")]:
            known = FORMS[owner["kind"]]
            if owner["metadata"]["labels"].get(QUEUE_LABEL) and known.suspended(owner["spec"]) is admits:
                self.write({**owner, "spec": known.suspension(not admits)})
            elif not admits and self.parents.get(owner["metadata"]["uid"]) in servers:
                self.write({**owner, "spec": known.suspension(True)})
        groups: dict[str, list[dict[str, Any]]] = {}
        for pod in staying:
            if pod["metadata"]["labels"].get(QUEUE_LABEL):
                groups.setdefault(pod["metadata"]["labels"][LABEL_GROUP], []).append(pod)
        for pods in groups.values():
            whole = len(pods) == int(pods[0]["metadata"]["labels"][LABEL_GROUP_SIZE])
            for pod in pods:
                if admits and whole and pod["status"].get("conditions") == GATED:
                    self._pod(pod, conditions=[])
                elif not admits and pod["status"].get("conditions") != GATED:
                    self.remove(pod)

    def _event(self, event: Any) -> None:
        self.events.append(event.reason)

    def _status(self, status: dict[str, Any]) -> None:
        self.write({**self.job, "status": status})

    def _delete(self, target: Any) -> None:
        found = self.store.get(target.kind, "n", target.name)
        if found is None or found["metadata"]["uid"] != target.uid:
            return
        if target.kind == "Pod":
            self.remove(found, target.force)
            return
        self.store.drop(found)
        for pod in self._owned(target.uid):
            self._drop(pod)

    def remove(self, pod: dict[str, Any], force: bool = False) -> None:
        """Delete a pod. A running server then answers no more, and exists until its grace period ends."""
        server = pod["metadata"]["labels"][LABEL_ROLE] == "server" and pod["status"]["phase"] == "Running"
        if force:
            self.store.drop(pod)
        elif self._is_dead(pod) or not (server and self.grace_seconds):
            self._drop(pod)
        elif not self._leaves(pod):
            ends = {"deletionTimestamp": stamp(self.now + self.grace_seconds)}
            self._pod({**pod, "metadata": {**pod["metadata"], **ends}}, conditions=[self._unready()])

    def _is_dead(self, pod: dict[str, Any]) -> bool:
        return pod["metadata"]["uid"] in self.dead

    def _drop(self, pod: dict[str, Any]) -> None:
        """Delete a pod; on a dead node, nothing ends it."""
        if not self._is_dead(pod):
            self.store.drop(pod)
        elif not self._leaves(pod):
            self.write({**pod, "metadata": {**pod["metadata"], "deletionTimestamp": stamp(self.now)}})

    def _unready(self) -> dict[str, str]:
        return {"type": "Ready", "status": "False", "lastTransitionTime": stamp(self.now)}

    @staticmethod
    def _leaves(pod: dict[str, Any]) -> str:
        """Return when the grace period of a deleted pod ends; empty if the pod is not deleted."""
        return str(pod["metadata"].get("deletionTimestamp") or "")

    def _owned(self, uid: str) -> list[dict[str, Any]]:
        return [p for p in self.objects("Pod") if self.owners.get(p["metadata"]["uid"]) == uid]

    # ------------------------------------------------------------ controllers and nodes
    def controllers(self) -> None:
        """Create missing pods, remove those of suspended owners and those whose grace period has ended, report ends."""
        for pod in self.objects("Pod"):
            if self._leaves(pod) and self._leaves(pod) <= stamp(self.now):
                self.remove(pod)
        for owner in [*self.objects("PyTorchJob"), *self.objects("Job")]:
            pods, known = self._owned(owner["metadata"]["uid"]), FORMS[owner["kind"]]
            said = [c["type"] for c in (owner.get("status") or {}).get("conditions", [])]
            if said == ["SuccessCriteriaMet"]:
                self._tell(owner, "Complete")
            if any(kind in (*known.succeeded, *known.failed) for kind in said):
                continue
            if known.suspended(owner["spec"]):
                for pod in pods:
                    # a Job does not create a pod again if its index is finished
                    if owner["kind"] == "PyTorchJob" or pod["status"]["phase"] not in _FINAL:
                        self._drop(pod)
                continue
            self._make_pods(owner, pods)
            self._judge(owner, self._owned(owner["metadata"]["uid"]))

    def _judge(self, owner: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """Report the end of an owner, and end its running pods."""
        phases = {p["metadata"]["name"]: p["status"]["phase"] for p in pods}
        first = [p["status"]["phase"] for p in pods if self._index(p) == "0"]
        done = bool(pods) and all(phase == "Succeeded" for phase in phases.values())
        if "Failed" in phases.values():
            self._tell(owner, "Failed")
        elif owner["kind"] == JOB.name and owns_gang(owner) and first == ["Succeeded"]:
            self._tell(owner, "SuccessCriteriaMet")
        elif done:
            self._tell(owner, FORMS[owner["kind"]].succeeded[0])
        else:
            return
        for pod in pods:
            if pod["status"]["phase"] not in _FINAL:
                self._drop(pod)

    def _tell(self, owner: dict[str, Any], condition: str) -> None:
        self.write({**owner, "status": {"conditions": [{"type": condition, "status": "True"}]}})

    @staticmethod
    def _index(pod: dict[str, Any]) -> str:
        return str(pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", ""))

    def _make_pods(self, owner: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        spec = self.specs.get(owner["metadata"]["uid"]) or {}
        wanted: list[tuple[str, dict[str, str]]] = [("pod-0", {})]
        if owner["kind"] == "PyTorchJob":
            replicas = {role.lower(): r["replicas"] for role, r in spec["pytorchReplicaSpecs"].items()}
            label = "training.kubeflow.org/replica-type"
            wanted = [(f"{role}-{i}", {label: role}) for role, count in replicas.items() for i in range(count)]
        elif owns_gang(owner):
            label = "batch.kubernetes.io/job-completion-index"
            wanted = [(str(i), {label: str(i)}) for i in range(spec["completions"])]
        have = {p["metadata"]["name"] for p in pods}
        for suffix, more in wanted:
            name = f"{owner['metadata']['name']}-{suffix}"
            if name in have or f"{name}-again" in have:
                continue
            if self.store.get("Pod", "n", name) is not None:
                if owner["kind"] == "PyTorchJob":  # its controller gives its pods fixed names
                    continue
                name += "-again"
            labels = {
                k: v
                for k, v in owner["metadata"]["labels"].items()
                if k in (LABEL_JOB, LABEL_KIND, LABEL_ROLE, LABEL_ATTEMPT, LABEL_UID, LABEL_MODEL)
            }
            meta = {"name": name, "namespace": "n", "labels": labels | more}
            self.names.add(("Pod", name))
            made = self.write({"kind": "Pod", "metadata": meta, "status": {"phase": "Pending"}})
            self.owners[made] = owner["metadata"]["uid"]

    def _pod(self, pod: dict[str, Any], **status: Any) -> None:
        self.write({**pod, "status": {**pod["status"], **status}})

    def start(self, count: int = 100) -> None:
        """Let up to `count` pending pods run and become ready."""
        pending = [pod for pod in self.alive() if pod["status"]["phase"] == "Pending" and not self._is_dead(pod)]
        for pod in [pod for pod in pending if pod["status"].get("conditions") != GATED][:count]:
            self._pod(pod, phase="Running", startTime=stamp(self.now), conditions=[{"type": "Ready", "status": "True"}])

    def unready(self) -> None:
        """Let servers fail their probe."""
        for pod in self.alive("server"):
            if pod["status"]["phase"] == "Running" and not self._leaves(pod):
                self._pod(pod, conditions=[self._unready()])

    def ready(self) -> None:
        """Let running servers answer their probe."""
        for pod in self.alive("server"):
            if pod["status"]["phase"] == "Running" and not self._leaves(pod):
                self._pod(pod, conditions=[{"type": "Ready", "status": "True"}])

    def prepares(self, code: int | None) -> None:
        """Let pods that do not run yet prepare their own data (None), or end the preparation with an exit code."""
        for pod in self.alive("rl"):
            if pod["status"]["phase"] == "Pending":
                state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
                first = [{"name": "prepare", "image": "i", "state": state}]
                self._pod(pod, phase="Failed" if code else "Pending", initContainerStatuses=first)

    def end(self, role: str, code: int, count: int = 100, message: str = "", reason: str = "") -> None:
        """End the running pods of a role."""
        running = [p for p in self.alive(role) if p["status"]["phase"] == "Running" and not self._is_dead(p)]
        for pod in running[:count]:
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
            if todo.create or todo.patch or todo.delete or todo.further or todo.status is not None:
                continue
            here = [p for p in self.alive() if not self._is_dead(p)]
            ready = [p["metadata"]["labels"][LABEL_ROLE] for p in here]
            wanted = (self.job["spec"].get("resources") or {}).get("nodes", 1)
            # the pods of a gang wait for each other
            roles = {role for role in ready if role not in GANG_ROLES or ready.count(role) >= wanted} - {"server"}
            if roles:
                self.end(sorted(roles)[0], 0)
            elif todo.at is not None:
                self.now = max(self.now + 1, todo.at)
            elif not (self.reconcile().create or here):
                return


__all__ = ["NOW", "SETTINGS", "World", "evaluation", "form", "slim", "train"]
