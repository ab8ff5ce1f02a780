"""Processes with a mark in their environment are found and ended in any session; others are not touched."""

import os
import subprocess
import sys
import time
import uuid

from grounding.local.process import TOKEN
from grounding.runtime import processes

SLEEP = "import time; time.sleep(60)"
CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True); {SLEEP}"


def marked(token: str) -> list[int]:
    return processes.marked(TOKEN, token)


def test_every_process_with_the_token_is_killed_and_no_other() -> None:
    token, other = uuid.uuid4().hex, uuid.uuid4().hex
    mine = subprocess.Popen([sys.executable, "-c", CHILD], env={**os.environ, TOKEN: token})
    foreign = subprocess.Popen([sys.executable, "-c", SLEEP], env={**os.environ, TOKEN: other})
    try:
        deadline = time.monotonic() + 30
        while len(marked(token)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes.kill(lambda: marked(token)) == 2
        assert not marked(token) and foreign.poll() is None and foreign.pid in marked(other)
        assert mine.wait(10) == -9
    finally:
        processes.kill(lambda: marked(other))
        foreign.wait(10)
