"""Read a run's folder into plain data for the page. Only this module and `pictures` read files for the report."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from grounding.api.redaction import without_secrets
from grounding.errors import EgmError, UserError
from grounding.evaluate.results.config import read_config
from grounding.evaluate.results.reader import Answers, is_evaluation, read_answers
from grounding.evaluate.summary_model import Summary, summary_of
from grounding.evaluate.sweep import is_sweep
from grounding.jsontypes import Document, JsonObject
from grounding.progress import ProgressLine, read_progress


@dataclass
class Evaluation:
    """An evaluation: its summary, its answers, and its image sources."""

    name: str
    summary: Summary
    """The summary; an empty one if the evaluation has not written any yet"""
    answers: Answers
    images: tuple[Path, ...] = ()
    config: Document = field(default_factory=dict)
    spec: str = ""


@dataclass
class Training:
    """A training job's progress lines."""

    name: str
    stage: str
    lines: list[ProgressLine]
    spec: str = ""


@dataclass
class Run:
    """Everything that the page shows."""

    name: str
    evaluations: list[Evaluation] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    """Names of all jobs that have started"""
    sweeps: list[Path] = field(default_factory=list)
    """Folders of the sweeps, which are jobs that measured several settings; each has its own page"""


def _json(path: Path) -> JsonObject:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _job_text(folder: Path) -> str:
    """Return the text of a folder's job.yaml with possible secrets removed; empty if the file is absent or unreadable."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    try:
        document = yaml.load(_text(folder / "job.yaml"))
    except (YAMLError, ValueError, RecursionError):
        return ""
    if not document:
        return ""
    yaml.dump(without_secrets(document), out)
    return out.getvalue()


def evaluation(folder: Path, name: str, data: Path, answers: Answers | None = None) -> Evaluation:
    """Return the evaluation in `folder`. `data` is the folder of the run's prepared data. Raises `UserError` if there is no evaluation."""
    config = read_config(folder)
    images = tuple(Path(str(p)) for p in config.get("images") or [])
    job_file = folder / "job.yaml"
    if not images and job_file.is_file():
        from grounding.api import load_job
        from grounding.data.jobdata import locate

        try:
            images = locate(load_job(job_file), data).images
        except EgmError:
            images = ()  # the page will say that pictures are missing
    found = answers or read_answers(folder, name)
    return Evaluation(name, summary_of(folder), found, images, config, _job_text(folder))


def collect(run_dir: Path) -> Run:
    """Read a run's folder, or the folder of one evaluation. Raises `UserError` if it is neither."""
    run = Run(run_dir.resolve().name)
    if is_evaluation(run_dir):
        run.evaluations.append(evaluation(run_dir, run.name, run_dir.parent / "data"))
        return run
    config = _json(run_dir / "run.json")
    order = [str(j.get("name", j)) if isinstance(j, dict) else str(j) for j in config.get("jobs", [])]
    found = sorted(p.parent.name for p in run_dir.glob("*/state.json"))
    for name in [n for n in order if n in found] + [n for n in found if n not in order]:
        folder = run_dir / name
        run.jobs.append(name)
        if is_sweep(folder):
            run.sweeps.append(folder)
        elif is_evaluation(folder):
            run.evaluations.append(evaluation(folder, name, run_dir / "data"))
        if lines := read_progress(folder / "progress.jsonl"):
            run.trainings.append(Training(name, lines[-1].get("stage", ""), lines, _job_text(folder)))
    if not run.jobs:
        raise UserError(
            "the folder is neither a run nor an evaluation", file=run_dir, hint="Give a folder under runs/."
        )
    return run
