"""Keep the parts of the live page up to date: a thread renders them while a browser requests them, less often if rendering is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grounding.data.images import ImageStore
from grounding.errors import EgmError
from grounding.report import collect, conclusions, page
from grounding.report.gallery import open_pictures, picture_of
from grounding.report.overview import Difference
from grounding.view.gpus import GpuUse, gpus
from grounding.view.watch import Seen, Watch, pulse, rows_of, servers_of

INTERVAL_S = 1.5
OPEN_S = 5.0
"""Seconds since its last request for which a page counts as open; a visible page sends a request every two seconds"""
IDLE_S = 30.0
"""Seconds without a request after which a page is no longer kept up to date"""
QUIET_S = 1.0
"""If a page has sent no request for this many seconds, it counts as having loaded its pictures"""
SHARE = 4
"""Rendering uses at most 1 / (`SHARE` + 1) of one core's time"""
GPU_INTERVAL_S = 5.0
SIDE, LARGE_SIDE = 320, 1600
"""Longer side of a picture in pixels, on the page and when enlarged"""
KEPT = 256
"""Maximum number of pictures in memory"""


@dataclass
class News:
    """The parts that have changed since a revision."""

    revision: int
    parts: dict[str, str]
    pulse: str
    title: str
    runs: list[str]
    """The runs that these parts show"""
    over: bool = False
    """Whether the server is about to stop, so that the page sends no more requests"""


@dataclass
class Shown:
    """The state of the page for one selection of runs: its parts, each with the revision of its last change."""

    parts: dict[str, tuple[int, str]] = field(default_factory=dict)
    revision: int = 0
    pulse: str = "Reading the files."
    title: str = "EGM view"
    digest: tuple[object, ...] | None = None
    asked_at: float = 0.0
    given: bool = False
    """Whether the final state has been sent"""
    difference: tuple[tuple[object, ...], Difference | None] = ((), None)
    said: tuple[tuple[object, ...], tuple[list[str], str]] = ((), ([], ""))

    def put(self, parts: dict[str, str]) -> None:
        """Store the parts that have changed, under a new revision."""
        changed = {name: text for name, text in parts.items() if self.parts.get(name, (0, ""))[1] != text}
        if changed:
            self.revision += 1
            self.parts |= {name: (self.revision, text) for name, text in changed.items()}

    def since(self, revision: int, runs: Sequence[str]) -> News:
        """Return the parts that have changed since a revision. `runs` is the selection."""
        changed = {name: text for name, (at, text) in self.parts.items() if at > revision}
        return News(self.revision, changed, self.pulse, self.title, list(runs))


class Pictures:
    """The pictures that the page may request, by their numbers in this list. No other file can be read."""

    def __init__(self) -> None:
        self._listed: list[tuple[tuple[Path, ...], str]] = []
        self._number: dict[tuple[tuple[Path, ...], str], int] = {}
        self._stores: dict[tuple[Path, ...], ImageStore | None] = {}
        self._kept: dict[tuple[int, int], tuple[str, bytes] | None] = {}
        self._lock = threading.Lock()

    def address(self, e: collect.Evaluation, name: str) -> str:
        """Return the address of an evaluation's picture, relative to the page; empty if the evaluation has no pictures."""
        if not e.images:
            return ""
        key = e.images, name
        with self._lock:
            if key not in self._number:
                self._number[key] = len(self._listed)
                self._listed.append(key)
            return f"picture/{self._number[key]}"

    def read(self, number: int, *, large: bool = False) -> tuple[str, bytes] | None:
        """Return the type and the bytes of a picture; None for an unknown number or a picture that cannot be read."""
        side = LARGE_SIDE if large else SIDE
        with self._lock:
            if not 0 <= number < len(self._listed):
                return None
            images, name = self._listed[number]
            if (number, side) in self._kept:
                return self._kept[number, side]
            if images not in self._stores:
                self._stores[images] = open_pictures(images)
            found = picture_of(self._stores[images], name, side)
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number, side] = found
            return found


class Pages:
    """The pages that browsers are showing, one for each selection of runs."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.pictures = Pictures()
        self.with_gpus = True
        """Whether this machine's GPUs are shown beside running jobs; not for jobs of a cluster"""
        self._watch, self._clock = Watch(root), clock
        self._shown: dict[tuple[str, ...], Shown] = {}
        self._lock = threading.Lock()  # protects `_shown`
        self._watching = threading.Lock()
        self._wanted = threading.Event()
        self._drawn = threading.Condition()
        self._gpus: tuple[float, list[GpuUse]] = (-GPU_INTERVAL_S, [])
        self._stopped, self._over, self._warning = False, "", ""
        self._requested = 0.0

    def runs(self) -> list[str]:
        """Return the names of all runs."""
        return list(self._watch.folders())

    def warn(self, text: str) -> None:
        """Show a sentence beside what is running, such as why the data are old; an empty text removes it."""
        self._warning = text

    def requested(self) -> None:
        """Record that a page has sent a request."""
        self._requested = time.monotonic()

    def chosen(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the named runs, which need not have begun; without names, the default ones, which may change."""
        return tuple(dict.fromkeys(names)) or tuple(self._watch.usual())

    def news(self, names: Sequence[str], revision: int, before: Sequence[str] = (), patience_s: float = 1.0) -> News:
        """Return the page's parts of the runs `names` that have changed since `revision`.

        If the page showed other runs (`before`) at that revision, return all parts. The first request waits up to `patience_s` seconds for
        the first rendering.
        """
        with self._lock:
            shown = self._shown.setdefault(tuple(names), Shown())
            shown.asked_at = self._clock()
        self._wanted.set()
        with self._drawn:
            self._drawn.wait_for(lambda: shown.revision > 0, timeout=patience_s)
        over = self._over  # read this first, so that everything that is read after it is final
        with self._lock:
            found = shown.since(revision if tuple(before) == tuple(names) else 0, names)
        if over:
            found.over, found.pulse = True, f"{found.pulse} {over}"
        return found

    def sent(self, names: Sequence[str], news: News) -> None:
        """Record that a page has received `news`."""
        if news.over:
            with self._drawn:
                self._shown[tuple(names)].given = True
                self._drawn.notify_all()

    def last_look(self, text: str, patience_s: float = 10.0) -> None:
        """Wait at most `patience_s` seconds until all open pages have fetched the final state, with `text`, and then its pictures."""
        now, end = self._clock(), time.monotonic() + patience_s
        watched = [(names, shown) for names, shown in list(self._shown.items()) if now - shown.asked_at <= OPEN_S]
        for names, shown in watched:
            self._refresh(names, shown)
        with self._drawn:
            self._over = text
            self._drawn.wait_for(lambda: all(shown.given for _, shown in watched), timeout=patience_s)
        while watched and time.monotonic() < min(end, self._requested + QUIET_S):
            time.sleep(0.05)

    def frozen(self, names: Sequence[str]) -> collect.Run:
        """Return the selected runs for the static report."""
        with self._watching:
            return self._watch.seen(names).run

    def follow(self) -> None:
        """Until `stop` is called, keep the pages that are being shown up to date."""
        while not self._stopped:
            self._wanted.wait()
            began = self._clock()
            busy = False
            for names, shown in list(self._shown.items()):
                if began - shown.asked_at <= IDLE_S:
                    busy = True
                    self._refresh(names, shown)
            if not busy:
                self._wanted.clear()
                continue
            time.sleep(max(INTERVAL_S, SHARE * (self._clock() - began)))

    def _refresh(self, names: tuple[str, ...], shown: Shown) -> None:
        """Call `draw`, and show on the page if the files cannot be read."""
        try:
            self.draw(names)
        except (OSError, EgmError) as error:  # for example, a folder that was removed while it was read
            shown.pulse = f"The files cannot be read: {error}"

    def stop(self) -> None:
        """Make `follow` return."""
        self._stopped = True
        self._wanted.set()

    def draw(self, names: tuple[str, ...]) -> None:
        """Read the new data of a selection of runs, and render the parts that depend on it."""
        with self._watching:
            seen = self._watch.seen(names)
        shown = self._shown.setdefault(names, Shown())
        parts = {"jobs": self._jobs(seen)}
        if shown.digest != seen.digest:
            parts |= page.sections(seen.run, self._first(seen, shown))
        with self._lock:
            shown.put(parts)
            shown.digest = seen.digest
            shown.pulse, shown.title = f"{pulse(seen)} {self._warning}".strip(), f"{seen.run.name} · EGM view"
        with self._drawn:
            self._drawn.notify_all()

    def _first(self, seen: Seen, shown: Shown) -> page.FirstScreen:
        key: tuple[object, ...] = tuple((e.name, len(e.answers), e.summary.macro) for e in seen.run.evaluations)
        if shown.difference[0] != key:
            shown.difference = key, page.difference_of(seen.run.evaluations)
        sweeps = tuple(seen.finished_sweeps)
        if shown.said[0] != sweeps:
            shown.said = sweeps, conclusions(sweeps)
        said, costs = shown.said[1]
        return page.FirstScreen(self.pictures.address, shown.difference[1], said, seen.newest, costs)

    def _jobs(self, seen: Seen) -> str:
        now = self._clock()
        if self.with_gpus and now - self._gpus[0] >= GPU_INTERVAL_S:
            self._gpus = now, gpus()
        busy = self.with_gpus and any(j.view.phase == "Running" for j in seen.jobs)
        return page.jobs(list(rows_of(seen)), servers_of(seen), self._gpus[1] if busy else [])
