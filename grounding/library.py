"""For scripts and notebooks: ask a model, evaluate it, read results, score answers, serve, train. The documentation is docs/python.md.

    from grounding.library import ask, evaluate, load_results, score, serve, train

Each function does the same as the command of the same name, by the same code. A mistake of the caller raises
`grounding.errors.UserError`, and any other failure `grounding.errors.Failure`; their text is a readable sentence.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from grounding import api, defaults
from grounding.api import ResolvedEvalJob
from grounding.errors import Failure, UserError
from grounding.evaluate import summary_model
from grounding.evaluate.ask import Asker, BoxAnswer, picture_size
from grounding.evaluate.client.options import Options
from grounding.evaluate.client.request import Request
from grounding.evaluate.engines import Sampling, get_engine
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import plan
from grounding.evaluate.results.reader import Answers, read_answers
from grounding.evaluate.results.row import ResultRow
from grounding.evaluate.run import run as run_evaluation
from grounding.evaluate.with_engine import with_engine
from grounding.jsontypes import Document
from grounding.local.gpus import machine_gpus
from grounding.local.runs import views
from grounding.local.serve import served, serving
from grounding.preflight.command import before_serving
from grounding.prompts import render
from grounding.runtime.access import Access, access_of
from grounding.scoring import Scored, get_profile
from grounding.storage import fetch, is_remote, locate

__all__ = [
    "BoxAnswer",
    "FileScore",
    "Job",
    "Results",
    "Sampling",
    "Scored",
    "Summary",
    "ask",
    "evaluate",
    "load_results",
    "newest_model",
    "score",
    "serve",
    "train",
]

KEY_VARIABLE = "OPENAI_API_KEY"


OWN_ENGINE = "transformers"
"""Engine that serves a model for one question by default, because it needs no GPU"""


# ---- ask ----
def picture_bytes(picture: str | Path | bytes | Image.Image) -> bytes:
    """Return the bytes of a picture (a path or URI, bytes, or a Pillow image). Raises `UserError` if there is no such picture."""
    if isinstance(picture, bytes):
        data = picture
    elif isinstance(picture, Image.Image):
        out = io.BytesIO()
        picture.save(out, "PNG")
        data = out.getvalue()
    else:
        path = Path(fetch(picture))
        if not path.is_file():
            raise UserError("no such picture", file=path)
        data = path.read_bytes()
    picture_size(data, picture if isinstance(picture, str | Path) else "")
    return data


def newest_model(runs: str | Path = "runs") -> Path:
    """Return the folder of the model that was trained last under `runs`, such as the demo's. Raises `UserError` if there is none."""
    done = [v for v in views(Path(runs)) if v.phase == "Succeeded" and not v.is_evaluation]
    models = [
        (v.finished_at, Path(v.path) / "model") for v in done if (Path(v.path) / "model" / "config.json").is_file()
    ]
    if not models:
        raise UserError(
            "found no trained model",
            file=runs,
            hint="Name a model (--model FOLDER) or a server (--endpoint URL), or train the model of the demo (`make demo`).",
        )
    return max(models)[1]


def ask(
    picture: str | Path | bytes | Image.Image,
    expression: str,
    *,
    endpoint: str = "",
    model: str | Path | None = None,
    engine: str = "",
    prompt: str = defaults.PROMPT,
    scoring: str = defaults.SCORING,
    sampling: Sampling | None = None,
    access: Access | None = None,
    runs: str | Path = "runs",
    say: Callable[[str], None] = lambda _: None,
) -> BoxAnswer:
    """Return a model's box for `expression` in a picture (a path, bytes, or a Pillow image).

    With `endpoint`, the question goes to a running server. Then `model` is the name in the request (empty: the first model that the server
    lists), and `engine` is the server's engine (default sglang). Without `endpoint`, `engine` (transformers) starts a server of `model` (a
    folder, hf://, s3://; empty: the model that was trained last under `runs`) for this one question; use `serve` for several questions.
    `say` is called with messages while waiting.
    """
    data = picture_bytes(picture)
    get_profile(scoring)
    render(prompt, expression)
    if not endpoint:  # all mistakes that can be found without a server have been found
        own = engine or OWN_ENGINE
        with serve(newest_model(runs) if model is None else model, engine=own, say=say) as url:
            return ask(
                data,
                expression,
                endpoint=url,
                engine=own,
                prompt=prompt,
                scoring=scoring,
                sampling=sampling,
                access=Access(),  # a server that this function starts needs no key
            )
    chosen = get_engine(engine or defaults.ENGINE)
    asker = Asker(endpoint, access_of(os.environ, KEY_VARIABLE) if access is None else access)
    name = (str(model) if model else asker.model()) if chosen.names_model else None
    return asker.ask(data, expression, Request(name, prompt, chosen.request_extras(sampling or Sampling())), scoring)


# ---- serve ----
def _serve_job(model: str | Path, engine: str, gpus: int) -> ResolvedEvalJob:
    """Return a job that serves a model. Raises `UserError` if the model cannot be served."""
    source = str(model)
    if locate(source).scheme == "file" and not source.startswith("pvc://"):
        source = str(locate(source).folder.absolute())
    spec: Document = {"model": {"source": source}, "engine": engine, "data": {"shapes": {}}}
    if engine != "transformers":
        spec["gpusPerServer"] = gpus
    document = {
        "apiVersion": api.models.GROUP_VERSION,
        "kind": "GroundingEvalJob",
        "metadata": {"name": "serve"},
        "spec": spec,
    }
    job, problems = api.read(document)
    if not isinstance(job, ResolvedEvalJob):
        raise UserError("; ".join(p.message for p in problems) or "the model cannot be served")
    return job


@contextmanager
def serve(
    model: str | Path,
    *,
    engine: str = OWN_ENGINE,
    gpus: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Serve a model while the `with` block runs, and yield the server's URL.

    `engine`: transformers runs on the CPU, sglang and vllm on `gpus` GPUs (default 1, or 0 if the machine has none). The machine is checked
    first, as by `egm doctor`. `say` is called every 10 s while the model loads.
    """
    count = min(1, len(machine_gpus())) if gpus is None else gpus
    job = _serve_job(model, engine, count)
    with tempfile.TemporaryDirectory(prefix="egm-serve-") as folder:
        place = Path(folder)
        what = serving(place / "serve.yaml", job, place, port=0, grace_s=get_engine(engine).grace_s)
        before_serving(f"a server of {model}", job, what, place)
        with served(what, say) as urls:
            yield urls[0]


# ---- evaluate and results ----
@dataclass(frozen=True)
class FileScore:
    """The scores of one evaluation file, as fractions (not per cent). `accuracy` is Acc@0.5 over the answered rows."""

    name: str
    answered: int
    total: int
    accuracy: float | None
    mean_iou: float | None
    errors: int
    unparsed: int
    truncated: int


@dataclass(frozen=True)
class Summary:
    """The table of an evaluation.

    `macro` (the mean of the files) and `micro` (the mean of all rows) are None while rows have no answer; `reason` says why.
    """

    model: str
    total: int
    done: int
    errors: int
    macro: float | None
    micro: float | None
    interval: tuple[float, float] | None
    """95 % interval of the macro mean"""
    files: tuple[FileScore, ...]
    notes: tuple[str, ...]
    reason: str | None


def _summary(found: summary_model.Summary) -> Summary:
    files = tuple(
        FileScore(
            f.name, f.n, f.n if f.total is None else f.total, f.acc, f.mean_iou, f.errors, f.unparsed, f.truncated
        )
        for f in found.files
    )
    return Summary(
        "" if found.model is None else found.model,
        found.total,
        found.done,
        found.errors,
        found.macro,
        found.micro,
        None if found.ci95 is None else found.ci95.macro,
        files,
        found.notes,
        found.reason,
    )


@dataclass(frozen=True)
class Results:
    """The rows of one evaluation, and its summary (None if the evaluation has not written one yet)."""

    folder: Path
    summary: Summary | None
    answers: Answers

    def __len__(self) -> int:
        return len(self.answers)

    def to_arrow(self) -> Any:
        """Return the rows as a `pyarrow.Table`, one row per question, in the paper's order; boxes are xyxy in pixels."""
        import pyarrow as pa

        from grounding.evaluate.results.parquet import schema, table_of

        rows: list[ResultRow] = [{} for _ in range(len(self.answers))]
        for number, row in self.answers.rows():
            rows[number] = row
        return table_of(rows) if rows else pa.Table.from_pylist([], schema=schema())

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`. Raises `UserError` if pandas is not installed; `to_arrow` does not need it."""
        if importlib.util.find_spec("pandas") is None:
            raise UserError("pandas is not installed", hint="Install it (`pip install pandas`), or use to_arrow().")
        return self.to_arrow().to_pandas()


def load_results(place: str | Path) -> Results:
    """Read the results of an evaluation. Raises `UserError`.

    `place` is the folder of `egm eval --out`, the folder of a job under runs/, or s3://bucket/prefix.
    """
    folder = fetch(place) if is_remote(place) else Path(place)
    found = summary_model.read_summary(folder)
    return Results(folder, None if found is None else _summary(found), read_answers(folder))


def evaluate(
    files: str | Path | Sequence[str | Path],
    images: str | Path | Sequence[str | Path],
    *,
    endpoint: str | Sequence[str],
    model: str,
    out: str | Path,
    engine: str = defaults.ENGINE,
    prompt: str = defaults.PROMPT,
    scoring: str = defaults.SCORING,
    sampling: Sampling | None = None,
    concurrency: int = defaults.CONCURRENCY,
    limit: int | None = None,
    retry_errors: bool = False,
    access: Access | None = None,
) -> Summary:
    """Evaluate a served model on RefCOCO files and return its table; rows and summary are written to `out`.

    Like `egm eval`, a repeated call continues. Call it from a thread without an event loop (not from a coroutine).
    """
    drawn = Sampling() if sampling is None else sampling
    endpoints = (endpoint,) if isinstance(endpoint, str) else tuple(endpoint)
    options = Options(
        endpoints,
        Request(model, prompt),
        concurrency,
        access=access_of(os.environ, KEY_VARIABLE) if access is None else access,
    )
    asked = Evaluation(
        _paths(files), _paths(images), Path(out), model, options, drawn, scoring, limit, retry_errors, engine=engine
    )
    evaluation = with_engine(asked, omit_name=True)
    return _summary(run_evaluation(evaluation, plan(evaluation)))


def _paths(given: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    many = [given] if isinstance(given, str | Path) else given
    return tuple(fetch(p) if is_remote(p) else Path(p) for p in many)


def score(
    text: str | None,
    bbox: Sequence[float],
    width: int,
    height: int,
    *,
    scoring: str = defaults.SCORING,
    remap: str | None = "scale",
) -> Scored:
    """Score one answer against the true box (xyxy in pixels of a picture of `width` x `height`). `remap` is that of `egm score`."""
    return get_profile(scoring).score_answer(text, bbox, width, height, remap)


# ---- train ----
@dataclass(frozen=True)
class Job:
    """The outcome of a job of a run.

    `model` is the folder of the trained model (None for an evaluation), `results` the folder of the results (None for a training).
    """

    name: str
    phase: str
    message: str
    model: Path | None
    results: Path | None


def train(manifest: str | Path, *, runs: str | Path = "runs", only: str = "") -> list[Job]:
    """Run a manifest's jobs on this machine like `egm run`, and print its output. A repeated call continues.

    The jobs run in a separate process. Interrupting this one (a notebook cell) stops the run like Ctrl-C. Raises `UserError` if the run ends
    with exit code 2, and `Failure` for any other failure.
    """
    file, place = Path(manifest), Path(runs)
    argv = [sys.executable, "-m", "grounding.cli", "run", "-f", str(file), "--runs", str(place)]
    process = subprocess.Popen(
        [*argv, *(["--only", only] if only else [])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    last = ""
    try:
        for raw in process.stdout:
            last = raw.decode(errors="replace").rstrip() or last
            print(last, flush=True)  # noqa: T201 - a notebook shows it below the cell
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        code = process.wait()
    if code:
        kind = UserError if code == 2 else Failure
        raise kind(f"the run ended with exit code {code}: {last}", file=file)
    found = []
    for v in views(place / file.stem):
        folder = Path(v.path)
        trained, measured = folder / "model", folder if v.is_evaluation else None
        found.append(Job(v.name, v.phase, v.message, trained if trained.is_dir() else None, measured))
    return found
