"""Read and check the rows of an evaluation before anything is sent or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grounding.data.embedded import embedded_sources
from grounding.data.images import ImageStore, open_images
from grounding.data.problems import KINDS, Problem
from grounding.data.records import file_stem
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.guard import Truths
from grounding.evaluate.method import check
from grounding.evaluate.results.config import FILE
from grounding.evaluate.worklist import Worklist, read_worklist, settings_digest
from grounding.files import read_json
from grounding.prompts import asks_for_whole
from grounding.scoring import get_profile


@dataclass(frozen=True)
class Plan:
    """The rows of an evaluation, read and checked."""

    worklist: Worklist
    images: ImageStore


def plan(evaluation: Evaluation) -> Plan:
    """Read all rows and check all images. Nothing is sent or written. Raises `UserError` with file and line if a row or an image is wrong."""
    settings = evaluation_digest(evaluation)
    if evaluation.rescore:  # the answers exist, so the pictures are not needed
        without = _left_out_before(evaluation.out, evaluation.files)
        rows = {(file_stem(Path(p.file)), p.row) for p in without}
        worklist = read_worklist(evaluation.files, settings, None, evaluation.limit, _truths(evaluation), rows)
        return Plan(replace(worklist, left_out=without), open_images())
    images = open_images(*evaluation.images, *embedded_sources(evaluation.files))
    return Plan(read_worklist(evaluation.files, settings, images, evaluation.limit, _truths(evaluation)), images)


def _truths(evaluation: Evaluation) -> Truths:
    """Return how true boxes are written, including which of two boxes the prompt asks for."""
    return replace(evaluation.truths, amodal=asks_for_whole(evaluation.client.request.prompt))


def _left_out_before(out: Path, files: Sequence[Path]) -> tuple[Problem, ...]:
    """Return the rows that the run left out when it asked the questions."""
    path = out / FILE
    found = read_json(path).get("left_out") if path.exists() else None
    by_stem = {file_stem(f): str(f) for f in files}
    return tuple(
        Problem(
            kind if (kind := row.get("kind")) in KINDS else "broken-row",
            by_stem.get(str(row["file"]), str(row["file"])),
            int(row["line"]),
            str(row.get("image") or ""),
            str(row.get("message") or row.get("kind")),
        )
        for row in found or ()
    )


def plan_beside(evaluation: Evaluation, planned: Plan) -> Plan:
    """Return the plan of another setting for the same rows. Their pictures are not checked again."""
    left_out = planned.worklist.left_out
    without = {(file_stem(Path(p.file)), p.row) for p in left_out}
    worklist = read_worklist(
        evaluation.files, evaluation_digest(evaluation), None, evaluation.limit, _truths(evaluation), without
    )
    return Plan(replace(worklist, left_out=left_out), planned.images)


def evaluation_digest(evaluation: Evaluation) -> bytes:
    """Return the identity of this evaluation's answers. Raises `UserError` if the settings cannot work."""
    client, method = evaluation.client, evaluation.client.method
    check(method, evaluation.sampling.temperature, get_profile(evaluation.scoring).name)
    request = client.request
    return settings_digest(evaluation.model, request.prompt, evaluation.sampling, request.system, request.body, method)
