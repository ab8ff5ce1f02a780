"""The data of a job: compute its paths (`locate`, pure), download it (`bring`) and prepare it (`materialise`). Both are idempotent.

Files of an object store or the hub (`s3://`, `hf://`) are cached on this machine (`grounding.storage`); `bring` downloads them. Prepared
data are stored in a folder that is named by a digest of its inputs, and are complete when that folder holds `done.json`. So the jobs of one
run share the data, and preparation starts again after a killed run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import orjson

from grounding.api import RlJob, SftJob
from grounding.api.base import ROW_SUFFIXES
from grounding.boxes import Space
from grounding.data import shapes
from grounding.data.mixture import times
from grounding.data.problems import check_answers, too_many
from grounding.data.records import read_rows
from grounding.data.tars import parts_of, stem_of_part
from grounding.errors import EgmError, UserError
from grounding.failpoints import failpoint
from grounding.files import (
    MANIFEST,
    WHOLE,
    atomic_write,
    digest_of,
    fingerprint,
    is_published,
    read_json,
    sha256_of,
    write_json,
    write_manifest,
)
from grounding.jsontypes import Document
from grounding.storage import fetch, is_remote, local_path

if TYPE_CHECKING:
    from grounding.api import EvalData, Job, TrainData


@dataclass(frozen=True)
class JobData:
    """Paths of a job's data. A path is None or empty if this kind of job does not use it."""

    sft_rows: Path | None = None
    sft_validation: tuple[tuple[str, Path], ...] = ()
    """Files of SFT rows for validation, each with the name of its set, which may be empty"""
    train_parquet: Path | None = None
    val_parquet: Path | None = None
    eval_files: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()


def _paths(sources: Sequence[str], field: str) -> tuple[Path, ...]:
    return tuple(local_path(s, f"{field}[{i}]") for i, s in enumerate(sources))


def _digest(value: Any) -> str:
    return digest_of(value)[:12]


def _shape_set(data: TrainData | EvalData) -> shapes.ShapeSet | None:
    s = data.shapes
    if s is None:
        return None
    return shapes.ShapeSet(seed=s.seed, train=s.train, per_file=s.per_file, size=s.size, reasoning=s.reasoning)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a preparation."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    images: tuple[Path, ...]
    truth: Space | None = None
    validation_truth: Space | None = None
    skip_broken: int = 0
    sets: tuple[str, ...] = ()
    """The validation set of each file of `validation`; empty if none has a name"""
    weights: tuple[float, ...] = ()
    """How often each row of a file of `train` is used; empty if each is used once"""


def _set_inputs(root: Path) -> _Inputs:
    files = tuple(root / f"eval_data/{stem}.jsonl" for stem in shapes.EIGHT_FILES)
    return _Inputs((root / "train_data/rl.json",), files, (root / "images",))


def _train_inputs(data: TrainData, root: Path | None) -> _Inputs:
    if root is not None:
        return _set_inputs(root)
    return _Inputs(
        _paths(data.train, "spec.data.train"),
        tuple(path for _, path in _validation(data)),
        _paths(data.images, "spec.data.images"),
        data.truth,
        data.validation_truth,
        data.skip_broken,
        tuple(name for name, _ in _validation(data)) if data.validation_sets else (),
        tuple(data.weights),
    )


def _validation(data: TrainData) -> tuple[tuple[str, Path], ...]:
    """Return the files for validation, each with the name of its set; the name is empty for a file that belongs to no set."""
    plain = [("", path) for path in _paths(data.validation, "spec.data.validation")]
    named = [
        (name, path)
        for name, files in data.validation_sets.items()
        for path in _paths(files, f"spec.data.validationSets.{name}")
    ]
    return (*plain, *named)


def _prepared_folder(inputs: _Inputs, prompt: str, fraction: float, seed: int, data: Path) -> Path:
    # paths inside the data folder are relative, so that the digest does not depend on the name of the run's folder
    names = [
        [p.relative_to(data).as_posix() if p.is_relative_to(data) else str(p) for p in paths]
        for paths in (inputs.train, inputs.validation, inputs.images)
    ]
    how: list[Any] = [
        inputs.truth,
        inputs.validation_truth,
        inputs.skip_broken,
        *([inputs.sets] if inputs.sets else []),
    ]
    how += [list(inputs.weights)] if inputs.weights else []
    digest = _digest([names, prompt, fraction, seed, *(how if any(how) else [])])
    return data / f"prepared-{digest}"


def _eval_sources(data: EvalData) -> list[str]:
    """Return the path or URI of each evaluation file."""
    sources = []
    for name in data.files or shapes.EIGHT_FILES:
        named = name if PurePosixPath(name).suffix in ROW_SUFFIXES else f"{name}.jsonl"
        root = data.root or ""
        stands_alone = not root or "://" in named or named.startswith("/")
        sources.append(named if stands_alone else f"{root.rstrip('/')}/{named}")
    return sources


def _prepared_sources(prepared: str) -> tuple[str, str]:
    """Return the paths or URIs of already prepared data, as (train, validation). `prepared` is a folder, or the training file with its
    sibling.
    """
    folder, _, name = prepared.rpartition("/")
    if not name.endswith(".parquet"):
        return f"{prepared.rstrip('/')}/train.parquet", f"{prepared.rstrip('/')}/val.parquet"
    sibling = name.replace("train", "val", 1) if "train" in name else "val.parquet"
    return prepared, f"{folder}/{sibling}" if folder or prepared.startswith("/") else sibling


def locate(job: Job, data: Path, *, validation_fraction: float = 0.1) -> JobData:
    """Return the paths of the job's data as they will be after download, or after preparation in the folder `data`. Accesses no file.

    Raises `UserError` for a source that is neither a path nor a URI.
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
        checks = _validation(spec.data)
        if root is not None:
            return JobData(root / "train_data/sft.json", checks, images=inputs.images)
        rows = inputs.train[0] if _as_it_is(spec.data) else None
        if rows is None and inputs.train:
            mixed = [list(inputs.weights), spec.seed] if inputs.weights else []
            rows = data / f"sft-{_digest([*(str(p) for p in inputs.train), *mixed])}" / "sft.json"
        return JobData(sft_rows=rows, sft_validation=checks, images=inputs.images)
    if root is None and spec.data.prepared:
        train, validation = _paths(_prepared_sources(spec.data.prepared), "spec.data.prepared")
        if inputs.images:  # the copy has each picture's path on this machine
            folder = data / f"resolved-{_digest([str(p) for p in (train, validation, *inputs.images)])}"
            train, validation = folder / "train.parquet", folder / "val.parquet"
        return JobData(train_parquet=train, val_parquet=validation, images=inputs.images)
    folder = _prepared_folder(inputs, spec.data.prompt, validation_fraction, spec.seed, data)
    return JobData(train_parquet=folder / "train.parquet", val_parquet=folder / "val.parquet", images=inputs.images)


@dataclass(frozen=True)
class _Made:
    """The inputs of a preparation, as a map from absolute path to digest of the content. The paths count, because prepared rows hold
    absolute paths of pictures.
    """

    inputs: Mapping[str, str]

    @classmethod
    def of(cls, rows: Sequence[Path], images: Sequence[Path] = ()) -> _Made:
        """Compute the digests of files of rows, and of folders and tars of pictures, as they are now."""
        found = {str(path.absolute()): sha256_of(path) for path in rows if path.exists()}
        for source in images:
            if source.is_dir():
                found[str(source.absolute())] = _state_of_folder(source)
            else:
                parts = parts_of(source) if stem_of_part(source.name) is not None or not source.exists() else [source]
                found |= {str(part.absolute()): _state_of_tar(part) for part in parts}
        return cls(found)

    @property
    def digest(self) -> str:
        return digest_of(dict(self.inputs))

    def document(self, **counts: int) -> Document:
        """Return the content of `done.json`."""
        return {"digest": self.digest, "inputs": dict(self.inputs), **counts}


def _state_of_tar(part: Path) -> str:
    """Return a digest of a tar. For a large tar it includes the file's times, because a sample of the content can miss a changed picture."""
    stat = part.stat()
    times = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] if stat.st_size > WHOLE else []
    return digest_of([fingerprint(part), *times])


def _state_of_folder(folder: Path) -> str:
    """Return a digest of the name, size and times of every file in a folder. The files need not be read: prepared rows refer to them by
    path, and any write to a file changes its times.
    """
    found: list[list[object]] = []
    for top, below, files in os.walk(folder, followlinks=True):
        below.sort()
        for name in sorted(files):
            with suppress(OSError):
                stat = Path(top, name).stat()
                place = os.path.relpath(Path(top, name), folder)
                found.append([place, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return digest_of(found)


def _as_it_is(data: TrainData) -> bool:
    """Return whether SFT reads the training file directly: if there is only one, and each of its rows is used once."""
    return len(data.train) == 1 and not data.weights


def _fresh(folder: Path, made: _Made) -> bool:
    done = folder / "done.json"
    return done.is_file() and read_json(done).get("digest") == made.digest and is_published(folder)


def _need(paths: Sequence[Path], field: str) -> None:
    for path in paths:
        if not path.exists():
            raise UserError("no such file", file=path, field=field)


def _need_images(paths: Sequence[Path]) -> None:
    _need([p for p in paths if not parts_of(p)], "spec.data.images")


def sources(job: Job, *, prepares: bool) -> list[tuple[str, str]]:
    """Return (path or URI, field) of everything that a process of the job reads: the process that prepares, or the later ones. Pure."""
    found: dict[str, Sequence[str]] = {}
    if job.kind == "GroundingEvalJob":
        found = {"files": [] if job.spec.data.shapes else _eval_sources(job.spec.data), "images": job.spec.data.images}
        return _numbered(found)
    data, method = job.spec.data, job.spec.method
    if method == "rl" and data.prepared:
        if prepares or not data.images:  # if images are given, RL reads the copy that preparation made
            found = {"prepared": _prepared_sources(data.prepared), "images": data.images}
    elif method == "sft":
        found = {"train": data.train if prepares or _as_it_is(data) else [], "images": data.images}
        found |= _validation_sources(data)
    elif prepares:  # RL trains on a prepared copy, pictures included
        found = {"train": data.train, **_validation_sources(data), "images": data.images}
    return _numbered(found)


def _validation_sources(data: TrainData) -> dict[str, Sequence[str]]:
    return {
        "validation": data.validation,
        **{f"validationSets.{n}": files for n, files in data.validation_sets.items()},
    }


def _numbered(found: dict[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(s, f"spec.data.{field}[{i}]") for field, many in found.items() for i, s in enumerate(many)]


def bring(job: Job, *, prepares: bool = False, say: Callable[[str], None] = lambda _: None) -> None:
    """Download the remote files of `sources`; unchanged local copies are kept. `say` receives progress messages.

    Raises `UserError` for missing files and `Failure` for failed downloads.
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
    """Download and prepare the data that the job needs, and return their paths. Prepared data go to the folder `data`. Data that are
    complete already are used at once.

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
        if inputs.train and not _as_it_is(spec.data) and root is None:
            _merge(inputs.train, located.sft_rows, inputs.weights, spec.seed)
        _need([located.sft_rows], "spec.data.train")
        _need([path for _, path in located.sft_validation], "spec.data.validation")
        checked = [] if made is not None else [located.sft_rows]
        files = list(dict.fromkeys([*checked, *(path for _, path in located.sft_validation)]))
        for path in files:
            check_answers(path, spec.data.truth, "spec.data.truth:")
        _check_sft(files, inputs.images, job.spec.hyperparameters.max_length if isinstance(job, SftJob) else None, data)
        return located
    train, validation = located.train_parquet, located.val_parquet
    if train is None or validation is None:  # unreachable for rl, but the type checker cannot know
        raise UserError("a job of method rl needs training data", field="spec.data")
    if root is None and spec.data.prepared:
        _resolve(spec.data.prepared, inputs.images, train, validation, spec.data.truth)
        return located
    _need(inputs.train, "spec.data.train")
    _need(inputs.validation, "spec.data.validation")
    if not inputs.train or not inputs.validation:
        raise UserError(
            "a job of method rl needs training rows and validation files",
            field="spec.data",
            hint="Give spec.data.train and spec.data.validation, spec.data.prepared, or spec.data.shapes.",
        )
    longest = job.spec.hyperparameters.prompt_length if isinstance(job, RlJob) else None
    _prepare(inputs, train.parent, spec.data.prompt, validation_fraction, spec.seed, workers, longest)
    return located


def _check_sft(files: Sequence[Path], images: Sequence[Path], longest: int | None, data: Path) -> None:
    """Check every row and picture that SFT will train on or validate with. Each content is checked only once.

    Raises `UserError` with the unusable rows. Found only during training, each would waste the time trained before it.
    """
    from grounding.data import sft_rows
    from grounding.data.embedded import embedded_sources
    from grounding.data.images import open_images

    if not files or longest is None:
        return
    made = _Made.of(files, images)
    done = data / f"checked-{_digest([made.digest, longest])}.json"
    if done.is_file():
        return
    store = open_images(*images, *embedded_sources(files))
    wrong = [problem for path in files for problem in sft_rows.errors(path, store, longest)]
    if wrong:
        hint = "Correct these rows or leave them out; `egm data lint` lists all problems of a file."
        raise UserError(too_many(wrong, 0), file=wrong[0].file, hint=hint)
    write_json(done, made.document())


def _resolve(prepared: str, images: Sequence[Path], train: Path, validation: Path, truth: Space | None = None) -> None:
    """Find the pictures of already prepared data: in `images` if any are given, otherwise at the paths in its rows."""
    from grounding.data.images import open_images
    from grounding.data.prepare import Placer
    from grounding.data.prepared import check, check_truths, resolve

    given = _paths(_prepared_sources(prepared), "spec.data.prepared")
    _need(given, "spec.data.prepared")
    if truth is None:
        for path in given:
            check_truths(path)
    if not images:
        for path in given:
            check(path)
        return
    folder, made = train.parent, _Made.of(given, images)
    if _fresh(folder, made):
        return
    for name in ("done.json", MANIFEST):
        (folder / name).unlink(missing_ok=True)
    placer = Placer(open_images(*images), folder / "images")
    rows = [resolve(source, images, target, placer) for source, target in zip(given, (train, validation), strict=True)]
    write_manifest(folder)
    write_json(folder / "done.json", made.document(train=rows[0], validation=rows[1]))


def _prepare(
    inputs: _Inputs,
    folder: Path,
    prompt: str,
    fraction: float,
    seed: int,
    workers: int | None,
    longest: int | None = None,
) -> None:
    from grounding.data.prepare import prepare

    made = _Made.of([*inputs.train, *inputs.validation], inputs.images)
    if _fresh(folder, made):
        return
    for name in ("done.json", MANIFEST):
        (folder / name).unlink(missing_ok=True)
    result = prepare(
        inputs.train,
        inputs.validation,
        inputs.images,
        folder,
        prompt=prompt,
        fraction=fraction,
        seed=seed,
        workers=workers,
        max_missing=inputs.skip_broken,
        truth=inputs.truth,
        eval_truth=inputs.validation_truth,
        options=("spec.data.truth:", "spec.data.validationTruth:"),
        sets=inputs.sets,
        weights=inputs.weights,
        longest=longest,
    )
    write_manifest(folder)
    failpoint("prepare.manifest", folder.name)
    write_json(folder / "done.json", made.document(train=result.train, validation=result.validation))


def _merge(files: Sequence[Path], target: Path, weights: Sequence[float], seed: int) -> None:
    """Write several SFT files as one list, in which each row is repeated according to its file's weight."""
    _need(files, "spec.data.train")
    made = _Made.of(files)
    if _fresh(target.parent, made):
        return
    rows: list[Any] = []
    for number, file in enumerate(files):
        found = [row for _, row in read_rows(file)]
        often = times(len(found), weights[number], seed + number).tolist() if weights else [1] * len(found)
        rows += [row for row, count in zip(found, often, strict=True) for _ in range(count)]
    for name in ("done.json", MANIFEST):
        (target.parent / name).unlink(missing_ok=True)
    with atomic_write(target) as f:
        f.write(orjson.dumps(rows))
    write_manifest(target.parent)
    write_json(target.parent / "done.json", made.document(rows=len(rows)))
