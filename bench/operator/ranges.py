"""Compare a report with `ranges.json`: number of jobs -> path of a value -> {"min"|"max", and the measured value}."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def figure(report: Any, path: str) -> float | None:
    """Return the value at the path `a/b/c`; None if there is none."""
    for part in path.split("/"):
        if not isinstance(report, dict) or part not in report:
            return None
        report = report[part]
    return float(report) if isinstance(report, (int, float)) else None


def check(found: dict[str, Any], file: Path) -> int:
    """Print to stderr which values are missing or outside their range. Return 1 if there are any, otherwise 0."""
    wrong = []
    ranges = json.loads(file.read_text())["ranges"]
    wrong += [
        f"{count} jobs: ranges.json has no ranges for this number"
        for count in found
        if count != "machine" and count not in ranges
    ]
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
