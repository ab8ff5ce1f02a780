"""What the watches have seen, by kind and name, with our own writes on top: a reconcile never sees the world older than what it did.

A watch lags behind our writes. Each answer of the API server is put here at once, and an event older than what is here is left out, by
comparing resource versions of one object. What was seen to go does not come back with a late answer.

Objects are kept as the JSON of the parts that plans read (`slim`): a tenth of the memory that dicts take, parsed when somebody asks.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import orjson

from egm_operator.names import ANNOTATION_PROGRESS, GROUP, KIND_OF_SHORT, LABEL_JOB, LABEL_KIND, PLURALS
from egm_operator.status import stamp

Raw = dict[str, Any]
Key = tuple[str, str, str]
"""Kind (GroundingTrainJob or GroundingEvalJob), namespace, name of a job."""


def version(obj: Mapping[str, Any]) -> int:
    """Resource version as a number: those of one etcd grow."""
    text = str(obj.get("metadata", {}).get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


_META = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
_POD_STATUS = ("phase", "reason", "message", "startTime", "podIP")
_POD_CONDITIONS = ("Ready", "PodScheduled", "DisruptionTarget")


def slim(obj: Mapping[str, Any]) -> Raw:
    """The parts of an object that plans read."""
    kind, meta = obj.get("kind"), obj.get("metadata", {})
    kept = {k: meta[k] for k in _META if k in meta}
    kept["labels"] = {k: v for k, v in (meta.get("labels") or {}).items() if k.startswith((GROUP, "training.kubeflow"))}
    slimmed: Raw = {"apiVersion": obj.get("apiVersion"), "kind": kind, "metadata": kept}
    spec, status = obj.get("spec") or {}, obj.get("status")
    if status is not None:
        slimmed["status"] = _pod_status(status) if kind == "Pod" else status
    if kind == "Pod":
        if (progress := (meta.get("annotations") or {}).get(ANNOTATION_PROGRESS)) is not None:
            kept["annotations"] = {ANNOTATION_PROGRESS: progress}
    elif kind == "PyTorchJob":
        slimmed["spec"] = {"runPolicy": {"suspend": bool((spec.get("runPolicy") or {}).get("suspend"))}}
    elif kind == "Job":
        slimmed["spec"] = {"suspend": bool(spec.get("suspend"))}
    elif kind in PLURALS:
        slimmed["spec"] = spec
    return slimmed


def _pod_status(status: Mapping[str, Any]) -> Raw:
    kept = {k: status[k] for k in _POD_STATUS if k in status}
    kept["conditions"] = [c for c in status.get("conditions") or [] if c.get("type") in _POD_CONDITIONS]
    for name in ("initContainerStatuses", "containerStatuses"):
        if found := status.get(name):
            kept[name] = [{n: c.get(n) for n in ("name", "image", "state")} for c in found]
    return kept


@dataclass(slots=True)
class _Entry:
    """A kept object: what is compared often, and the rest as JSON."""

    version: int
    uid: str
    job: Key | None
    data: bytes


_GONE_KEPT = 10_000


class Store:
    """Objects by (kind, namespace, name), children by the job they belong to."""

    def __init__(self, changed: Callable[[Key], None] = lambda _: None) -> None:
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._children: dict[Key, dict[tuple[str, str, str], None]] = {}
        self._waiting: dict[tuple[str, str], set[Key]] = {}
        self._wanted: dict[Key, tuple[str, str]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        """Uid -> version at which it was no longer there."""
        self._changed = changed

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """One object, or None. It is the caller's own copy."""
        entry = self._entries.get((kind, namespace, name))
        return None if entry is None else _load(entry)

    def jobs(self) -> list[Key]:
        """Keys of all jobs."""
        return [k for k in self._entries if k[0] in PLURALS]

    def counts(self) -> Counter[str]:
        """How many objects there are of each kind."""
        return Counter(kind for kind, _, _ in self._entries)

    def leaving(self) -> set[Key]:
        """Objects that are being deleted, by kind, namespace and name."""
        return {identity for identity, entry in self._entries.items() if b'"deletionTimestamp"' in entry.data}

    def packed(self) -> list[tuple[bytes, list[bytes]]]:
        """Each job and the objects that belong to it, as JSON: a moment that another thread may read."""
        return [
            (self._entries[key].data, [self._entries[i].data for i in self._children.get(key, ())])
            for key in self.jobs()
        ]

    def children(self, key: Key) -> list[Raw]:
        """Objects labelled as belonging to a job, in order of kind and name."""
        return [_load(self._entries[i]) for i in sorted(self._children.get(key, ()))]

    def put(self, obj: Mapping[str, Any]) -> Key:
        """Take in an object, unless what is here is newer; wakes its job when something changed. What it is known by."""
        identity, uid = _identity(obj), str(obj["metadata"].get("uid", ""))
        old, at = self._entries.get(identity), version(obj)
        if at <= self._gone.get(uid, -1) or (old is not None and old.uid == uid and at <= old.version):
            return identity
        new = slim(obj)
        key = _job_of(new)
        self._entries[identity] = _Entry(at, uid, key, _packed(new))
        if key != identity and key is not None:
            self._children.setdefault(key, {})[identity] = None
        if identity[0] in PLURALS:
            self._index(identity, (new["spec"].get("model") or {}).get("trainJob"))
        self._wake(identity, key)
        return identity

    def drop(self, obj: Mapping[str, Any]) -> None:
        """Forget an object that is gone, if it is the one that is here."""
        identity, uid = _identity(obj), obj["metadata"].get("uid")
        old = self._entries.get(identity)
        if old is not None and (not uid or old.uid == uid):
            self._drop(identity, old, version(obj))

    def _drop(self, identity: tuple[str, str, str], old: _Entry, at: int) -> None:
        del self._entries[identity]
        if old.uid:
            self._gone[old.uid] = max(at, old.version)
        if len(self._gone) > _GONE_KEPT:
            self._gone.popitem(last=False)
        if old.job is not None and old.job in self._children:
            self._children[old.job].pop(identity, None)
            if not self._children[old.job]:
                del self._children[old.job]
        if identity[0] in PLURALS:
            self._index(identity, None)
        self._wake(identity, old.job)

    def mark_deleting(self, kind: str, namespace: str, name: str, uid: str, now: float) -> None:
        """Our own deletion, before the watch tells of it; the watch has the last word."""
        entry = self._entries.get((kind, namespace, name))
        if entry is not None and entry.uid == uid:
            obj = _load(entry)
            obj["metadata"].setdefault("deletionTimestamp", stamp(now))
            entry.data = _packed(obj)

    def keep(self, kind: str, found: Set[Key], at: int, namespace: str = "") -> None:
        """A listing of a kind (in a namespace, or everywhere) found these at version `at`: what is older and not among them is gone."""
        for identity, entry in list(self._entries.items()):
            if identity[0] == kind and identity not in found and namespace in ("", identity[1]) and entry.version <= at:
                self._drop(identity, entry, at)

    def _index(self, identity: Key, wanted: str | None) -> None:
        """Remember who waits for which train job."""
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


def _packed(obj: Raw) -> bytes:
    """JSON in as many bytes as it has: what orjson gives holds on to its buffer, which is three times that."""
    return bytes(memoryview(orjson.dumps(obj)))


def _load(entry: _Entry) -> Raw:
    found: Raw = orjson.loads(entry.data)
    return found


def _identity(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    meta = obj["metadata"]
    # of thousands of objects, few kinds and namespaces: one string each
    return (sys.intern(str(obj["kind"])), sys.intern(str(meta.get("namespace", ""))), str(meta["name"]))


def _job_of(obj: Mapping[str, Any]) -> Key | None:
    if obj["kind"] in PLURALS:
        return _identity(obj)
    labels = obj["metadata"].get("labels") or {}
    kind = KIND_OF_SHORT.get(labels.get(LABEL_KIND, ""))
    if kind is None or LABEL_JOB not in labels:
        return None
    return (kind, str(obj["metadata"].get("namespace", "")), str(labels[LABEL_JOB]))
