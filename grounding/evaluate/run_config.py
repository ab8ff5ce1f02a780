"""Write run_config.json and the digests of pictures, which record the conditions of a folder's answers, and check whether more answers may
be added.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from grounding import defaults
from grounding.data.records import file_stem
from grounding.errors import UserError
from grounding.evaluate.evaluation import Evaluation
from grounding.evaluate.plan import Plan
from grounding.evaluate.results.config import FILE, RunConfig
from grounding.evaluate.results.replica import PICTURES
from grounding.evaluate.results.writer import Results, Tallies
from grounding.evaluate.summary_model import Summary
from grounding.evaluate.worklist import short_digest
from grounding.files import read_json, write_json
from grounding.scoring import get_profile


def check_conditions(evaluation: Evaluation, results: Results) -> None:
    """Raise `UserError` if the folder's latencies were measured under other conditions, because they must not be mixed."""
    path = evaluation.out / FILE
    if not results.done.answered.any() or not path.exists():
        return
    before = read_json(path)
    mode, concurrency = before.get("mode", defaults.MODE), before.get("concurrency")
    if mode != evaluation.mode or (mode == "latency" and concurrency != evaluation.client.concurrency):
        was = f"{mode} mode" + (f" with concurrency {concurrency}" if mode == "latency" else "")
        raise UserError(f"has answers of {was}", file=evaluation.out, hint="Choose another --out for this measurement.")


def record_pictures(evaluation: Evaluation, planned: Plan, done: Tallies) -> None:
    """Record digests of the pictures of the questions. Raises `UserError` if a picture with stored answers has changed.

    A picture whose questions have all failed may change, because they are asked again.
    """
    path = evaluation.out / PICTURES
    known = read_json(path) if path.exists() else {}
    before = known if isinstance(known, dict) else {}
    now = {name: print_[:16] for name, print_ in planned.images.fingerprints(planned.worklist.images).items()}
    answered = {planned.worklist.images[i] for i in np.unique(planned.worklist.image[done.answered])}
    if other := [name for name in sorted(answered) if name in before and before[name] != now[name]]:
        raise UserError(
            f"has answers for other pictures: {len(other)} of {len(answered)} have changed, such as {other[0]}",
            file=evaluation.out,
            field="images",
            hint="Restore the pictures, or choose another --out (for a job: another spec.output, or `egm run --restart`).",
        )
    if before | now != before:
        write_json(path, before | now)


def change_profile(evaluation: Evaluation, rows: int, done: Tallies, earlier: Summary) -> None:
    """Change only the profile in run_config.json. Raises `UserError` if the folder has rows that would not be scored again."""
    before, answered = earlier.total, earlier.done - earlier.errors_as_wrong
    here, problem = int(done.answered.sum()), ""
    if rows < before:
        problem = f"has an evaluation of {before} rows, of which only {rows} would be scored again"
    elif here < answered:
        problem = (
            f"has {answered} answers, of which only {here} belong to these rows with this model, prompt and settings"
        )
    if problem:
        raise UserError(
            f"{problem}; its summary would be lost",
            file=evaluation.out,
            hint=f"`egm rescore {evaluation.out}` takes files, prompt and settings from the folder. The files must be unchanged.",
        )
    path = evaluation.out / FILE
    if path.exists():
        write_json(path, read_json(path) | {"scoring": get_profile(evaluation.scoring).name})


def config_of(evaluation: Evaluation, planned: Plan) -> RunConfig:
    """Return the content of run_config.json, with which a report finds pictures and rows."""
    return {
        "model": evaluation.model,
        "prompt": evaluation.client.request.prompt,
        "scoring": get_profile(evaluation.scoring).name,
        "files": [str(f.absolute()) for f in evaluation.files],
        "images": [str(i.absolute()) for i in evaluation.images],
        "mode": evaluation.mode,
        "endpoints": list(evaluation.client.endpoints),
        "concurrency": evaluation.client.concurrency,
        "request": {**evaluation.client.request.extras, **evaluation.client.request.body},
        "system": evaluation.client.request.system,
        "send_images": evaluation.client.request.images,
        "limit": evaluation.limit,
        "sampling": asdict(evaluation.sampling),
        "body": dict(evaluation.client.request.body),
        "method": evaluation.client.method.settings(),
        "truth": evaluation.truths.space,
        "left_out": [
            {"file": file_stem(Path(p.file)), "line": p.row, "kind": p.kind, "image": p.image, "message": p.message}
            for p in planned.worklist.left_out
        ],
        "max_errors": evaluation.max_errors,
        "asked_as": evaluation.client.request.model,
        "settings": short_digest(planned.worklist.settings),
    }
