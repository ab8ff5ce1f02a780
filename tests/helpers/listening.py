"""The addresses on which the processes of a run listen, collected while it runs."""

from __future__ import annotations

import os
import subprocess
import threading
import uuid
from collections.abc import Sequence

import psutil

MARK = "EGM_TEST_RUN"


def run_and_listen(command: Sequence[str], pause: float = 0.5) -> dict[str, set[str]]:
    """Run a command; return the addresses on which its processes listened, each with the names of these processes.

    A process belongs to the run if it has the run's mark in its environment, so daemons that leave the process group count too. A
    socket that is open for less than `pause` seconds may be missed. Fails if the command does.
    """
    mark, ended = uuid.uuid4().hex, threading.Event()
    found: dict[str, set[str]] = {}

    def look() -> None:
        while not ended.wait(pause):
            for process in psutil.process_iter():
                try:
                    if process.environ().get(MARK) != mark:
                        continue
                    for each in process.net_connections(kind="inet"):
                        if each.status == psutil.CONN_LISTEN:
                            found.setdefault(each.laddr.ip, set()).add(process.name())
                except psutil.Error:  # it has just ended, or belongs to another user
                    continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        subprocess.run(command, env={**os.environ, MARK: mark}, check=True)
    finally:
        ended.set()
        watcher.join()
    return found
