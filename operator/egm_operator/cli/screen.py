"""Render a cluster's jobs as tables for a terminal. Pure: takes raw objects and the time, and returns rich renderables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from egm_operator.kinds import JOBS
from egm_operator.kube.objects import Raw, text
from egm_operator.metrics.jobs import phase_since
from egm_operator.snapshot import created
from egm_operator.status import ConditionType, conditions, phase_of, read_status, reason_text, status_of
from grounding.api.status import (
    Accuracy,
    EvalColumns,
    EvalCosts,
    EvalStatus,
    JobStatus,
    Phase,
    Progress,
    SettingStatus,
    TrainColumns,
    TrainStatus,
)
from grounding.errors import printable
from grounding.figures import kubectl_duration, percent

_ORDER = (
    Phase.RUNNING,
    Phase.RESTARTING,
    Phase.PREPARING,
    Phase.PENDING,
    Phase.SUSPENDED,
    Phase.FAILED,
    Phase.SUCCEEDED,
)
_STYLE = {
    Phase.RUNNING: "green",
    Phase.RESTARTING: "yellow",
    Phase.FAILED: "red",
    Phase.SUSPENDED: "dim",
    Phase.SUCCEEDED: "cyan",
}


@dataclass(frozen=True)
class Line:
    """A job as a line of `egm top`. `share` is 0..1; times are in seconds; None means unknown."""

    namespace: str
    kind: str
    name: str
    phase: str
    reason: str
    share: float | None
    amount: str
    figure: str
    """Validation accuracy (or score) of a training, macro accuracy of an evaluation"""
    note: str
    """Notes on the accuracy, or the reason why uploads fail; may be empty"""
    pace: str
    eta: str
    gpu_hours: str
    attempt: int
    in_phase: float
    age: float
    message: str
    settings: tuple[SettingLine, ...] = ()
    """The settings of a running sweep"""


@dataclass(frozen=True)
class SettingLine:
    """A setting of a sweep, shown below its job."""

    name: str
    share: float | None
    amount: str
    figure: str


def _settings(status: JobStatus) -> tuple[SettingLine, ...]:
    """Return the settings of a sweep. Models are shown by the last component of their names."""
    if not isinstance(status, EvalStatus) or status.settings is None:
        return ()
    return tuple(
        SettingLine(
            printable(
                " ".join(filter(None, ("" if s.model is None else s.model.rstrip("/").rpartition("/")[2], s.name)))
            ),
            min(1.0, s.done / s.total) if s.done is not None and s.total else None,
            f"{s.done}/{s.total}" if s.done is not None and s.total else "",
            "" if s.accuracy is None else f"{s.accuracy:.3f}",
        )
        for s in status.settings
    )


def line(raw: Mapping[str, Any], now: float) -> Line:
    """Return the line of a job at `now` (seconds since 1970)."""
    meta, status = raw["metadata"], status_of(raw)
    figures = _figures(status)
    return Line(
        namespace=text(meta, "namespace"),
        kind=JOBS[raw["kind"]].short,
        name=str(meta["name"]),
        phase=phase_of(status),
        reason=reason_text(status),
        share=min(1.0, figures.part / figures.whole) if figures.part is not None and figures.whole else None,
        amount=figures.amount,
        figure=figures.figure,
        note=next(iter(_notes(status)), ""),
        pace=figures.pace,
        eta=figures.eta,
        gpu_hours=figures.gpu_hours,
        attempt=0 if status.attempt is None else status.attempt,
        in_phase=max(0.0, now - phase_since(raw)),
        age=max(0.0, now - created(raw)),
        message="" if status.message is None else status.message,
        settings=_settings(status) if phase_of(status) is Phase.RUNNING else (),
    )


@dataclass(frozen=True)
class _Figures:
    """The columns of a job of either kind; empty if unknown."""

    part: int | None = None
    whole: int | None = None
    amount: str = ""
    figure: str = ""
    pace: str = ""
    eta: str = ""
    gpu_hours: str = ""


def _first(*texts: str | None) -> str:
    return next((found for found in texts if found), "")


def _notes(status: JobStatus) -> list[str]:
    if isinstance(status, EvalStatus):
        return [] if status.notes is None else [f"note: {note}" for note in status.notes]
    bad = (c for c in conditions(status) if c.type == ConditionType.OUTPUT_WRITABLE and c.status == "False")
    return [f"{c.reason}: {c.message}" for c in bad]


def _figures(status: JobStatus) -> _Figures:
    if isinstance(status, TrainStatus):
        progress = Progress() if status.progress is None else status.progress
        part, whole = progress.step, progress.total_steps
        columns = TrainColumns() if status.columns is None else status.columns
        figure = _first(columns.val_accuracy, columns.score)
        return _Figures(part, whole, _first(columns.step), figure, "", _first(columns.eta), _first(columns.gpu_hours))
    if isinstance(status, EvalStatus):
        shown = EvalColumns() if status.columns is None else status.columns
        pace = f"{shown.requests_per_second}/s" if shown.requests_per_second else ""
        amount, figure = _first(shown.done), _first(shown.accuracy)
        return _Figures(status.done, status.total, amount, figure, pace, _first(shown.eta), _first(shown.gpu_hours))
    return _Figures()


def lines(jobs: Iterable[Raw], now: float, ended: bool = True) -> list[Line]:
    """Return the lines of running jobs, then of waiting ones, then of ended ones (if `ended`), each group with the newest first."""
    found = [line(raw, now) for raw in jobs]
    kept = [one for one in found if ended or one.phase not in (Phase.SUCCEEDED, Phase.FAILED)]
    rank = {str(phase): i for i, phase in enumerate(_ORDER)}
    return sorted(kept, key=lambda one: (rank.get(one.phase, len(rank)), one.in_phase, one.namespace, one.name))


def _bar(share: float | None, width: int = 12) -> Text:
    if share is None:
        return Text("")
    full = round(share * width)
    return Text.assemble(("━" * full, "green"), ("━" * (width - full), "dim"), f" {100 * share:3.0f}%")


def table(found: Sequence[Line], *, namespaces: bool, width: int, rows: int | None = None) -> Group:
    """Return the table for a terminal with `width` columns. `rows` limits the lines of jobs and settings."""
    counts = Counter(one.phase for one in found)
    head = Text("  ").join(
        Text(f"{counts[phase]} {phase.lower()}", style=_STYLE.get(phase, "")) for phase in _ORDER if counts[phase]
    )
    wide = width >= 120
    names = [
        *(["namespace"] if namespaces else []),
        "job",
        "kind",
        "phase",
        "progress",
        "",
        "accuracy",
        "req/s",
        "left",
    ]
    names += ["GPU hours", "try", "since"] if wide else []
    body = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        right = name in ("", "accuracy", "req/s", "left", "GPU hours", "try", "since")
        body.add_column(name, justify="right" if right else "left", no_wrap=True)
    shown: list[tuple[Line | None, list[Text]]] = []
    # jobs come first: settings get the remaining lines
    lines_left = None if rows is None else max(0, rows - len(found))
    for one in found[:rows]:
        cells = [Text(one.namespace)] if namespaces else []
        cells += [Text(one.name), Text(one.kind), Text(one.phase, style=_STYLE.get(Phase(one.phase), ""))]
        cells += [_bar(one.share), *map(Text, (one.amount, one.figure, one.pace, one.eta))]
        if wide:
            cells += map(Text, (one.gpu_hours, f"{one.attempt or ''}", kubectl_duration(one.in_phase)))
        shown.append((one, cells))
        below_it = one.settings[:lines_left]
        lines_left = None if lines_left is None else lines_left - len(below_it)
        for setting in below_it:
            below = [Text("")] if namespaces else []
            below += [Text(f"  {setting.name}", style="dim"), Text(""), Text("")]
            below += [_bar(setting.share), Text(setting.amount), Text(setting.figure), Text(""), Text("")]
            shown.append((None, below + [Text("")] * (len(names) - len(below))))
    # the reason gets the remaining width, so that a long reason does not shorten a name
    taken = sum(2 + max([len(name), *(len(cells[i]) for _, cells in shown)]) for i, name in enumerate(names))
    left = max(0, width - taken - 1)
    body.add_column("", no_wrap=True)
    for job, cells in shown:
        if job is None:
            body.add_row(*cells, Text(""))
            continue
        one = job
        quiet = one.phase in (Phase.RUNNING, Phase.SUCCEEDED)
        why = one.note if quiet else f"{one.reason}: {one.message}".strip(": ")
        body.add_row(*cells, Text(printable(why) if len(why) <= left else why[: max(0, left - 1)] + "…", style="dim"))
    parts: list[Any] = [head, body]
    if rows is not None and len(found) > rows:
        parts.append(Text(f"and {len(found) - rows} more", style="dim"))
    return Group(*parts)


def result(raw: Mapping[str, Any]) -> Group:
    """Return the result of an evaluation from its status."""
    status = read_status(raw, EvalStatus)
    accuracy = Accuracy() if status.accuracy is None else status.accuracy
    files = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    files.add_column("file", no_wrap=True)
    for name in ("n", "Acc@0.5", "mean IoU", "errors", "unparsed"):
        files.add_column(name, justify="right", no_wrap=True)

    for file in [] if accuracy.files is None else accuracy.files:
        counts = ["–" if count is None else f"{count:,}" for count in (file.errors, file.unparsed)]
        asked = 0 if file.n is None else file.n
        files.add_row(file.name, f"{asked:,}", percent(file.acc), percent(file.mean_iou), *counts)
    said = []
    if status.settings:
        return Group(_sweep(status.settings), Text("\n".join(_closing(status))))
    if accuracy.macro is not None:
        bounds = accuracy.ci95
        interval = (
            f" (95 % {percent(bounds[0])} to {percent(bounds[1])})" if bounds is not None and len(bounds) == 2 else ""
        )
        said.append(f"macro {percent(accuracy.macro)}{interval}, micro {percent(accuracy.micro)}")
    else:
        said.append(f"{phase_of(status)}: {_first(status.message, 'there is no result yet')}")
    return Group(files, Text("\n".join([*said, *_closing(status)])))


def _closing(status: EvalStatus) -> list[str]:
    said = [printable(note) for note in _notes(status)]
    return [*said, f"report: {status.report}"] if status.report else said


def _sweep(settings: Sequence[SettingStatus]) -> Table:
    """Return the settings of a sweep as a table with their costs."""
    found = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    several = any(s.model is not None for s in settings)
    names = [*(["model"] if several else []), "setting", "done", "Acc@0.5", "95 %", "tokens", "latency", "GPU-s", "USD"]
    for name in names:
        found.add_column(name, justify="left" if name in ("model", "setting") else "right", no_wrap=True)

    def number(value: float | None, unit: str = "") -> str:
        return "–" if value is None else f"{value:.3g}{unit}"

    for s in settings:
        costs = EvalCosts() if s.costs is None else s.costs
        bounds = "–" if s.ci95 is None or len(s.ci95) != 2 else f"{100 * s.ci95[0]:.1f} to {100 * s.ci95[1]:.1f}"
        found.add_row(
            *([printable(s.model or "")] if several else []),
            printable(s.name),
            f"{s.done}/{s.total}",
            "–" if s.accuracy is None else f"{100 * s.accuracy:.2f}",
            bounds,
            number(costs.generated_tokens),
            number(costs.latency_seconds, " s"),
            number(costs.gpu_seconds),
            number(costs.money),
        )
    return found
