"""Holds a report against `ranges.json`: number of jobs -> path of a figure -> {"min"|"max", and what was measured}."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def figure(report: Any, path: str) -> float | None:
    """Return the figure at `a/b/c`, or None."""
    for part in path.split("/"):
        if not isinstance(report, dict) or part not in report:
            return None
        report = report[part]
    return float(report) if isinstance(report, (int, float)) else None


def check(found: dict[str, Any], file: Path) -> int:
    """Print what is out of its range, on stderr; 1 when anything is, or is missing."""
    wrong = []
    ranges = json.loads(file.read_text())["ranges"]
    wrong += [f"{count} jobs: no ranges are known" for count in found if count != "machine" and count not in ranges]
    for count, limits in ranges.items():
        if count not in found:
            continue
        for path, limit in limits.items():
            value = figure(found[count], path)
            low, high = limit.get("min", float("-inf")), limit.get("max", float("inf"))
            if value is None or not low <= value <= high:
                wrong.append(f"{count} jobs: {path} is {value}, expected {json.dumps(limit)}")
    for line in wrong:
        sys.stderr.write(f"out of range: {line}\n")
    return 1 if wrong else 0
