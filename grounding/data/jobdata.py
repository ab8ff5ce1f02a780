"""The data of a job: where it lies (`locate`, pure), and how it gets there (`bring`, `materialise`; idempotent).

Files of a store or the hub (`s3://`, `hf://`) lie in this machine's cache (`grounding.storage`), to which `bring` fetches them. Whatever is made
lies in a folder named by a digest of what it is made from, and is finished when that folder holds `done.json`; so the jobs of one run share it, and a
run that was killed starts it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import orjson

from grounding.data import shapes
from grounding.data.images import parts_of
from grounding.errors import EgmError, UserError
from grounding.files import atomic_write, read_json, write_json
from grounding.storage import fetch, is_remote, local_path

if TYPE_CHECKING:
    from grounding.api import EvalData, Job, TrainData


@dataclass(frozen=True)
class JobData:
    """Paths of a job's data; None or empty where the kind of job has no use for it."""

    sft_rows: Path | None = None
    train_parquet: Path | None = None
    val_parquet: Path | None = None
    eval_files: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()


def _paths(sources: Sequence[str], field: str) -> tuple[Path, ...]:
    return tuple(local_path(s, f"{field}[{i}]") for i, s in enumerate(sources))


def _digest(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]


def _shape_set(data: TrainData | EvalData) -> shapes.ShapeSet | None:
    s = data.shapes
    return None if s is None else shapes.ShapeSet(seed=s.seed, train=s.train, per_file=s.per_file, size=s.size)


@dataclass(frozen=True)
class _Inputs:
    """What preparation starts from."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    images: tuple[Path, ...]


def _set_inputs(root: Path) -> _Inputs:
    files = tuple(root / f"eval_data/{stem}.jsonl" for stem in shapes.EIGHT_FILES)
    return _Inputs((root / "train_data/rl.json",), files, (root / "images",))


def _train_inputs(data: TrainData, root: Path | None) -> _Inputs:
    if root is not None:
        return _set_inputs(root)
    return _Inputs(
        _paths(data.train, "spec.data.train"),
        _paths(data.validation, "spec.data.validation"),
        _paths(data.images, "spec.data.images"),
    )


def _prepared_folder(inputs: _Inputs, prompt: str, fraction: float, seed: int, data: Path) -> Path:
    # relative to the data folder where they lie in it, so that the run's folder may be named in any way
    names = [
        [p.relative_to(data).as_posix() if p.is_relative_to(data) else str(p) for p in paths]
        for paths in (inputs.train, inputs.validation, inputs.images)
    ]
    digest = _digest([names, prompt, fraction, seed])
    return data / f"prepared-{digest}"


def _eval_sources(data: EvalData) -> list[str]:
    """Path or URI of each evaluation file."""
    sources = []
    for name in data.files or shapes.EIGHT_FILES:
        named = name if PurePosixPath(name).suffix in (".jsonl", ".json") else f"{name}.jsonl"
        root = data.root or ""
        stands_alone = not root or "://" in named or named.startswith("/")
        sources.append(named if stands_alone else f"{root.rstrip('/')}/{named}")
    return sources


def _prepared_sources(prepared: str) -> tuple[str, str]:
    """(train, validation), paths or URIs, of data prepared before: a folder, or the training file with its sibling."""
    folder, _, name = prepared.rpartition("/")
    if not name.endswith(".parquet"):
        return f"{prepared.rstrip('/')}/train.parquet", f"{prepared.rstrip('/')}/val.parquet"
    sibling = name.replace("train", "val", 1) if "train" in name else "val.parquet"
    return prepared, f"{folder}/{sibling}" if folder or prepared.startswith("/") else sibling


def locate(job: Job, data: Path, *, validation_fraction: float = 0.1) -> JobData:
    """Where the job's data lies, or will lie once it is fetched, or made under the folder `data`. Touches no file.

    Raises `UserError` for a source that is no path and no URI.
    """
    made = _shape_set(job.spec.data)
    root = None if made is None else data / f"shapes-{made.digest}"
    if job.kind == "GroundingEvalJob":
        if root is not None:
            inputs = _set_inputs(root)
            return JobData(eval_files=inputs.validation, images=inputs.images)
        return JobData(
            eval_files=_paths(_eval_sources(job.spec.data), "spec.data.files"),
            images=_paths(job.spec.data.images, "spec.data.images"),
        )

    spec = job.spec
    inputs = _train_inputs(spec.data, root)
    if spec.method == "sft":
        if root is not None:
            return JobData(sft_rows=root / "train_data/sft.json", images=inputs.images)
        rows = inputs.train[0] if len(inputs.train) == 1 else None
        if rows is None and inputs.train:
            rows = data / f"sft-{_digest([str(p) for p in inputs.train])}" / "sft.json"
        return JobData(sft_rows=rows, images=inputs.images)
    if root is None and spec.data.prepared:
        train, validation = _paths(_prepared_sources(spec.data.prepared), "spec.data.prepared")
        return JobData(train_parquet=train, val_parquet=validation, images=inputs.images)
    folder = _prepared_folder(inputs, spec.data.prompt, validation_fraction, spec.seed, data)
    return JobData(train_parquet=folder / "train.parquet", val_parquet=folder / "val.parquet", images=inputs.images)


def _fingerprint(paths: Sequence[Path]) -> list[list[object]]:
    """Absolute path, size and time of each input: another value means that what was made from it is stale, as it is
    when the whole folder was moved, because prepared rows hold absolute paths of images."""
    stats = [(p.absolute(), p.stat()) for p in paths if p.exists()]
    return [[str(p), s.st_size, s.st_mtime_ns] for p, s in stats]


def _fresh(folder: Path, inputs: list[list[object]]) -> bool:
    done = folder / "done.json"
    return done.is_file() and read_json(done).get("inputs") == inputs


def _need(paths: Sequence[Path], field: str) -> None:
    for path in paths:
        if not path.exists():
            raise UserError("no such file", file=path, field=field)


def _need_images(paths: Sequence[Path]) -> None:
    _need([p for p in paths if not parts_of(p)], "spec.data.images")


def sources(job: Job, *, prepares: bool) -> list[tuple[str, str]]:
    """(path or URI, its field) of everything that a process of the job reads: the one that prepares, or those after it. Pure."""
    found: dict[str, Sequence[str]] = {}
    if job.kind == "GroundingEvalJob":
        found = {"files": [] if job.spec.data.shapes else _eval_sources(job.spec.data), "images": job.spec.data.images}
        return _numbered(found)
    data, method = job.spec.data, job.spec.method
    if method == "rl" and data.prepared:
        found = {"prepared": _prepared_sources(data.prepared)}
    elif method == "sft":
        found = {"train": data.train if prepares or len(data.train) == 1 else [], "images": data.images}
    elif prepares:  # what RL trains on is a copy, pictures included
        found = {"train": data.train, "validation": data.validation, "images": data.images}
    return _numbered(found)


def _numbered(found: dict[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(s, f"spec.data.{field}[{i}]") for field, many in found.items() for i, s in enumerate(many)]


def bring(job: Job, *, prepares: bool = False, say: Callable[[str], None] = lambda _: None) -> None:
    """Fetch what `sources` names and is not on a file system of this machine; what is here and has not changed stays. `say` hears how far it is.

    Raises `UserError` for what is not there, `Failure` for what cannot be had.
    """
    for source, field in dict(sources(job, prepares=prepares)).items():
        if not is_remote(source):
            continue
        try:
            fetch(source.split(".part_")[0], say=say)
        except EgmError as error:
            raise type(error)(error.message, hint=error.hint, file=error.file, field=field) from None


def materialise(
    job: Job,
    data: Path,
    *,
    validation_fraction: float = 0.1,
    workers: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> JobData:
    """Fetch and make what the job needs, the latter under the folder `data`, and say where it lies; at once when it is there already.

    Raises `UserError` for files that are absent or wrong. Safe to repeat after a crash at any point.
    """
    located = locate(job, data, validation_fraction=validation_fraction)
    bring(job, prepares=True, say=say)
    made = _shape_set(job.spec.data)
    root = None if made is None else data / f"shapes-{made.digest}"
    if made is not None and root is not None:
        shapes.generate(root, made)
    _need_images(located.images)
    if job.kind == "GroundingEvalJob":
        _need(located.eval_files, "spec.data.files")
        return located

    spec = job.spec
    inputs = _train_inputs(spec.data, root)
    if spec.method == "sft":
        if located.sft_rows is None:
            raise UserError("a job of method sft needs training rows", field="spec.data.train")
        if len(inputs.train) > 1:
            _merge(inputs.train, located.sft_rows)
        _need([located.sft_rows], "spec.data.train")
        return located
    train, validation = located.train_parquet, located.val_parquet
    if train is None or validation is None:  # unreachable for rl; says so to the type checker
        raise UserError("a job of method rl needs training data", field="spec.data")
    if root is None and spec.data.prepared:
        _need([train, validation], "spec.data.prepared")
        return located
    _need(inputs.train, "spec.data.train")
    _need(inputs.validation, "spec.data.validation")
    if not inputs.train or not inputs.validation:
        raise UserError(
            "a job of method rl needs training rows and validation files",
            field="spec.data",
            hint="Give spec.data.train and spec.data.validation, spec.data.prepared, or spec.data.shapes.",
        )
    _prepare(inputs, train.parent, spec.data.prompt, validation_fraction, spec.seed, workers)
    return located


def _prepare(inputs: _Inputs, folder: Path, prompt: str, fraction: float, seed: int, workers: int | None) -> None:
    from grounding.data.prepare import prepare

    state = _fingerprint([*inputs.train, *inputs.validation])
    if _fresh(folder, state):
        return
    (folder / "done.json").unlink(missing_ok=True)
    result = prepare(
        inputs.train,
        inputs.validation,
        inputs.images,
        folder,
        prompt=prompt,
        fraction=fraction,
        seed=seed,
        workers=workers,
    )
    write_json(folder / "done.json", {"inputs": state, "train": result.train, "validation": result.validation})


def _merge(files: Sequence[Path], target: Path) -> None:
    """Several SFT files as one list."""
    _need(files, "spec.data.train")
    state = _fingerprint(files)
    if _fresh(target.parent, state):
        return
    rows: list[Any] = []
    for file in files:
        part = read_json(file)
        if not isinstance(part, list):
            raise UserError("expected a JSON list of rows", file=file)
        rows += part
    with atomic_write(target) as f:
        f.write(orjson.dumps(rows))
    write_json(target.parent / "done.json", {"inputs": state, "rows": len(rows)})
