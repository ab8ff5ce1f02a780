"""What lies in a run's folder -> plain data for the page. The only module of the report that reads files."""

from __future__ import annotations

import base64
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import EgmError, UserError
from grounding.files import complete_lines

MAX_PICTURES, MAX_BYTES = 240, 12_000_000


@dataclass
class Evaluation:
    """One evaluation: its summary, and the last row of every question."""

    name: str
    summary: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    images: tuple[Path, ...] = ()
    spec: str = ""

    def question(self, row: dict[str, Any]) -> tuple[str, int, str]:
        """What makes rows of two evaluations the same question: keys differ, since they hold the model."""
        return str(row.get("file")), int(row.get("line") or 0), str(row.get("sent"))


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


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    parts = sorted((folder / "results").glob("part-*.jsonl"))
    return {str(row["key"]): row for part in parts for row in complete_lines(part) if "key" in row}


def _evaluation(folder: Path, name: str, data: Path) -> Evaluation:
    config = _json(folder / "run_config.json")
    images = tuple(Path(p) for p in config.get("images", []))
    job_file = folder / "job.yaml"
    if not images and job_file.is_file():
        from grounding.api import load_job
        from grounding.data.jobdata import locate

        try:
            images = locate(load_job(job_file), data).images
        except EgmError:
            images = ()  # the page says that pictures are missing
    return Evaluation(name, _json(folder / "summary.json"), _rows(folder), images, _text(job_file))


def collect(run_dir: Path) -> Run:
    """Read a run's folder, or the folder of one evaluation. Raises `UserError` where there is neither."""
    run = Run(run_dir.resolve().name)
    if (run_dir / "results").is_dir() or (run_dir / "summary.json").is_file():
        run.evaluations.append(_evaluation(run_dir, run.name, run_dir.parent / "data"))
        return run
    config = _json(run_dir / "run.json")
    order = [str(j.get("name", j)) if isinstance(j, dict) else str(j) for j in config.get("jobs", [])]
    found = sorted(p.parent.name for p in run_dir.glob("*/state.json"))
    for name in [n for n in order if n in found] + [n for n in found if n not in order]:
        folder = run_dir / name
        run.jobs.append(_json(folder / "state.json") | {"name": name})
        if (folder / "results").is_dir() or (folder / "summary.json").is_file():
            run.evaluations.append(_evaluation(folder, name, run_dir / "data"))
        by_step = {int(line["step"]): line for line in complete_lines(folder / "progress.jsonl") if "step" in line}
        if by_step:
            lines = [by_step[step] for step in sorted(by_step)]
            run.trainings.append(Training(name, str(lines[-1].get("stage", "")), lines, _text(folder / "job.yaml")))
    if not run.jobs:
        raise UserError("neither a run nor an evaluation lies here", file=run_dir, hint="Give a folder under runs/.")
    return run


def chosen(run: Run, most: int = MAX_PICTURES, seed: int = 0) -> list[tuple[str, int, str]]:
    """Which questions the gallery shows: every file and outcome in turn, the worst answers and random ones alternating."""
    groups: dict[tuple[str, str, str], list[tuple[float, tuple[str, int, str]]]] = defaultdict(list)
    for e in run.evaluations:
        for row in e.rows.values():
            kind = "correct" if row.get("correct") else str(row.get("outcome"))
            groups[(e.name, str(row.get("file")), kind)].append((float(row.get("iou") or 0.0), e.question(row)))
    rng = random.Random(seed)

    def queue(rows: list[tuple[float, tuple[str, int, str]]]) -> Iterator[tuple[str, int, str]]:
        worst = sorted(rows)
        shuffled = rows[:]
        rng.shuffle(shuffled)
        for a, b in zip(worst, shuffled, strict=True):
            yield a[1]
            yield b[1]

    queues = [queue(groups[key]) for key in sorted(groups)]
    kept: dict[tuple[str, int, str], None] = {}
    while queues and len(kept) < most:
        for q in queues[:]:
            item = next((i for i in q if i not in kept), None)
            if item is None:
                queues.remove(q)
            elif len(kept) < most:
                kept[item] = None
    return list(kept)


def thumbnail(data: bytes, side: int = 320) -> str:
    """A data URI of a picture, made smaller where it is larger than `side` pixels; PNG stays as it is when small."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(data))
    if max(image.size) <= side and len(data) < 20_000 and image.format in ("PNG", "JPEG", "WEBP"):
        return f"data:image/{image.format.lower()};base64,{base64.b64encode(data).decode()}"
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=78)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
