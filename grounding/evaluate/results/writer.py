"""Write result rows to disk, in append-only parts under `results/`. A later row with the same key replaces an earlier one.

A lock file ensures that only one process writes at a time. Each process writes its own parts, so a crash loses at most the requests in
flight. If the results have a copy in a store (`replica.py`), a part is closed at every interval and uploaded.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from grounding.data.records import Expression
from grounding.errors import UserError
from grounding.evaluate.method import END
from grounding.evaluate.reply import FINISHED, LARGEST_COUNT, READING, Reply, answer_text, count
from grounding.evaluate.results import extents, samples
from grounding.evaluate.results.replica import Remote
from grounding.evaluate.results.row import ResultRow
from grounding.evaluate.served import LONGEST, UNKNOWN, ServedModel
from grounding.evaluate.worklist import Worklist
from grounding.files import Appender, complete_lines, drop_half_line
from grounding.jsontypes import JsonObject
from grounding.scoring import Profile
from grounding.scoring.doctor import examine

OUTCOMES = ("", "ok", "unparsed", "truncated", "error", "empty")
"""Outcomes by their number in columns; 0 is a row that has not been asked yet. An empty answer has no text at all; it counts as wrong."""
ERROR = OUTCOMES.index("error")


_TRIES = re.compile(r" \(after \d+ tries\)$")


class Tallies:
    """The values of each row that the summary needs, as columns with one entry per row of the `Worklist`."""

    def __init__(self, rows: int) -> None:
        self.outcome = np.zeros(rows, dtype=np.uint8)
        self.iou = np.zeros(rows)
        self.correct = np.zeros(rows, dtype=bool)
        self.tokens = np.full(rows, -1, dtype=np.int32)
        self.thought = np.full(rows, -1, dtype=np.int32)
        """Number of these tokens that belong to the thought"""
        self.prompt = np.full(rows, -1, dtype=np.int32)
        self.size = np.zeros((rows, 2), dtype=np.int32)
        """Width and height of the picture as stored"""
        self.latency_s = np.full(rows, np.nan)
        self.lag_s = np.full(rows, np.nan)
        """Largest lag of the process that measured the latency"""
        self.in_flight = np.zeros(rows, dtype=np.int32)
        """Number of requests in flight when the answer came"""
        self.other_scoring = np.zeros(rows, dtype=bool)
        """Whether the row was scored by a profile other than the wanted one, or read by another version"""
        self.from_reasoning = np.zeros(rows, dtype=bool)
        """Whether the answer was read from the thought, because there was no other text"""
        self.thought_again = np.zeros(rows, dtype=bool)
        """Whether an answer to the question contains the end of a further thought"""
        self.samples = samples.Samples(rows)
        """Boxes and verdicts of all answers, if there are several for a question"""
        self.extents = extents.Extents(rows)
        """Scores by both true boxes, if the files have two"""
        self.findings = np.zeros(rows, dtype=np.uint32)
        """Bits from `scoring.doctor.examine`; 0 for rows of release 0.1, which do not have them"""
        self.served = np.zeros(rows, dtype=np.uint16)
        self.served_models = {UNKNOWN: 0}
        """The models that answered, with their numbers; `served` has the number of each row's model"""
        self.limit = np.zeros(rows, dtype=np.int32)
        """Token limit with which a truncated answer was asked again; 0: the evaluation's own limit"""
        self.problems: dict[int, str] = {}
        """Reason why a row is an error"""
        self.endings: dict[int, str] = {}
        """The finish reason of an error row that the server aborted"""
        self.rests: dict[int, str] = {}
        """Texts with unknown names in an empty answer's reply"""
        self.repairable = np.zeros(rows, dtype=bool)
        """Error rows whose reply counts as complete in this version of reading"""

    def set(self, number: int, row: ResultRow, scoring: str) -> None:
        """Set the values of row `number` from a stored row."""
        name = row.get("outcome")
        outcome = OUTCOMES.index(name) if name in OUTCOMES else ERROR
        self.outcome[number] = outcome
        self.iou[number] = row.get("iou") or 0.0
        self.correct[number] = bool(row.get("correct"))
        tokens, latency = row.get("completion_tokens"), row.get("latency_s")
        self.tokens[number] = -1 if tokens is None else tokens
        thought, prompt = row.get("reasoning_tokens"), row.get("prompt_tokens")
        self.thought[number] = -1 if thought is None else thought
        self.prompt[number] = -1 if prompt is None else prompt
        self.size[number, 0] = row.get("width") or 0
        self.size[number, 1] = row.get("height") or 0
        self.latency_s[number] = np.nan if latency is None else latency
        lag = row.get("loop_lag_s")
        self.lag_s[number] = np.nan if lag is None else lag
        self.in_flight[number] = row.get("in_flight") or 0
        self.other_scoring[number] = row.get("scoring") != scoring or row.get("reading") not in (None, READING)
        self.findings[number] = row.get("findings") or 0
        if "samples" in row:
            self.samples.set(number, row)
        self.extents.set(number, row)
        self.served[number] = self._model(_said(row))
        self.limit[number] = row.get("max_tokens") or 0
        if self.problems or self.rests:
            for reasons in (self.problems, self.endings, self.rests):
                reasons.pop(number, None)
        if rest := row.get("rest"):
            self.rests[number] = rest
        repairable = False
        if outcome == ERROR:
            self.problems[number] = _TRIES.sub("", str(row.get("error") or "no reason was stored"))
            if (ending := row.get("finish_reason")) is not None:
                self.endings[number] = ending
                repairable = ending in FINISHED and row.get("partial") is not None
        self.repairable[number] = repairable
        self.thought_again[number] = any(END in (s.get("text") or "") for s in row.get("samples") or (row,))
        self.from_reasoning[number] = bool(row.get("reasoning")) and not (row.get("text") or "").strip()

    def _model(self, said: tuple[str | None, ...]) -> int:
        """Return the number of the model with these facts, which are in the order of `ServedModel`."""
        known = self.served_models.get(said)  # type: ignore[call-overload]  # a tuple is the same key
        if known is None:
            known = 0 if len(self.served_models) >= 2**16 - 1 else len(self.served_models)
            if known:
                self.served_models[ServedModel(*said)] = known
        return int(known)

    def served_by(self) -> dict[ServedModel, int]:
        """Return the number of answers by model, the largest first. Answers without information on their model are left out."""
        found: dict[ServedModel, int] = {}
        for model, n in self._counted():  # the engine's release is not part of the model's identity
            if (bare := model._replace(version=None)) != UNKNOWN:
                found[bare] = found.get(bare, 0) + n
        return dict(sorted(found.items(), key=lambda item: (-item[1], str(item[0]))))

    def releases(self) -> list[str]:
        """Return the releases of the engine that gave the answers."""
        return sorted({model.version for model, _ in self._counted() if model.version is not None})

    def _counted(self) -> list[tuple[ServedModel, int]]:
        counts = np.bincount(self.served[self.answered], minlength=len(self.served_models))
        return [(model, int(counts[i])) for model, i in self.served_models.items() if i and counts[i]]

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Return which rows have an answer, right or wrong."""
        answered: NDArray[np.bool_] = (self.outcome > 0) & (self.outcome != ERROR)
        return answered

    def truncated(self, limit: int) -> NDArray[np.int64]:
        """Return the numbers of the rows that reached a limit of fewer than `limit` tokens."""
        return np.flatnonzero((self.outcome == OUTCOMES.index("truncated")) & (self.limit < limit))

    def pending(self, *, retry_errors: bool) -> NDArray[np.int64]:
        """Return the numbers of the rows to ask: those without an answer; failed ones only on request."""
        open_ = self.outcome == 0
        if retry_errors:
            open_ |= self.outcome == ERROR
        return np.flatnonzero(open_)


def _said(row: ResultRow) -> tuple[str | None, ...]:
    """Return a row's facts about the model that answered, in the order of `ServedModel`."""
    return (
        row.get("served_model"),
        row.get("served_id"),
        row.get("served_path"),
        row.get("weight_version"),
        row.get("served_version"),
    )


def outcome_of(parsed: bool, finish_reason: str | None, text: str) -> str:
    """Return `ok`, `unparsed` (a finished answer has no box), `truncated` (the answer reached the token limit) or `empty` (no text at all)."""
    if finish_reason == "length":
        return "truncated"
    if not text.strip():
        return "empty"
    return "ok" if parsed else "unparsed"


def score_row(
    key: str, e: Expression, reply: Reply, model: str, prompt: str, profile: Profile, settings: str = ""
) -> ResultRow:
    """Return the row to store, in the format of docs/design.md. Boxes are in pixels. An error becomes a row without text, never a wrong
    answer.
    """
    row: ResultRow = {
        "key": key,
        "file": e.file,
        "line": e.line,
        "image": e.image,
        "sent": e.sent,
        "width": e.width,
        "height": e.height,
        "bbox": list(e.bbox),
        "text": reply.text,
        "reasoning": reply.reasoning,
        "scaled_bbox": None,
        "iou": None,
        "correct": None,
        "outcome": "error",
        "finish_reason": reply.finish_reason,
        "partial": reply.partial,
        "rest": reply.rest,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "reasoning_tokens": reply.reasoning_tokens,
        "latency_s": None if reply.latency_s is None else round(reply.latency_s, 6),
        "loop_lag_s": None,
        "in_flight": None,
        "error": reply.error,
        "model": model,
        "served_model": reply.served_model,
        "served_id": reply.served_id,
        "served_path": reply.served_path,
        "weight_version": reply.weight_version,
        "served_version": reply.served_version,
        "prompt": prompt,
        "scoring": profile.name,
        "settings": settings,
        "evaluation": None,
        "max_tokens": None,
        "reading": READING,
        "findings": None,
    }
    if reply.samples:
        reply = samples.choose(
            row,
            reply,
            [profile.score_answer(answer_text(s), e.bbox, e.width, e.height, "scale") for s in reply.samples],
        )
    if e.visible is not None:
        extents.score(row, e, answer_text(reply) if reply.error is None else None, profile)
    if reply.error is None:
        text = answer_text(reply)
        scored = profile.score_answer(text, e.bbox, e.width, e.height, "scale")
        row["scaled_bbox"], row["iou"], row["correct"] = scored.scaled_bbox, scored.iou, scored.correct
        row["outcome"] = outcome_of(scored.parsed, reply.finish_reason, text)
        row["findings"] = examine(
            text, e.bbox, e.width, e.height, scored.iou, profile.space, after=profile.after_thinking
        )
    return row


def reply_of(row: ResultRow) -> Reply:
    """Return the reply from which a stored row was made."""
    return Reply(
        text=row.get("text"),
        finish_reason=row.get("finish_reason"),
        prompt_tokens=row.get("prompt_tokens"),
        completion_tokens=row.get("completion_tokens"),
        latency_s=row.get("latency_s"),
        error=row.get("error"),
        reasoning=row.get("reasoning"),
        reasoning_tokens=row.get("reasoning_tokens"),
        served_model=row.get("served_model"),
        served_id=row.get("served_id"),
        served_path=row.get("served_path"),
        weight_version=row.get("weight_version"),
        served_version=row.get("served_version"),
        samples=samples.answers_of(row),
        rest=row.get("rest"),
        partial=row.get("partial"),
    )


def read_rows(out: Path, *, own: bool = False) -> Iterator[ResultRow]:
    """Yield every complete row of every part, oldest first. The caller lets later rows replace earlier ones with the same key.

    Rows may come from other releases or may have been edited, so they are checked: an impossible count or time becomes None. A row without
    a key, or whose box, IoU or text has the wrong type, is left out, so that its question is asked again. With `own`, this process has
    written all rows, and nothing is checked.
    """
    for part in sorted((out / "results").glob("part-*.jsonl")):
        rows = complete_lines(part)
        yield from (cast(ResultRow, row) for row in rows) if own else sound_rows(rows)


def sound_rows(rows: Iterable[JsonObject]) -> Iterator[ResultRow]:
    """Yield the rows that are valid, with impossible counts and times set to None."""
    for row in rows:
        if _sound(row):
            yield cast(ResultRow, row)


def stored_lines(out: Path) -> Iterator[bytes]:
    """Yield the stored lines of every part, oldest first. Reading of a part stops at a line that a crash has truncated."""
    for part in sorted((out / "results").glob("part-*.jsonl")):
        with part.open("rb") as f:
            yield from itertools.takewhile(lambda line: line.endswith(b"\n"), f)


_OF_THE_SERVER = ("served_model", "served_id", "served_path", "weight_version", "served_version")
_TEXTS = (
    "text",
    "partial",
    "rest",
    "reasoning",
    "error",
    "finish_reason",
    "model",
    *_OF_THE_SERVER,
    "prompt",
    "scoring",
    "settings",
    "evaluation",
    "sent",
    "image",
    "file",
)
LONGEST_S = 1e9
"""Latency in seconds above which a row is checked in detail"""
_COUNTS = (
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "line",
    "width",
    "height",
    "reading",
    "findings",
    "max_tokens",
    "in_flight",
)


def _sound(row: JsonObject) -> bool:
    """Return whether the fields of a stored row have the right types. Impossible counts and times are set to None."""
    get = row.get  # every row that is read passes here, so valid rows must be checked quickly
    for name in _COUNTS:
        value = get(name)
        if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
            row[name] = count(value)
    for name in ("latency_s", "loop_lag_s"):
        seconds = get(name)
        if type(seconds) is not float or not 0 <= seconds < LONGEST_S:
            row[name] = seconds if seconds is not None and is_number(seconds) and seconds >= 0 else None
    for name in _TEXTS:
        text = get(name)
        if text is not None and type(text) is not str:
            return False
    for name in _OF_THE_SERVER:
        text = row.setdefault(name, None)
        if text is not None and len(text) > LONGEST:
            row[name] = text[:LONGEST]
    iou = row.setdefault("iou", None)
    return (
        type(get("key")) is str
        and (iou is None or (is_number(iou) and 0 <= iou <= 1))
        and samples.is_box(get("bbox"))
        and samples.is_box(get("scaled_bbox"))
        and samples.sound(row)
        and extents.sound(row)
    )


is_number = samples.is_number


class Results:
    """The results of a folder, opened for writing. `done` has the state of each row of `worklist`."""

    def __init__(self, out: Path, worklist: Worklist, scoring: str, remote: Remote | None = None) -> None:
        folder = out / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(
                "another evaluation is writing to this folder", file=out, hint="Wait for it, or choose another --out."
            ) from None
        self.out, self._worklist, self._scoring, self.remote = out, worklist, scoring, remote
        self._appender: Appender | None = None
        self._retired: list[Appender] = []
        self._closing = threading.Lock()  # so that no thread syncs a file that another has just closed
        try:
            if remote is not None:
                for part in folder.glob("part-*.jsonl"):
                    drop_half_line(part)
                remote.pull()
            self.done = Tallies(len(worklist))
            self.last = np.full(len(worklist), -1, dtype=np.int64)
            """For each row of `worklist`, the position of the stored line that counts, among all lines for rows of `worklist`"""
            self._lines = 0
            for number, row in numbered(read_rows(out), worklist):
                self._set(number, row)
            self.own = not any(part.stat().st_size for part in folder.glob("part-*.jsonl"))
            """Whether this process has written all rows of the folder"""
            known = [p.stem.split("-")[1] for p in folder.glob("part-*.jsonl")]
            self._number = max((int(n) for n in known if n.isdigit()), default=-1) + 1
        except BaseException:
            os.close(self._lock)
            raise

    def _part(self) -> Path:
        ending = f"-{secrets.token_hex(3)}" if self.remote is not None else ""
        return self.out / "results" / f"part-{self._number:05d}{ending}.jsonl"

    def add(self, number: int, row: ResultRow) -> None:
        """Append a row. The first row creates the part."""
        if self._appender is None:
            self._appender = Appender(self._part(), interval=float("inf"))
            self._number += 1
        self._appender.write(row)
        self._set(number, row)

    def _set(self, number: int, row: ResultRow) -> None:
        self.done.set(number, row, self._scoring)
        self.last[number] = self._lines
        self._lines += 1

    def sync(self) -> None:
        """Sync the added rows to the disk. This is slow and may be called from another thread."""
        with self._closing:
            appender = self._appender
            if appender is not None and appender not in self._retired:
                appender.sync()

    def roll(self) -> None:
        """Let the next row begin a new part; `replicate` closes and uploads the old one. Call it from the thread that calls `add`."""
        if self._appender is not None:
            self._retired.append(self._appender)
            self._appender = None

    def replicate(self, *, patient: bool = False) -> None:
        """Upload finished parts to the copy, if there is one. This is slow and may be called from another thread. Raises `Failure`."""
        with self._closing:
            while self._retired:
                self._retired.pop().close()
        if self.remote is not None:
            current = self._appender
            parts = sorted((self.out / "results").glob("part-*.jsonl"))
            self.remote.push([p for p in parts if current is None or p != current.path], patient=patient)

    def close(self) -> None:
        """Sync the parts and release the lock."""
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


def numbered(rows: Iterable[ResultRow], worklist: Worklist, block: int = 2000) -> Iterator[tuple[int, ResultRow]]:
    """Yield (number in `worklist`, row) for the stored rows that are in `worklist`, in order."""
    source = iter(rows)
    while some := list(itertools.islice(source, block)):
        for number, row in zip(worklist.find([r["key"] for r in some]), some, strict=True):
            if number >= 0:
                yield int(number), row


def rescore(results: Results, worklist: Worklist, profile: Profile, *, everything: bool) -> int:
    """Score stored answers again without a server: those scored by another profile, or all. Return the number of rows written.

    An error row becomes an answer if this version accepts its reply as one.
    """
    done = results.done
    wanted = done.answered & (everything | done.other_scoring) | done.repairable
    if not wanted.any():
        return 0
    last = results.last.copy()
    for position, (number, row) in enumerate(numbered(read_rows(results.out), worklist)):
        if wanted[number] and last[number] == position:
            e, reply = worklist.expression(number), reply_of(row)
            if done.repairable[number]:
                reply = reply._replace(text=reply.partial, partial=None, error=None)
            settings = str(row.get("settings") or "")
            again = score_row(row["key"], e, reply, str(row["model"]), str(row["prompt"]), profile, settings)
            # these are not part of a reply
            again["evaluation"], again["max_tokens"] = (row.get("evaluation"), row.get("max_tokens"))
            again["loop_lag_s"], again["in_flight"] = row.get("loop_lag_s"), row.get("in_flight")
            results.add(number, again)
    return int(wanted.sum())
