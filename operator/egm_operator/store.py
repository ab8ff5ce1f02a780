"""What the watches have seen, by kind and name, with our own writes on top: a reconcile never sees the world older than what it did.

A watch lags behind our writes. Each answer of the API server is put here at once, and an event older than what is here is left out, by
comparing resource versions of one object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from egm_operator.names import KIND_OF_SHORT, LABEL_JOB, LABEL_KIND, PLURALS
from egm_operator.status import stamp

Raw = dict[str, Any]
Key = tuple[str, str, str]
"""Kind (GroundingTrainJob or GroundingEvalJob), namespace, name of a job."""


def version(obj: Mapping[str, Any]) -> int:
    """Resource version as a number: those of one object in etcd grow."""
    text = str(obj.get("metadata", {}).get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


def slim(obj: Mapping[str, Any]) -> Raw:
    """The parts of an object that plans read: a pod's spec is most of its size and nobody looks at it again."""
    meta = obj.get("metadata", {})
    kept = {k: v for k, v in meta.items() if k not in ("managedFields", "selfLink", "generateName")}
    slimmed: Raw = {"apiVersion": obj.get("apiVersion"), "kind": obj.get("kind"), "metadata": kept}
    if "status" in obj:
        slimmed["status"] = obj["status"]
    kind = obj.get("kind")
    if kind == "Pod":
        slimmed["spec"] = {k: v for k, v in (obj.get("spec") or {}).items() if k in ("nodeName", "restartPolicy")}
    elif kind == "PyTorchJob":
        slimmed["spec"] = {"runPolicy": {"suspend": bool((obj.get("spec") or {}).get("runPolicy", {}).get("suspend"))}}
    elif kind == "Job":
        slimmed["spec"] = {"suspend": bool((obj.get("spec") or {}).get("suspend"))}
    elif kind in ("GroundingTrainJob", "GroundingEvalJob"):
        slimmed["spec"] = obj.get("spec") or {}
    return slimmed


class Store:
    """Objects by (kind, namespace, name), children by the job they belong to."""

    def __init__(self, changed: Callable[[Key], None] = lambda _: None) -> None:
        self._objects: dict[tuple[str, str, str], Raw] = {}
        self._children: dict[Key, dict[tuple[str, str, str], None]] = {}
        self._waiting: dict[tuple[str, str], set[Key]] = {}
        self._wanted: dict[Key, tuple[str, str]] = {}
        self._changed = changed

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """One object, or None."""
        return self._objects.get((kind, namespace, name))

    def jobs(self) -> list[Key]:
        """Keys of all jobs."""
        return [k for k in self._objects if k[0] in ("GroundingTrainJob", "GroundingEvalJob")]

    def counts(self) -> Counter[str]:
        """How many objects there are of each kind."""
        return Counter(kind for kind, _, _ in self._objects)

    def children(self, key: Key) -> list[Raw]:
        """Objects labelled as belonging to a job, in order of kind and name."""
        return [self._objects[i] for i in sorted(self._children.get(key, ()))]

    def put(self, obj: Mapping[str, Any]) -> None:
        """Take in an object, unless what is here is newer; wakes its job when something changed."""
        identity = _identity(obj)
        old = self._objects.get(identity)
        if old is not None:
            same = old["metadata"].get("uid") == obj["metadata"].get("uid")
            if same and version(obj) <= version(old):
                return
        new = self._objects[identity] = slim(obj)
        key = _job_of(new)
        if key != identity and key is not None:
            self._children.setdefault(key, {})[identity] = None
        self._index(identity, new)
        self._wake(identity, key)

    def drop(self, obj: Mapping[str, Any]) -> None:
        """Forget an object that is gone, if it is the one that is here."""
        identity = _identity(obj)
        old = self._objects.get(identity)
        uid = obj["metadata"].get("uid")
        if old is None or (uid and old["metadata"].get("uid") != uid):
            return
        del self._objects[identity]
        key = _job_of(old)
        if key is not None and key in self._children:
            self._children[key].pop(identity, None)
            if not self._children[key]:
                del self._children[key]
        self._index(identity, None)
        self._wake(identity, key)

    def mark_deleting(self, kind: str, namespace: str, name: str, uid: str, now: float) -> None:
        """Our own deletion, before the watch tells of it; the watch has the last word."""
        old = self._objects.get((kind, namespace, name))
        if old is not None and old["metadata"].get("uid") == uid and not old["metadata"].get("deletionTimestamp"):
            self._objects[kind, namespace, name] = {
                **old,
                "metadata": {**old["metadata"], "deletionTimestamp": stamp(now)},
            }

    def replace(self, kind: str, objects: Iterable[Mapping[str, Any]], namespaces: Iterable[str] = ()) -> None:
        """All objects of a kind (in `namespaces`, or everywhere) as a listing found them: what is not among them is gone."""
        objects, only = list(objects), set(namespaces)
        found = {_identity(o) for o in objects}
        for identity in [i for i in self._objects if i[0] == kind and i not in found and (not only or i[1] in only)]:
            self.drop(self._objects[identity])
        for obj in objects:
            self.put(obj)

    def _index(self, identity: Key, obj: Raw | None) -> None:
        """Remember who waits for which train job."""
        if identity[0] not in ("GroundingTrainJob", "GroundingEvalJob"):
            return
        wanted = ((obj or {}).get("spec", {}).get("model") or {}).get("trainJob")
        old = self._wanted.pop(identity, None)
        if old is not None:
            self._waiting[old].discard(identity)
            if not self._waiting[old]:
                del self._waiting[old]
        if wanted:
            self._wanted[identity] = (identity[1], wanted)
            self._waiting.setdefault((identity[1], wanted), set()).add(identity)

    def _wake(self, identity: Key, key: Key | None) -> None:
        if key is not None:
            self._changed(key)
        if identity[0] == "GroundingTrainJob":
            for waiting in self._waiting.get((identity[1], identity[2]), ()):
                self._changed(waiting)


def _identity(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    meta = obj["metadata"]
    return (str(obj["kind"]), str(meta.get("namespace", "")), str(meta["name"]))


def _job_of(obj: Mapping[str, Any]) -> Key | None:
    if obj["kind"] in PLURALS:
        return _identity(obj)
    labels = obj["metadata"].get("labels") or {}
    kind = KIND_OF_SHORT.get(labels.get(LABEL_KIND, ""))
    if kind is None or LABEL_JOB not in labels:
        return None
    return (kind, str(obj["metadata"].get("namespace", "")), str(labels[LABEL_JOB]))
