"""Result rows on disk: append-only parts under `results/`. A later row with the same key replaces an earlier one.

One process writes at a time (a lock file says so) and each writes parts of its own, so a crash costs the requests in flight at most. Where a copy is
kept elsewhere (`ship.py`), a part is closed at every interval and sent.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from grounding.data.records import Expression
from grounding.errors import UserError
from grounding.evaluate.ship import Remote
from grounding.evaluate.work import Worklist
from grounding.files import Appender, complete_lines, drop_half_line
from grounding.scoring import Profile


class Reply(NamedTuple):
    """What came back for one question: an answer, or `error` where none came."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float | None = None
    error: str | None = None


OUTCOMES = ("", "ok", "unparsed", "truncated", "error")
"""By number, as columns hold them; 0 stands for a row that was not asked yet."""
ERROR = OUTCOMES.index("error")


class Tallies:
    """What the summary needs of each row, as columns of N entries: N rows of a `Worklist`, answered or not."""

    def __init__(self, rows: int) -> None:
        self.outcome = np.zeros(rows, dtype=np.uint8)
        self.iou = np.zeros(rows)
        self.correct = np.zeros(rows, dtype=bool)
        self.tokens = np.full(rows, -1, dtype=np.int32)
        self.latency_s = np.full(rows, np.nan)
        self.other_scoring = np.zeros(rows, dtype=bool)
        """Scored by another profile than the one wanted"""

    def set(self, number: int, row: dict[str, Any], scoring: str) -> None:
        """Take over a stored row."""
        outcome = row.get("outcome")
        self.outcome[number] = OUTCOMES.index(outcome) if outcome in OUTCOMES else ERROR
        self.iou[number] = row.get("iou") or 0.0
        self.correct[number] = bool(row.get("correct"))
        tokens, latency = row.get("completion_tokens"), row.get("latency_s")
        self.tokens[number] = -1 if tokens is None else tokens
        self.latency_s[number] = np.nan if latency is None else latency
        self.other_scoring[number] = row.get("scoring") != scoring

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Which rows have an answer, right or wrong."""
        answered: NDArray[np.bool_] = (self.outcome > 0) & (self.outcome != ERROR)
        return answered

    def pending(self, *, retry_errors: bool) -> NDArray[np.int64]:
        """Numbers of the rows to ask: those without an answer; failed ones only where that is wished for."""
        open_ = self.outcome == 0
        if retry_errors:
            open_ |= self.outcome == ERROR
        return np.flatnonzero(open_)


def outcome_of(parsed: bool, finish_reason: str | None) -> str:
    """ok, unparsed (no box in a finished answer) or truncated (the answer ran into the token limit)."""
    if finish_reason == "length":
        return "truncated"
    return "ok" if parsed else "unparsed"


def score_row(key: str, e: Expression, reply: Reply, model: str, prompt: str, profile: Profile) -> dict[str, Any]:
    """The row to store, as docs/design.md has it. Boxes are pixels. An error is a row without text, never a wrong answer."""
    row: dict[str, Any] = {
        "key": key,
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
    """The results of one folder, opened for writing. `done` has what is known of each row of `work`."""

    def __init__(self, out: Path, work: Worklist, scoring: str, remote: Remote | None = None) -> None:
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
        self.out, self._work, self._scoring, self.remote = out, work, scoring, remote
        self._appender: Appender | None = None
        self._retired: list[Appender] = []
        self._closing = threading.Lock()  # nobody syncs what another thread has just closed
        try:
            if remote is not None:
                for part in folder.glob("part-*.jsonl"):
                    drop_half_line(part)
                remote.pull()
            self.done = Tallies(len(work))
            for number, row in numbered(read_rows(out), work):
                self.done.set(number, row, scoring)
            known = [p.stem.split("-")[1] for p in folder.glob("part-*.jsonl")]
            self._number = max((int(n) for n in known if n.isdigit()), default=-1) + 1
        except BaseException:
            os.close(self._lock)
            raise

    def _part(self) -> Path:
        ending = f"-{secrets.token_hex(3)}" if self.remote is not None else ""
        return self.out / "results" / f"part-{self._number:05d}{ending}.jsonl"

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Append a row. A part comes into being with its first row."""
        if self._appender is None:
            self._appender = Appender(self._part(), interval=float("inf"))
            self._number += 1
        self._appender.write(row)
        self.done.set(number, row, self._scoring)

    def sync(self) -> None:
        """Force what was added to the disk; slow, and safe to call from another thread."""
        with self._closing:
            appender = self._appender
            if appender is not None and appender not in self._retired:
                appender.sync()

    def roll(self) -> None:
        """Let the next row begin a part; from the thread that adds. `ship` closes and sends the old one."""
        if self._appender is not None:
            self._retired.append(self._appender)
            self._appender = None

    def ship(self, *, patient: bool = False) -> None:
        """Send finished parts to where the copy is kept, if one is; slow, and safe to call from another thread. Raises `Failure`."""
        with self._closing:
            while self._retired:
                self._retired.pop().close()
        if self.remote is not None:
            current = self._appender
            parts = sorted((self.out / "results").glob("part-*.jsonl"))
            self.remote.push([p for p in parts if current is None or p != current.path], patient=patient)

    def close(self) -> None:
        """Sync the parts and let the next one in."""
        try:
            self.roll()
            with self._closing:
                while self._retired:
                    self._retired.pop().close()
        finally:
            os.close(self._lock)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def numbered(rows: Iterable[dict[str, Any]], work: Worklist, block: int = 2000) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in `work`, row) of stored rows, in order; rows that `work` does not ask for are left out."""
    source = iter(rows)
    while some := list(itertools.islice(source, block)):
        for number, row in zip(work.find([r["key"] for r in some]), some, strict=True):
            if number >= 0:
                yield int(number), row


def rescore(results: Results, work: Worklist, profile: Profile, *, everything: bool) -> int:
    """Score stored answers again, without a server: those of another profile, or all. Returns how many rows were written."""
    wanted = results.done.answered & (everything | results.done.other_scoring)
    if not wanted.any():
        return 0
    last = np.full(len(work), -1)  # where the row that counts stands among the stored ones
    for position, (number, _) in enumerate(numbered(read_rows(results.out), work)):
        last[number] = position
    for position, (number, row) in enumerate(numbered(read_rows(results.out), work)):
        if wanted[number] and last[number] == position:
            e, reply = work.expression(number), reply_of(row)
            results.add(number, score_row(row["key"], e, reply, str(row["model"]), str(row["prompt"]), profile))
    return int(wanted.sum())
