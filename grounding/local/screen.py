"""The display of a run: a live table on a terminal, otherwise plain lines. It only reads files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grounding.errors import printable
from grounding.figures import percent, short_duration
from grounding.local.runs import View, view
from grounding.runtime.waiting import EVERY_S

STYLE = {
    "Pending": ("○", "dim"),
    "Running": ("●", "cyan"),
    "Succeeded": ("✓", "green"),
    "Failed": ("✗", "bold red"),
    "Stopped": ("■", "yellow"),
    "Suspended": ("‖", "dim"),
}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{percent(value, 1)} %"


def count(v: View) -> str:
    """Return the number of steps or answers, such as `320/1,500`."""
    if v.step is None:
        return "-"
    return f"{v.step:,}/{v.total:,}" if v.total else f"{v.step:,}"


def _sets(v: View, shown: Callable[[float], str]) -> str:
    """Return the metric of each named validation set, in brackets."""
    return f" ({', '.join(f'{name} {shown(value)}' for name, value in v.val_sets.items())})" if v.val_sets else ""


def metrics(v: View) -> str:
    """Return the main metrics of a job as text, the shortest first."""
    parts = []
    if v.loss is not None:
        parts.append(f"loss {v.loss:.4g}")
    if v.score is not None:
        parts.append(f"score {v.score:.3f}")
    if v.val_accuracy is not None:
        parts.append(f"validation {_percent(v.val_accuracy)}{_sets(v, _percent)}")
    if v.val_loss is not None:
        parts.append(f"validation loss {v.val_loss:.4g}{_sets(v, lambda loss: f'{loss:.4g}')}")
    if v.accuracy is not None:
        parts.append(f"accuracy {_percent(v.accuracy)}")
    if v.tokens_s:
        parts.append(f"{v.tokens_s:,.0f} tokens/s")
    if v.mfu:
        parts.append(f"MFU {_percent(v.mfu)}")
    if v.errors:
        parts.append(f"{v.errors:,} errors")
    return "  ".join(parts)


def elapsed(v: View, now: float) -> float | None:
    """Return the duration of the job's newest attempt in seconds."""
    if not v.started_at or v.phase in ("Pending", "Suspended"):
        return None
    return (v.finished_at or now) - v.started_at


def table(views: Iterable[View], now: float) -> Table:
    """Return the jobs of a run as a table; empty columns stay narrow."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", expand=False)
    out.add_column("job", no_wrap=True)
    out.add_column("phase", no_wrap=True)
    out.add_column("doing", no_wrap=True)
    out.add_column("done", justify="right", no_wrap=True)
    out.add_column("figures", overflow="fold")
    out.add_column("time", justify="right", no_wrap=True)
    out.add_column("left", justify="right", no_wrap=True)
    for v in views:
        mark, style = STYLE.get(v.phase, ("?", ""))
        left = short_duration(v.eta_s) if v.phase == "Running" and v.eta_s is not None else ""
        took = elapsed(v, now)
        out.add_row(
            Text(v.name, style="bold" if v.phase == "Running" else ""),
            Text(f"{mark} {v.phase}", style=style),
            Text(v.role or "", style="dim"),
            count(v) if v.step is not None else "",
            Text(metrics(v)) if metrics(v) else Text(v.news, style="dim"),
            short_duration(took) if took is not None else "",
            left,
        )
        for s in v.settings if v.phase == "Running" else ():
            amount, figure = f"{s.done:,}/{s.total:,}", "" if s.accuracy is None else f"accuracy {_percent(s.accuracy)}"
            out.add_row(*(Text(text, style="dim") for text in (f"  {s.name}", "", "", amount, figure, "", "")))
    return out


def moment(step: int | None, at: float, now: float) -> str:
    """Return a checkpoint's step and age, such as `120 (3m07s)`; `-` if there is none. Pure."""
    return "-" if step is None else f"{step:,} ({short_duration(now - at)})"


def columns(found: Sequence[View], *, wide: bool, now: float) -> list[str]:
    """Return the jobs `found` as aligned text columns under a heading."""
    heads = ["NAME", "KIND", "PHASE", "STEP", "SCORE", "VAL-ACC", "DONE", "ACC@0.5", "AGE"]
    if wide:
        heads += ["RUN", "ATTEMPT", "ROLE", "SAVED", "UPLOADED", "LOSS", "ERRORS", "LEFT", "REASON", "PATH"]
    several = len({v.run for v in found}) > 1 and not wide
    rows = [["RUN", *heads] if several else heads]
    for v in found:
        row = [
            v.name,
            v.kind or "-",
            v.phase,
            "-" if v.is_evaluation else count(v),
            "-" if v.score is None else f"{v.score:.3f}",
            _percent(v.val_accuracy),
            count(v) if v.is_evaluation else "-",
            _percent(v.accuracy),
            short_duration(now - v.created_at) if v.created_at else "-",
        ]
        if wide:
            row += [
                v.run,
                str(v.attempt),
                v.role or "-",
                moment(v.saved_step, v.saved_at, now),
                moment(v.uploaded_step, v.uploaded_at, now),
                "-" if v.loss is None else f"{v.loss:.4g}",
                str(v.errors),
                short_duration(v.eta_s),
                v.reason or "-",
                v.path,
            ]
        rows.append([v.run, *row] if several else row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["   ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def upload_problems(found: Sequence[View]) -> list[str]:
    """Return a line for each training whose uploads fail. Pure."""
    return [printable(f"{v.name}: UploadFailing: {v.upload_problem}") for v in found if v.upload_problem]


@dataclass
class Lines:
    """Turns views into lines: one per change, and a job's metrics at most every `interval` seconds."""

    interval: float = 5.0
    waiting: float = EVERY_S
    """Seconds between two lines about a job that has no figures yet"""
    _phases: dict[str, tuple[str, str]] = field(default_factory=dict)
    _figures: dict[str, tuple[float, str]] = field(default_factory=dict)

    def new(self, views: Iterable[View], now: float) -> list[str]:
        """Return the new lines."""
        lines = []
        for v in views:
            text = f"{count(v)}  {metrics(v)}".strip() if v.step is not None else ""
            if v.name not in self._phases and v.phase == "Pending":
                continue  # do not report a waiting job before its first change
            if self._phases.get(v.name) != (v.phase, v.role):
                self._phases[v.name] = (v.phase, v.role)
                self._figures[v.name] = (now, text)
                took = elapsed(v, now)
                tail = [v.role, v.reason, text, short_duration(took) if v.finished_at and took is not None else ""]
                lines.append("  ".join([f"{v.name}: {v.phase}", *(t for t in tail if t)]))
                continue
            said_at, said = self._figures.get(v.name, (0.0, ""))
            if v.phase == "Running" and v.news:
                if now - said_at >= self.waiting:
                    self._figures[v.name] = (now, said)
                    parts = (v.role, text, f"{short_duration(elapsed(v, now))}: {v.news}")
                    lines.append(f"{v.name}: {'  '.join(filter(None, parts))}")
            elif v.phase == "Running" and text and text != said and now - said_at >= self.interval:
                self._figures[v.name] = (now, text)
                left = f"  {short_duration(v.eta_s)} left" if v.eta_s is not None else ""
                lines.append(f"{v.name}: {v.role}  {text}{left}")
        return lines


class Screen:
    """Shows the jobs `names` of `run_dir`. Call `update` about once a second; `say` prints a message."""

    def __init__(self, console: Console, run_dir: Path, names: Sequence[str]) -> None:
        self.console, self.run_dir, self.names = console, run_dir, names
        self._lines = Lines()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self.update()

    def views(self) -> list[View]:
        """Return the current state of the jobs."""
        return [view(self.run_dir, n, alive=True) for n in self.names]

    def update(self) -> None:
        """Show the changes since the last call."""
        now = time.time()
        views = self.views()
        if self._live:
            self._live.update(table(views, now), refresh=True)
            return
        for line in self._lines.new(views, now):
            self.console.print(
                f"{time.strftime('%H:%M:%S')}  {printable(line)}", markup=False, highlight=False, soft_wrap=True
            )

    def say(self, text: str) -> None:
        """Print a message above the table."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
