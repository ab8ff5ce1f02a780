"""Jobs of a cluster as tables for a terminal. Pure: raw objects and the time in, rich renderables out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from egm_operator.metrics.jobs import phase_since
from egm_operator.names import KIND_SHORT
from egm_operator.observe import created
from egm_operator.status import Phase, span
from egm_operator.store import Raw

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
    """A job as a line of `egm top`. `share` is 0..1, times are seconds; None: not known."""

    namespace: str
    kind: str
    name: str
    phase: str
    reason: str
    share: float | None
    amount: str
    figure: str
    """Validation accuracy (or score) of a training, macro accuracy of an evaluation"""
    pace: str
    eta: str
    gpu_hours: str
    attempt: int
    in_phase: float
    age: float
    message: str


def line(raw: Mapping[str, Any], now: float) -> Line:
    """One job at `now` (seconds since 1970)."""
    meta, status = raw["metadata"], raw.get("status") or {}
    shown = status.get("columns") or {}
    progress = status.get("progress") or {}
    part, whole = (
        (progress.get("step"), progress.get("totalSteps")) if progress else (status.get("done"), status.get("total"))
    )
    return Line(
        namespace=str(meta.get("namespace", "")),
        kind=KIND_SHORT[raw["kind"]],
        name=str(meta["name"]),
        phase=str(status.get("phase") or Phase.PENDING),
        reason=str(status.get("reason") or ""),
        share=min(1.0, part / whole) if isinstance(part, (int, float)) and whole else None,
        amount=str(shown.get("step") or shown.get("done") or ""),
        figure=str(shown.get("valAccuracy") or shown.get("accuracy") or shown.get("score") or ""),
        pace=f"{shown['requestsPerSecond']}/s" if shown.get("requestsPerSecond") else "",
        eta=str(shown.get("eta") or ""),
        gpu_hours=str(shown.get("gpuHours") or ""),
        attempt=int(status.get("attempt") or 0),
        in_phase=max(0.0, now - phase_since(raw)),
        age=max(0.0, now - created(raw)),
        message=str(status.get("message") or ""),
    )


def lines(jobs: Iterable[Raw], now: float, ended: bool = True) -> list[Line]:
    """What runs first, then what waits, then what has ended (unless `ended` is false), the newest of each first."""
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
    """The table for a terminal of `width` columns; `rows` bounds the jobs that are shown."""
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
    shown: list[list[Text]] = []
    for one in found[:rows]:
        cells = [Text(one.namespace)] if namespaces else []
        cells += [Text(one.name), Text(one.kind), Text(one.phase, style=_STYLE.get(Phase(one.phase), ""))]
        cells += [_bar(one.share), *map(Text, (one.amount, one.figure, one.pace, one.eta))]
        if wide:
            cells += map(Text, (one.gpu_hours, f"{one.attempt or ''}", span(one.in_phase)))
        shown.append(cells)
    # what the other columns leave is for the reason: a long sentence must not squeeze a name
    taken = sum(2 + max([len(name), *(len(cells[i]) for cells in shown)]) for i, name in enumerate(names))
    left = max(0, width - taken - 1)
    body.add_column("", no_wrap=True)
    for one, cells in zip(found, shown, strict=False):
        why = "" if one.phase in (Phase.RUNNING, Phase.SUCCEEDED) else f"{one.reason}: {one.message}".strip(": ")
        body.add_row(*cells, Text(why if len(why) <= left else why[: max(0, left - 1)] + "…", style="dim"))
    parts: list[Any] = [head, body]
    if rows is not None and len(found) > rows:
        parts.append(Text(f"and {len(found) - rows} more", style="dim"))
    return Group(*parts)


def result(raw: Mapping[str, Any]) -> Group:
    """The result of an evaluation as it stands in its status."""
    status = raw.get("status") or {}
    accuracy = status.get("accuracy") or {}
    files = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    files.add_column("file", no_wrap=True)
    for name in ("n", "Acc@0.5", "mean IoU", "errors", "unparsed"):
        files.add_column(name, justify="right", no_wrap=True)

    def percent(value: Any) -> str:
        return f"{100 * value:.2f}" if isinstance(value, (int, float)) else "–"

    for file in accuracy.get("files") or []:
        counts = [f"{file[k]:,}" if k in file else "–" for k in ("errors", "unparsed")]
        files.add_row(
            str(file["name"]), f"{file.get('n', 0):,}", percent(file.get("acc")), percent(file.get("meanIou")), *counts
        )
    said = []
    if accuracy.get("macro") is not None:
        low, high = (accuracy.get("ci95") or [None, None])[:2]
        interval = f" (95 % {percent(low)} to {percent(high)})" if low is not None else ""
        said.append(f"macro {percent(accuracy['macro'])}{interval}, micro {percent(accuracy.get('micro'))}")
    else:
        said.append(f"{status.get('phase') or Phase.PENDING}: {status.get('message') or 'there is no result yet'}")
    if status.get("report"):
        said.append(f"report: {status['report']}")
    return Group(files, Text("\n".join(said)))
