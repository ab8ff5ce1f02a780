"""Background processes with pid files: each is started once and stopped exactly. Linux only (/proc).

A pid file contains the pid and the process's start time, so that another process to which the kernel has given the same pid is never
signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class Trouble(Exception):
    """An error for the user, printed without a traceback."""


def _stat(pid: int) -> tuple[str, str] | None:
    """Return state letter and start time (with the boot's id) of a process; None if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], f"{boot}/{fields[19]}"


class Processes:
    """The processes of one run folder: `pids/NAME.json`, `logs/NAME.log`."""

    def __init__(self, run: Path) -> None:
        self.pids, self.logs = run / "pids", run / "logs"

    def alive(self, name: str) -> int | None:
        """Return the pid of a process if it is the one that was started and still runs; else None."""
        try:
            saved = json.loads((self.pids / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        now = _stat(saved["pid"])
        # a zombie has ended: process 1 of a container does not always reap
        return saved["pid"] if now and now[0] != "Z" and now[1] == saved["started"] else None

    def start(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        """Start a program in its own session, unless it runs."""
        if self.alive(name):
            return
        for folder in (self.pids, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                list(map(str, argv)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=cwd,
                env={**os.environ, **(env or {})},
            )
        found = _stat(child.pid)
        saved = {
            "pid": child.pid,
            "started": found[1] if found else "",
            "argv": list(map(str, argv)),
            "env": dict(env or {}),
            "cwd": str(cwd) if cwd else None,
        }
        part = self.pids / f"{name}.part"
        part.write_text(json.dumps(saved))
        part.rename(self.pids / f"{name}.json")

    def stop(self, name: str, grace: float = 10.0) -> None:
        """Send SIGTERM, then SIGKILL after `grace` seconds, and return when the process has ended."""
        deadline = time.monotonic() + grace
        sent = False
        while pid := self.alive(name):
            try:
                if not sent:
                    os.kill(pid, signal.SIGTERM)
                    sent = True
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        (self.pids / f"{name}.json").unlink(missing_ok=True)

    def restart(self, name: str) -> None:
        """Stop a program and start it again with the same command."""
        try:
            saved = json.loads((self.pids / f"{name}.json").read_text())
        except FileNotFoundError:
            raise Trouble(f"no program {name!r} was started here; started: {', '.join(self.names())}") from None
        self.stop(name)
        self.start(name, saved["argv"], saved["env"], Path(saved["cwd"]) if saved["cwd"] else None)

    def names(self) -> list[str]:
        """Return every process that was started, in order of start."""
        return [p.stem for p in sorted(self.pids.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)]

    def wait(self, what: str, check: Callable[[], bool], seconds: float, *needed: str) -> None:
        """Wait until `check` returns True. Raises `Trouble` with the end of the log if a needed process ends or the time is over."""
        deadline = time.monotonic() + seconds
        while not check():
            dead = next((n for n in needed if not self.alive(n)), None)
            if dead or time.monotonic() > deadline:
                why = f"{dead} has died" if dead else f"gave up waiting for {what} after {seconds:.0f} s"
                name = dead or (needed[0] if needed else "")
                log = self.logs / f"{name}.log"
                tail = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
                raise Trouble("\n".join([why, *(f"  {line[:300]}" for line in tail), f"Logs: {self.logs}"]))
            time.sleep(0.1)
