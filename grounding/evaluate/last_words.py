"""What an evaluation leaves where Kubernetes keeps 4096 bytes of a container's end: the summary in short, for the job's status."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

LIMIT = 4096
_OF_A_FILE = ("name", "n", "acc", "mean_iou", "errors", "unparsed")


def short(summary: Mapping[str, Any], report: str = "") -> bytes:
    """JSON of at most 4096 bytes: totals, accuracies (fractions, 0..1), the macro mean's interval, a row a file; rows go when they do not fit."""

    def rounded(value: Any) -> Any:
        return round(value, 5) if isinstance(value, float) else value

    interval = (summary.get("ci95") or {}).get("macro")
    accuracy = {k: rounded(summary[k]) for k in ("macro", "micro") if summary.get(k) is not None}
    if interval:
        accuracy["ci95"] = [rounded(v) for v in interval]
    accuracy["files"] = [
        {k: rounded(f[k]) for k in _OF_A_FILE if f.get(k) is not None} for f in summary.get("files") or []
    ]
    answer: dict[str, Any] = {"done": summary.get("done", 0), "total": summary.get("total", 0), "accuracy": accuracy}
    speed = summary.get("requests_per_second")
    if speed is not None:
        answer["requestsPerSecond"] = rounded(float(speed))
    if report:
        answer["report"] = report
    text = orjson.dumps(answer)
    if len(text) > LIMIT:
        del accuracy["files"]
        text = orjson.dumps(answer)
    return text


def leave(summary: Mapping[str, Any]) -> None:
    """Write it to `$EGM_TERMINATION_LOG`, where that is set, with `$EGM_RESULTS` (a URI) as where the results lie.

    Those are there already: that it cannot be written here is no failure.
    """
    log = os.environ.get("EGM_TERMINATION_LOG")
    if log:
        with contextlib.suppress(OSError):
            # a mounted file: it is written to, never replaced
            Path(log).write_bytes(short(summary, os.environ.get("EGM_RESULTS", "")))
