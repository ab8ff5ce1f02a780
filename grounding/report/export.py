"""Export an evaluation to other tools: as an inspect_ai `.eval` log, or as a Weights & Biases or trackio run. Tools are imported on demand.

A failed request is exported as an error without a score. Means are exported only if the summary has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from grounding.errors import UserError
from grounding.evaluate.results.reader import Answers, read_answers
from grounding.evaluate.results.row import ResultRow
from grounding.evaluate.summary_model import Summary, summary_of
from grounding.jsontypes import Document
from grounding.prompts import render
from grounding.report.slices import KINDS, kinds

COLUMNS = (
    "file",
    "line",
    "image",
    "sent",
    "kind",
    "iou",
    "correct",
    "true box",
    "box",
    "tokens",
    "latency_s",
    "answer",
)
_TEXT = 4000


TOOLS = {"inspect_ai": "0.3.285", "wandb": "0.31.0", "trackio": "0.43.0"}
"""Versions with which the exporters are tested (`make test-export`). They are not extras, because in the common lock they would hold back
other packages
"""


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        tool = module.split(".")[0]
        if (e.name or "").split(".")[0] != tool:
            raise
        raise UserError(
            f"this export needs {tool}, which is not installed",
            field="--to",
            hint=f"Install it in egm's environment: pip install '{tool}=={TOOLS[tool]}'.",
        ) from None


def figures(summary: Summary) -> dict[str, float]:
    """Return the summary's values by flat names, such as macro, micro and refcoco_val/acc. Pure."""
    found: dict[str, float | None] = {"macro": summary.macro, "micro": summary.micro, "done": summary.done}
    found |= {"errors": summary.errors, "unparsed": summary.unparsed, "truncated": summary.truncated}
    for f in summary.files:
        found |= {f"{f.name}/n": f.n, f"{f.name}/acc": f.acc, f"{f.name}/acc75": f.acc75, f"{f.name}/acc90": f.acc90}
        found |= {f"{f.name}/mean_iou": f.mean_iou, f"{f.name}/tokens_mean": f.tokens_mean}
    return {name: value for name, value in found.items() if value is not None}


def table(a: Answers) -> Iterator[list[Any]]:
    """Yield rows with `COLUMNS`, in no particular order. Boxes are xyxy in pixels, or null."""
    kind = kinds(a)
    for i, row in a.rows():
        q = a.questions[i]
        text = str(row.get("error") or row.get("text") or "")
        facts = [q.file, q.line, q.image, q.sent, KINDS[kind[i]], row.get("iou"), row.get("correct"), str(list(q.bbox))]
        box = row.get("scaled_bbox")
        yield [
            *facts,
            None if box is None else str(box),
            row.get("completion_tokens"),
            row.get("latency_s"),
            text[-_TEXT:],
        ]


def export_inspect(a: Answers, summary: Summary, out: Path | None, **_: Any) -> str:
    """Write a log to `out` that `inspect view` and inspect_ai's readers can open. Every question is a sample."""
    if out is None or out.suffix != ".eval":
        raise UserError("the log's name must end in .eval", field="OUT", hint="egm export DIR --to inspect OUT.eval")
    log = _needed("inspect_ai.log")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.eval")
    try:
        log.write_eval_log(_inspect_log(a, summary), str(temporary))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return str(out)


def _inspect_log(a: Answers, summary: Summary) -> Any:
    log, scorer = import_module("inspect_ai.log"), "egm/" + a.scoring
    kind = kinds(a)
    samples = [_inspect_sample(a, i, row, KINDS[kind[i]]) for i, row in a.rows()]
    samples.sort(key=lambda s: s.id)
    metrics = {k: log.EvalMetric(name=k, value=v) for k, v in figures(summary).items()}
    answered = int(a.answered.sum())
    score = log.EvalScore(
        name=scorer, scorer=scorer, metrics=metrics, scored_samples=answered, unscored_samples=len(a) - answered
    )
    spec = log.EvalSpec(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task="egm_grounding",
        task_args={"prompt": a.prompt, "scoring": a.scoring, "files": list(a.files)},
        dataset=log.EvalDataset(name="RefCOCO, RefCOCO+, RefCOCOg", samples=len(a), sample_ids=[s.id for s in samples]),
        model=a.model or "unknown",
        config=log.EvalConfig(),
        metadata={"folder": a.folder.name, "reason": summary.reason, "notes": a.notes(), **_conditions(a)},
    )
    results = log.EvalResults(total_samples=len(a), completed_samples=answered, scores=[score])
    whole = summary.reason is None and answered == len(a)
    return log.EvalLog(status="success" if whole else "error", eval=spec, results=results, samples=samples)


def _inspect_sample(a: Answers, i: int, row: ResultRow, kind: str) -> Any:
    log, model = import_module("inspect_ai.log"), import_module("inspect_ai.model")
    q, text, scorer = a.questions[i], str(row.get("text") or ""), "egm/" + a.scoring
    facts: Document = {"file": q.file, "line": q.line, "image": q.image, "sent": q.sent}
    facts |= {k: row.get(k) for k in ("width", "height", "outcome", "finish_reason", "latency_s")}
    message = model.ChatMessageUser(content=render(a.prompt, q.sent) if a.prompt else q.sent)
    common = {"id": f"{q.file}:{q.line:06d}:{i:06d}", "epoch": 1, "input": [message], "target": str(list(q.bbox))}
    if not a.answered[i]:
        reason = str(row.get("error") or "request failed")
        error = import_module("inspect_ai._util.error").EvalError(message=reason, traceback="", traceback_ansi="")
        return log.EvalSample(**common, metadata=facts, error=error)
    score = import_module("inspect_ai.scorer").Score(
        value="C" if a.correct[i] else "I",
        answer=None if row.get("scaled_bbox") is None else str(row["scaled_bbox"]),
        metadata={"iou": row.get("iou"), "kind": kind},
    )
    output = model.ModelOutput.from_content(
        a.model or "unknown", text, "max_tokens" if row.get("finish_reason") == "length" else "stop"
    )
    used = int(row.get("prompt_tokens") or 0), int(row.get("completion_tokens") or 0)
    output.usage = model.ModelUsage(input_tokens=used[0], output_tokens=used[1], total_tokens=sum(used))
    messages = [message, model.ChatMessageAssistant(content=text)]
    return log.EvalSample(
        **common,
        metadata=facts,
        messages=messages,
        output=output,
        scores={scorer: score},
        total_time=row.get("latency_s"),
    )


def export_wandb(a: Answers, summary: Summary, out: Path | None, *, project: str, name: str) -> str:
    """Log a run with the summary's values and a table of all rows. With WANDB_MODE=offline, it is stored in `out` (default: the current
    folder).
    """
    wandb = _needed("wandb")
    run = wandb.init(project=project, name=name, dir=None if out is None else str(out), config=_settings(a))
    with run:
        run.log({"answers": wandb.Table(columns=list(COLUMNS), data=list(table(a)))} | figures(summary))
        run.summary.update(figures(summary))
    return f"wandb run {run.name} in {project}: {run.url or run.dir}"


def export_trackio(a: Answers, summary: Summary, out: Path | None, *, project: str, name: str) -> str:
    """Log a trackio run with the summary's values and a table of all rows, to trackio's own folder (TRACKIO_DIR)."""
    if out is not None:
        raise UserError("trackio writes to its own folder", field="OUT", hint="Omit OUT and set TRACKIO_DIR instead.")
    trackio = _needed("trackio")
    trackio.init(project=project, name=name, config=_settings(a), auto_log_gpu=False, auto_log_cpu=False)
    try:
        trackio.log({"answers": trackio.Table(columns=list(COLUMNS), data=list(table(a)))} | figures(summary))
    finally:
        trackio.finish()
    return f"trackio run {name} in {project}: trackio show --project {project}"


def _settings(a: Answers) -> Document:
    facts = {"model": a.model, "prompt": a.prompt, "scoring": a.scoring, "rows": len(a), "folder": a.folder.name}
    return facts | {"notes": a.notes()} | _conditions(a)


def _conditions(a: Answers) -> Document:
    """Return the settings of all rows, and the models that answered."""
    c = a.conditions
    return {"settings": a.settings, "conditions": dict(c.settings or {}), "served": [str(m) for m in c.served]}


TARGETS: dict[str, Callable[..., str]] = {
    "inspect": export_inspect,
    "wandb": export_wandb,
    "trackio": export_trackio,
}


def export(
    folder: Path,
    target: str,
    out: Path | None = None,
    *,
    project: str = "egm",
    name: str = "",
    on_notes: Callable[[list[str]], None] = lambda _: None,
) -> str:
    """Export the evaluation in `folder` to `target`. Return a line that says where the export is.

    `on_notes` is called with the notes on the answers before anything is written, and may raise an exception. Raises `UserError` if the target
    is unknown or its tool is not installed.
    """
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}", field="--to", hint=f"Known: {', '.join(TARGETS)}.")
    answers = read_answers(folder)
    if not len(answers):
        raise UserError("the evaluation has no rows", file=folder)
    on_notes(answers.notes())
    return TARGETS[target](answers, summary_of(folder), out, project=project, name=name or answers.name)
