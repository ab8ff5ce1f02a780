"""The tables of docs/benchmarks.md with the results of `make bench`, from the files that `make bench RECORD=1` writes. reference.py calls this."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
"""One file for each comparison"""


@dataclass(frozen=True)
class Line:
    """One case of a comparison. `ratio` says how many times better this project is, or what a feature costs, as `unit` says."""

    case: str
    unit: str
    ours: float
    theirs: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """How the result of a comparison is shown. `other` names the alternative."""

    title: str
    other: str
    lines: Callable[[Any], Iterator[Line]]


def _scoring(result: Any) -> Iterator[Line]:
    for c in result["cases"]:
        case = f"{c['profile']}, {c['answer']}, {c['characters']:,} characters"
        yield Line(case, "answers/s", c["rows_per_second"], c["plain_rows_per_second"], c["ratio"])


def _reward(result: Any) -> Iterator[Line]:
    for c in result["cases"]:
        case = f"{c['answer']}, {c['characters']:,} characters"
        yield Line(case, "µs of CPU per answer", c["microseconds"], c["their_microseconds"], c["ratio"])


def _prepare(result: Any) -> Iterator[Line]:
    ours, plain, case = result["ours"], result["plain"], f"{result['rows']:,} rows"
    yield Line(case, "CPU seconds", ours["cpu_s"], plain["cpu_s"], result["ratio"])
    yield Line(case, "MB of memory", ours["memory_mb"], plain["memory_mb"], plain["memory_mb"] / ours["memory_mb"])


def _queue(result: Any) -> Iterator[Line]:
    for case, c in result["requests"].items():
        yield Line(case, "ms per request", c["ms locked"], c["ms"], c["ms"] / c["ms locked"])


def _storage(result: Any) -> Iterator[Line]:
    case = f"{result['files']:,} files of {result['bytes'] // 1000:,} kB"
    ours, theirs = result["ours"], result["boto3_transfer_manager"]
    for unit, name in (("seconds", "seconds"), ("CPU seconds", "cpu")):
        yield Line(case, unit, ours[name], theirs[name], theirs[name] / ours[name])


def _client(result: Any) -> Iterator[Line]:
    for c in result["client"]:
        server = f"takes {1000 * c['delay_s']:.0f} ms" if c["delay_s"] else "answers at once"
        case = f"server {server}, {c['in_flight']:,} in flight"
        yield Line(
            case,
            "requests per CPU second",
            c["requests_per_core_second"],
            c["bare_requests_per_core_second"],
            c["ratio"],
        )


COMPARISONS = {
    "scoring": Comparison("scoring", "a plain port of the same rules", _scoring),
    "reward": Comparison("reward", "a plain port of the reference's rules", _reward),
    "prepare": Comparison(
        "preparation of data", "a program that does the reference script's work for each row", _prepare
    ),
    "data_queue": Comparison("encrypted queue", "the same queue without encryption", _queue),
    "storage": Comparison("downloads from S3", "boto3's transfer manager, ten threads", _storage),
    "client": Comparison("evaluation client", "a bare loop of aiohttp posts", _client),
}
"""Name of a comparison of bench/side_by_side.py -> how its result is shown"""


def _read(folder: Path) -> dict[str, Any]:
    """Return the recorded results, in the order of `COMPARISONS`."""
    files = {name: folder / f"{name}.json" for name in COMPARISONS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.exists()}


def _number(value: float) -> str:
    """Return a figure with at most three digits after the point, fewer for larger ones."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def results(folder: Path = RESULTS) -> str:
    """Return the table of the figures."""
    rows = ["| comparison | case | unit | egm | the alternative | times as good |", "|---|---|---|---|---|---|"]
    for name, found in _read(folder).items():
        how = COMPARISONS[name]
        for line in how.lines(found["result"]):
            figures = f"{_number(line.ours)} | {_number(line.theirs)} | {line.ratio:.2f}"
            rows.append(f"| {how.title} | {line.case} | {line.unit} | {figures} |")
    return "\n".join([*rows, ""])


def conditions(folder: Path = RESULTS) -> str:
    """Return the table of how each comparison was measured: alternative, date, commit, duration, load and machine."""
    rows = [
        "| comparison | the alternative | measured | commit | took | load | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in _read(folder).items():
        m, load = found["machine"], found["load"]
        machine = f"{m['processor']}, {m['cores']} cores, {m['memory_gib']:.0f} GiB, Python {m['python']}"
        when, commit = found["began"][:10], found["commit"].partition("+")
        changed = " with changes" if commit[1] else ""
        how = COMPARISONS[name]
        rows.append(
            f"| {how.title} | {how.other} | {when} | {commit[0][:7]}{changed} | {found['seconds']:,.0f} s "
            f"| {load['before']:.1f} to {load['after']:.1f} | {machine} |"
        )
    return "\n".join([*rows, ""])
