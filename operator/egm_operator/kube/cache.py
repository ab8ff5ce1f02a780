"""The objects that the watches have reported, by kind and name, and the operator's own writes.

A watch lags behind our writes. So each answer of the API server is stored at once, and an event with an older resource version than the
stored object's is ignored: a reconcile always sees its own earlier writes. A late answer does not restore a deleted object.

Objects are stored as JSON with only the parts that plans read (`slim`), which needs a tenth of the memory of dicts, and are parsed when they
are read.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import orjson

from egm_operator.kinds import GROUP, JOBS, job_kind
from egm_operator.kube.gang_forms import FIRST_LABELS, FORMS
from egm_operator.kube.objects import Raw, entries, labels, section, train_jobs
from egm_operator.names import ANNOTATION_PROGRESS, ANNOTATION_SUSPENDED, LABEL_JOB, LABEL_KIND
from egm_operator.status import stamp
from grounding.api.handed_down import QUEUE_LABEL, read_from

Key = tuple[str, str, str]
"""Kind (GroundingTrainJob or GroundingEvalJob), namespace and name of a job"""


def version(obj: Mapping[str, Any]) -> int:
    """Return the resource version as a number; the versions of one etcd increase."""
    text = str(obj.get("metadata", {}).get("resourceVersion", ""))
    return int(text) if text.isdigit() else 0


_META = ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
_LABELS = {QUEUE_LABEL, *(label for label, _ in FIRST_LABELS)}
_POD_STATUS = ("phase", "reason", "message", "startTime", "podIP")
_POD_CONDITIONS = ("Ready", "PodScheduled", "DisruptionTarget")


def slim(obj: Mapping[str, Any]) -> Raw:
    """Return the parts of an object that plans read."""
    kind, meta = obj.get("kind"), obj.get("metadata", {})
    kept = {k: meta[k] for k in _META if k in meta}
    kept["labels"] = {k: v for k, v in labels(obj).items() if k.startswith(GROUP) or k in _LABELS}
    slimmed: Raw = {"apiVersion": obj.get("apiVersion"), "kind": kind, "metadata": kept}
    spec, status = section(obj, "spec"), obj.get("status")
    if status is not None:
        slimmed["status"] = _pod_status(status) if kind == "Pod" else status
    if kind == "Pod":
        if (progress := section(meta, "annotations").get(ANNOTATION_PROGRESS)) is not None:
            kept["annotations"] = {ANNOTATION_PROGRESS: progress}
        if (node := spec.get("nodeName")) is not None:
            slimmed["spec"] = {"nodeName": node}
    elif kind in FORMS:
        slimmed["spec"] = FORMS[kind].switches(spec)
        if ANNOTATION_SUSPENDED in section(meta, "annotations"):
            kept["annotations"] = {ANNOTATION_SUSPENDED: section(meta, "annotations")[ANNOTATION_SUSPENDED]}
    elif kind in JOBS:
        slimmed["spec"] = spec
        kept["labels"] = dict(labels(obj))
        if annotations := read_from(section(meta, "annotations")):
            kept["annotations"] = annotations
    return slimmed


def _pod_status(status: Mapping[str, Any]) -> Raw:
    kept = {k: status[k] for k in _POD_STATUS if k in status}
    kept["conditions"] = [c for c in entries(status, "conditions") if c.get("type") in _POD_CONDITIONS]
    for name in ("initContainerStatuses", "containerStatuses"):
        if found := status.get(name):
            kept[name] = [{n: c[n] for n in ("name", "image", "state", "lastState") if c.get(n)} for c in found]
    return kept


@dataclass(slots=True)
class _Entry:
    """A stored object: the fields that are often compared, and the rest as JSON."""

    version: int
    uid: str
    job: Key | None
    data: bytes


_GONE_KEPT = 10_000


class Store:
    """Objects by (kind, namespace, name), and the objects that belong to each job."""

    def __init__(self, changed: Callable[[Key], None] = lambda _: None) -> None:
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._children: dict[Key, dict[tuple[str, str, str], None]] = {}
        self._waiting: dict[tuple[str, str], set[Key]] = {}
        self._wanted: dict[Key, tuple[tuple[str, str], ...]] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()
        """Uid of a deleted object -> resource version of its deletion"""
        self._changed = changed

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """Return a copy of one object, or None."""
        entry = self._entries.get((kind, namespace, name))
        return None if entry is None else _load(entry)

    def jobs(self) -> list[Key]:
        """Return the keys of all jobs."""
        return [k for k in self._entries if k[0] in JOBS]

    def counts(self) -> Counter[str]:
        """Return the number of objects of each kind."""
        return Counter(kind for kind, _, _ in self._entries)

    def leaving(self) -> set[Key]:
        """Return the objects that are being deleted, by kind, namespace and name."""
        return {identity for identity, entry in self._entries.items() if b'"deletionTimestamp"' in entry.data}

    def packed(self) -> list[tuple[bytes, list[bytes]]]:
        """Return each job with the objects that belong to it, as JSON; another thread may read this snapshot."""
        return [
            (self._entries[key].data, [self._entries[i].data for i in self._children.get(key, ())])
            for key in self.jobs()
        ]

    def children(self, key: Key) -> list[Raw]:
        """Return the objects with a job's labels, in order of kind and name."""
        return [_load(self._entries[i]) for i in sorted(self._children.get(key, ()))]

    def put(self, obj: Mapping[str, Any]) -> Key:
        """Store an object unless the stored one is newer, and queue its job if something has changed. Return the object's key."""
        identity, uid = _identity(obj), str(obj["metadata"].get("uid", ""))
        old, at = self._entries.get(identity), version(obj)
        if at <= self._gone.get(uid, -1) or (old is not None and old.uid == uid and at <= old.version):
            return identity
        new = slim(obj)
        key = _job_of(new)
        self._entries[identity] = _Entry(at, uid, key, _packed(new))
        if key != identity and key is not None:
            self._children.setdefault(key, {})[identity] = None
        if identity[0] in JOBS:
            self._index(identity, train_jobs(new))
        self._wake(identity, key)
        return identity

    def drop(self, obj: Mapping[str, Any]) -> None:
        """Forget a deleted object if it is the stored one."""
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
        if identity[0] in JOBS:
            self._index(identity, [])
        self._wake(identity, old.job)

    def mark_deleting(self, kind: str, namespace: str, name: str, uid: str, now: float) -> None:
        """Record our own deletion before the watch reports it; the watch's report then replaces the record."""
        entry = self._entries.get((kind, namespace, name))
        if entry is not None and entry.uid == uid:
            obj = _load(entry)
            obj["metadata"].setdefault("deletionTimestamp", stamp(now))
            entry.data = _packed(obj)

    def keep(self, kind: str, found: Set[Key], at: int, namespace: str = "") -> None:
        """Forget the objects of a kind (in a namespace, or everywhere) that are missing in a listing at version `at`, unless they are
        newer.
        """
        for identity, entry in list(self._entries.items()):
            if identity[0] == kind and identity not in found and namespace in ("", identity[1]) and entry.version <= at:
                self._drop(identity, entry, at)

    def _index(self, identity: Key, wanted: Sequence[str]) -> None:
        """Record which train jobs a job waits for."""
        for old in self._wanted.pop(identity, ()):
            self._waiting[old].discard(identity)
            if not self._waiting[old]:
                del self._waiting[old]
        names = dict.fromkeys((identity[1], name) for name in wanted if name)
        if names:
            self._wanted[identity] = tuple(names)
        for name in names:
            self._waiting.setdefault(name, set()).add(identity)

    def _wake(self, identity: Key, key: Key | None) -> None:
        if key is not None:
            self._changed(key)
        if identity[0] == "GroundingTrainJob":
            for waiting in self._waiting.get((identity[1], identity[2]), ()):
                self._changed(waiting)


def _packed(obj: Raw) -> bytes:
    """Return JSON as a copy without spare memory; orjson's own result keeps its buffer, which is three times as large."""
    return bytes(memoryview(orjson.dumps(obj)))


def _load(entry: _Entry) -> Raw:
    found: Raw = orjson.loads(entry.data)
    return found


def _identity(obj: Mapping[str, Any]) -> tuple[str, str, str]:
    meta = obj["metadata"]
    # thousands of objects have the same few kinds and namespaces, so store each string once
    return (sys.intern(str(obj["kind"])), sys.intern(str(meta.get("namespace", ""))), str(meta["name"]))


def _job_of(obj: Mapping[str, Any]) -> Key | None:
    if obj["kind"] in JOBS:
        return _identity(obj)
    known = labels(obj)
    kind = job_kind(known.get(LABEL_KIND, ""))
    if kind is None or LABEL_JOB not in known:
        return None
    return (kind.name, str(obj["metadata"].get("namespace", "")), str(known[LABEL_JOB]))
