"""The identity of a training run: everything that affects its result, recorded with its files and compared before any are reused.

Work of another job in a folder, a claim or a store is refused, and the error shows both values. Changes in the lists below are allowed:
the work continues. `identity.json` is written to the job's folder, to its output and into each checkpoint. The model's manifest contains
the same record.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from grounding.api import ResolvedTrainJob
from grounding.data.embedded import embedded_sources
from grounding.data.images import open_images
from grounding.data.jobdata import JobData
from grounding.data.records import read_rows
from grounding.errors import Failure, UserError
from grounding.files import digest_of, ends_digest, fingerprint, is_published, read_manifest, sha256_of, write_json
from grounding.jsontypes import Document
from grounding.models.content import model_digest
from grounding.runtime import environment
from grounding.storage import aside, fetch
from grounding.train.checkpoints import local as checkpoints

FILE = "identity.json"

# ---- what may change; docs/durability.md shows the same lists ----
PLACES = (
    "data.images",
    "data.prepared",
    "data.skipBroken",
    "data.train",
    "data.truth",
    "model.source",
    "model.trainJob",
)
"""Fields that define where content is and how it is read; the content itself is compared instead"""

IGNORED = (
    # how and where the job runs
    "activeDeadlineSeconds",
    "maxAttempts",
    "maxDisruptions",
    "output",
    "podTemplate",
    "podTemplates",
    "preset",
    "reward.configMap",  # pods read the ConfigMap as reward.file
    "reward.file",  # the content of the file is compared instead
    "priorityClassName",
    "queue",
    "resources",
    "stallTimeoutSeconds",
    "startDeadlineSeconds",
    "suspend",
    "tracking",
    "ttlSecondsAfterFinished",
    "hyperparameters.algorithm",  # the fields that it sets are compared
    "hyperparameters.gpuMemoryUtilization",
    "hyperparameters.gradientCheckpointing",
    "hyperparameters.microBatchSize",
    "hyperparameters.offloadOptimizer",
    "hyperparameters.offloadParameters",
    "hyperparameters.rolloutEngine",
    "hyperparameters.tensorParallel",
    "hyperparameters.tokensPerGpu",
    # saving and validation
    "data.validation",
    "data.validationSets",
    "data.validationTruth",
    "hyperparameters.keepCheckpoints",
    "hyperparameters.saveEvery",
    "hyperparameters.validateBeforeTrain",
    "hyperparameters.validateEvery",
    *PLACES,
)
"""Fields of `spec` that do not affect the result, including all fields below them"""

ADDED: Mapping[str, Any] = {
    "hyperparameters.advantage": "grpo",
    "hyperparameters.clipRange.low": 0.2,
    "hyperparameters.clipRange.high": 0.2,
    "reward.entryPoint": "compute_score",
}
"""Fields that release 0.1.0 did not have, with the values it used; work of that release continues"""

APPLIED = (
    "hyperparameters.epochs",
    "hyperparameters.keepBest",
    "hyperparameters.learningRate",
    "hyperparameters.maxSteps",
    "hyperparameters.schedule",
    "hyperparameters.warmupRatio",
    "hyperparameters.warmupSteps",
)
"""Fields that affect the result but may change before the last step; the new values apply from the next step on"""

WAYS_OUT = (
    "Give the job another spec.output (or folder), or set the old work aside: `egm run --restart`, on a cluster the "
    "annotation grounding.egm.dev/restart with any new value. Or set the field back."
)


@dataclass(frozen=True)
class Identity:
    """Everything that affects the result of a training. `fields`: dotted field of `spec` -> value; `code` is only informative."""

    fields: Mapping[str, object]
    model: str
    data: str
    code: str = ""

    @property
    def digest(self) -> str:
        """Return a digest of all fields that affect the result."""
        content = [dict(self.fields), self.model, self.data]
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def document(self) -> Document:
        """Return the record as a document to be written."""
        return {
            "digest": self.digest,
            "fields": dict(sorted(self.fields.items())),
            "model": self.model,
            "data": self.data,
            "code": self.code,
        }

    @classmethod
    def parse(cls, data: bytes | Mapping[str, Any]) -> Identity | None:
        """Parse a record; return None if `data` is something else."""
        try:
            found = orjson.loads(data) if isinstance(data, bytes) else data
            return cls(dict(found["fields"]), str(found["model"]), str(found["data"]), str(found.get("code", "")))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


@dataclass(frozen=True)
class Change:
    """A field with its old and its new value."""

    field: str
    old: Any
    new: Any

    @property
    def applies(self) -> bool:
        """Return whether work may continue with the new value."""
        return self.field.removeprefix("spec.") in APPLIED

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.old)} in the existing work, {_shown(self.new)} in this job"


def _shown(value: Any) -> str:
    text = "not set" if value is None else orjson.dumps(value).decode()
    return text if len(text) <= 100 else text[:97] + "..."


def flat(value: Any, prefix: str = "") -> Document:
    """Return the leaves of a document, keyed by dotted names, without empty lists and objects."""
    if isinstance(value, Mapping):
        return {k: v for name, each in value.items() for k, v in flat(each, f"{prefix}{name}.").items()}
    if value is None or value == []:
        return {}
    return {prefix.rstrip("."): value}


def _below(name: str, fields: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in fields)


def deciding(spec: Mapping[str, Any]) -> Document:
    """Return the fields of a dumped `spec` that affect the result. Pure."""
    return {name: value for name, value in flat(spec).items() if not _below(name, IGNORED)}


def description(spec: Mapping[str, Any], *, finished: bool) -> str:
    """Return a digest of a dumped `spec`, to recognise another job's work before its content is compared. Pure.

    For unfinished work, fields in `APPLIED` are left out, because it continues after they change. Paths are included, because another path
    usually has other content.
    """
    fields = deciding(spec) | {name: value for name, value in flat(spec).items() if _below(name, PLACES)}
    return digest_of({name: value for name, value in fields.items() if finished or not _below(name, APPLIED)})


def changes(old: Identity, new: Identity) -> list[Change]:
    """Return the differences between two identities, sorted by field. Pure."""
    names = sorted({*old.fields, *new.fields})
    before = {**{n: value for n, value in ADDED.items() if n in new.fields}, **old.fields}
    found = [Change(f"spec.{n}", before.get(n), new.fields.get(n)) for n in names if before.get(n) != new.fields.get(n)]
    if old.model != new.model:
        found.append(Change("the content of spec.model", old.model[:16], new.model[:16]))
    if old.data != new.data:
        found.append(Change("the content of spec.data", old.data[:16], new.data[:16]))
    return found


def check(old: Identity | None, new: Identity, where: str | Path, *, finished: bool) -> list[Change]:
    """Return the changes with which the work in `where` may continue. Raises a `UserError` with both values for any other change.

    `finished`: whether all steps are trained, so that new values can no longer apply.
    """
    if old is None:
        raise UserError("contains work, but no record of the job that it belongs to", file=where, hint=WAYS_OUT)
    found = changes(old, new)
    bad = [c for c in found if finished or not c.applies]
    if bad:
        text = "".join(f"\n  {c}" for c in bad)
        what = "the finished work" if finished else "the work"
        raise UserError(f"contains {what} of another job:{text}", file=where, hint=WAYS_OUT)
    return found


# ---- content ----
def _sft_content(rows: Path, images: Sequence[Path]) -> list[str]:
    """Return digests of a file of SFT rows and of the pictures in them."""
    named = (row.get("image") for _, row in read_rows(rows) if isinstance(row, Mapping))
    pictures = open_images(*images, *embedded_sources([rows])).digest(str(name) for name in named)
    return [sha256_of(rows), pictures]


def _rl_content(path: Path) -> str:
    """Return a digest of the rows of a parquet file for verl. A picture counts by name and content, because its folder may be moved."""
    import pyarrow.parquet as pq

    known: dict[str, str] = {}
    found = hashlib.sha256()
    with pq.ParquetFile(path) as file, ThreadPoolExecutor(16) as pool:
        for batch in file.iter_batches(batch_size=1024):
            rows = batch.to_pylist()
            new = {p for row in rows for each in row.get("images") or [] if (p := _place_of(each))} - known.keys()
            known |= dict(zip(new, pool.map(_picture_digest, new), strict=True))
            for row in rows:
                pictures = [_picture(each, known) for each in row.get("images") or []]
                line = orjson.dumps({**row, "images": pictures}, option=orjson.OPT_SORT_KEYS, default=str)
                found.update(line + b"\n")
    return found.hexdigest()


def _place_of(picture: Any) -> str:
    """Return the path of a row's picture; empty if the row contains its bytes."""
    if isinstance(picture, Mapping):
        if picture.get("bytes"):
            return ""
        picture = picture.get("image") or picture.get("path")
    return str(picture).removeprefix("file://")


def _picture(picture: Any, known: Mapping[str, str]) -> list[str]:
    place = _place_of(picture)
    if not place:
        return ["embedded", hashlib.sha256(picture["bytes"]).hexdigest()]
    return [Path(place).name, known[place]]


def _picture_digest(place: str) -> str:
    try:
        with Path(place).open("rb") as f:
            return ends_digest(f)
    except OSError:
        return "absent"


def data_digest(data: JobData) -> str:
    """Return a digest of the training rows and their pictures, independent of their location."""
    if data.sft_rows is not None:
        return digest_of(["sft", *_sft_content(data.sft_rows, data.images)])
    if data.train_parquet is not None:
        return digest_of(["rl", _rl_content(data.train_parquet)])
    return digest_of([])


def identify(job: ResolvedTrainJob, data: JobData, model: str) -> Identity:
    """Return the identity of a resolved job with its data and its model, which are both on this machine."""
    spec = job.model_dump(mode="json", by_alias=True, exclude_none=True)["spec"]
    fields = deciding(spec)
    if job.spec.reward.file is not None:
        fields["the content of reward.file"] = fingerprint(fetch(job.spec.reward.file))
    return Identity(fields, model_digest(model), data_digest(data), _code())


def _code() -> str:
    try:
        return f"egm-grounding {version('egm-grounding')}"
    except PackageNotFoundError:
        return ""


# ---- setting the old work aside ----
WORK = (
    "attempt.json",
    "checkpoints",
    "identity.json",
    "initial",
    "model",
    "progress.jsonl",
    "rollouts",
    "tensorboard",
    "upload-problem.json",
    "uploaded.json",
    "validation",
    "verl",
    "wandb",
)
"""Files that a training writes to its folder and its output"""


def restart_asked(job: ResolvedTrainJob) -> str:
    """Return the token of a request to start from the beginning: `$EGM_RESTART` or the job's annotation; empty if there is none."""
    return aside.restart_asked(job.metadata.annotations)


def set_aside(out: Path, token: str) -> None:
    """Move the work in the folder `out` to `previous/N` there, once for each `token`."""
    if target := aside.set_aside_folder(out, token, WORK):
        print(f"the earlier work was set aside: {target}", flush=True)  # noqa: T201


# ---- the job's folder ----
def read(path: Path) -> Identity | None:
    """Return the record in a file; None if it cannot be read."""
    try:
        return Identity.parse(path.read_bytes())
    except OSError:
        return None


def of_model(folder: Path) -> Identity | None:
    """Return the record in a model's manifest; None if it has none."""
    manifest = read_manifest(folder)
    found = manifest.facts.get("identity") if manifest else None
    return Identity.parse(found) if isinstance(found, Mapping) else None


def facts(out: Path) -> Document:
    """Return the identity as facts for the manifest of a job's model."""
    found = read(out / FILE)
    return {"identity": found.document()} if found else {}


def enter(out: Path, who: Identity) -> list[Change]:
    """Compare the identity in the folder `out` with `who`, and record `who` there.

    Return the changes with which the work continues. Raises `UserError` if the work belongs to another job.
    """
    model = out / "model"
    found: list[Change] = []
    if model.is_dir() and any(model.iterdir()):
        found += check(of_model(model), who, model, finished=is_published(model))
    newest = checkpoints.peek(out / "checkpoints")
    if newest is not None:
        found += check(read(newest.path / FILE), who, newest.path, finished=_at_end(newest.step, who))
    old = read(out / FILE)
    if old is not None:
        found += check(old, who, out, finished=False) if newest or model.is_dir() else []
    write_json(out / FILE, who.document())
    return list({c.field: c for c in found}.values())


def _at_end(step: int, who: Identity) -> bool:
    steps = who.fields.get("hyperparameters.maxSteps")
    return isinstance(steps, int) and step == steps


def refuse_steps_beyond(checkpoint: checkpoints.Checkpoint | None, total: int) -> None:
    """Raise `UserError` if more steps are already trained than the job wants."""
    if checkpoint is not None and checkpoint.step > total:
        raise UserError(
            f"{checkpoint.step} steps are already trained, but the job wants {total}",
            file=checkpoint.path,
            field="spec.hyperparameters.maxSteps",
            hint=f"Set it to {checkpoint.step} or more, or export an earlier checkpoint with `egm checkpoint export`. "
            + WAYS_OUT,
        )


LOCK = ".lock"


@contextlib.contextmanager
def locked(out: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Lock the job's folder for this process. If another process trains in it, raise `UserError`, or in a pod `Failure`, so that the
    operator tries again.

    The kernel releases the lock when the process ends. Its data loaders may run some seconds longer, so wait up to `patience_s` seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    fd = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
                    # in a pod, the other process is an earlier attempt that has not ended yet, or whose lock a file server still holds
                    kind = Failure if environment.of_process().termination_log else UserError
                    raise kind(
                        f"another process trains in this folder{f' ({holder})' if holder else ''}",
                        file=out,
                        hint="Wait for it or stop it, or give this job another folder or name.",
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                break  # this file system has no locks
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(fd)
