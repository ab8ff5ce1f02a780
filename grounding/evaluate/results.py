"""Result rows on disk: append-only parts under `results/`. A later row with the same key replaces an earlier one.

One process writes at a time (a lock file says so) and each writes a part of its own, so a crash costs the requests in flight at most.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grounding.errors import UserError
from grounding.evaluate.work import Item
from grounding.files import Appender, complete_lines
from grounding.scoring import Profile


class Reply(NamedTuple):
    """What came back for one question: an answer, or `error` where none came."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float | None = None
    error: str | None = None


class Tally(NamedTuple):
    """What the summary needs of one row. `scoring` is the profile that `iou` and `correct` come from."""

    outcome: str
    iou: float
    correct: bool
    tokens: int | None
    latency_s: float | None
    scoring: str


def outcome_of(parsed: bool, finish_reason: str | None) -> str:
    """ok, unparsed (no box in a finished answer) or truncated (the answer ran into the token limit)."""
    if finish_reason == "length":
        return "truncated"
    return "ok" if parsed else "unparsed"


def score_row(item: Item, reply: Reply, model: str, prompt: str, profile: Profile) -> dict[str, Any]:
    """The row to store, as docs/design.md has it. Boxes are pixels. An error is a row without text, never a wrong answer."""
    e = item.expression
    row: dict[str, Any] = {
        "key": item.key,
        "file": e.file,
        "line": e.line,
        "image": e.image,
        "sent": e.sent,
        "width": e.width,
        "height": e.height,
        "bbox": list(e.bbox),
        "text": reply.text,
        "scaled_bbox": None,
        "iou": None,
        "correct": None,
        "outcome": "error",
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "latency_s": None if reply.latency_s is None else round(reply.latency_s, 6),
        "error": reply.error,
        "model": model,
        "prompt": prompt,
        "scoring": profile.name,
    }
    if reply.error is None:
        scored = profile.score_answer(reply.text, e.bbox, e.width, e.height, "scale")
        row.update(
            scaled_bbox=scored.scaled_bbox,
            iou=scored.iou,
            correct=scored.correct,
            outcome=outcome_of(scored.parsed, reply.finish_reason),
        )
    return row


def tally_of(row: dict[str, Any]) -> Tally:
    """The summary's view of a stored row."""
    return Tally(
        str(row.get("outcome")),
        float(row.get("iou") or 0.0),
        bool(row.get("correct")),
        row.get("completion_tokens"),
        row.get("latency_s"),
        str(row.get("scoring")),
    )


def reply_of(row: dict[str, Any]) -> Reply:
    """The reply a stored row was made from."""
    return Reply(*(row.get(name) for name in Reply._fields))


def read_rows(out: Path) -> Iterator[dict[str, Any]]:
    """Every whole row of every part, oldest first. Later rows replace earlier ones of the same key."""
    for part in sorted((out / "results").glob("part-*.jsonl")):
        for row in complete_lines(part):
            if isinstance(row.get("key"), str):
                yield row


class Results:
    """The results of one folder, opened for writing. `done` maps key -> tally for the keys asked for."""

    def __init__(self, out: Path, wanted: Collection[str]) -> None:
        folder = out / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(
                "another evaluation is writing there", file=out, hint="Wait for it, or choose another --out."
            ) from None
        self.out = out
        self.done: dict[str, Tally] = {r["key"]: tally_of(r) for r in read_rows(out) if r["key"] in wanted}
        numbers = [int(p.stem[5:]) for p in folder.glob("part-*.jsonl") if p.stem[5:].isdigit()]
        self._part = folder / f"part-{max(numbers, default=-1) + 1:05d}.jsonl"
        self._appender: Appender | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. A part comes into being with its first row."""
        if self._appender is None:
            self._appender = Appender(self._part)
        self._appender.write(row)
        self.done[row["key"]] = tally_of(row)

    def close(self) -> None:
        """Sync the part and let the next one in."""
        try:
            if self._appender is not None:
                self._appender.close()
        finally:
            os.close(self._lock)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rescore(results: Results, items: dict[str, Item], profile: Profile, *, everything: bool) -> int:
    """Score stored answers again, without a server: those of another profile, or all. Returns how many changed hands."""
    latest = {r["key"]: r for r in read_rows(results.out) if r["key"] in items}
    count = 0
    for key, row in latest.items():
        if row.get("outcome") == "error" or not (everything or row.get("scoring") != profile.name):
            continue
        results.add(score_row(items[key], reply_of(row), str(row["model"]), str(row["prompt"]), profile))
        count += 1
    return count
