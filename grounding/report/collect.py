"""What lies in a run's folder -> plain data for the page. With `pictures`, the only module of the report that reads files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import EgmError, UserError
from grounding.evaluate.stored import Answers, is_evaluation, read_answers
from grounding.files import complete_lines


@dataclass
class Evaluation:
    """One evaluation: its summary, its answers, and where its images are."""

    name: str
    summary: dict[str, Any]
    answers: Answers
    images: tuple[Path, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    spec: str = ""


@dataclass
class Training:
    """One training job: its progress lines."""

    name: str
    stage: str
    lines: list[dict[str, Any]]
    spec: str = ""


@dataclass
class Run:
    """Everything the page shows."""

    name: str
    evaluations: list[Evaluation] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def summary_of(folder: Path) -> dict[str, Any]:
    """The summary of an evaluation; empty where it has none yet."""
    return _json(folder / "summary.json")


def evaluation(folder: Path, name: str, data: Path, answers: Answers | None = None) -> Evaluation:
    """The evaluation under `folder`; `data` is where its run keeps prepared data. Raises `UserError` where there is none."""
    config = _json(folder / "run_config.json")
    images = tuple(Path(str(p)) for p in config.get("images") or [])
    job_file = folder / "job.yaml"
    if not images and job_file.is_file():
        from grounding.api import load_job
        from grounding.data.jobdata import locate

        try:
            images = locate(load_job(job_file), data).images
        except EgmError:
            images = ()  # the page says that pictures are missing
    found = answers or read_answers(folder, name)
    return Evaluation(name, summary_of(folder), found, images, config, _text(job_file))


def collect(run_dir: Path) -> Run:
    """Read a run's folder, or the folder of one evaluation. Raises `UserError` where there is neither."""
    run = Run(run_dir.resolve().name)
    if is_evaluation(run_dir):
        run.evaluations.append(evaluation(run_dir, run.name, run_dir.parent / "data"))
        return run
    config = _json(run_dir / "run.json")
    order = [str(j.get("name", j)) if isinstance(j, dict) else str(j) for j in config.get("jobs", [])]
    found = sorted(p.parent.name for p in run_dir.glob("*/state.json"))
    for name in [n for n in order if n in found] + [n for n in found if n not in order]:
        folder = run_dir / name
        run.jobs.append(_json(folder / "state.json") | {"name": name})
        if is_evaluation(folder):
            run.evaluations.append(evaluation(folder, name, run_dir / "data"))
        by_step = {int(line["step"]): line for line in complete_lines(folder / "progress.jsonl") if "step" in line}
        if by_step:
            lines = [by_step[step] for step in sorted(by_step)]
            run.trainings.append(Training(name, str(lines[-1].get("stage", "")), lines, _text(folder / "job.yaml")))
    if not run.jobs:
        raise UserError("neither a run nor an evaluation lies here", file=run_dir, hint="Give a folder under runs/.")
    return run
