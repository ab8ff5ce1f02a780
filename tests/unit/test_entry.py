"""Ctrl-C while `egm` starts and while it exits."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

PRESS = "import os, signal; press = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
START = "from grounding.entry import main; sys.argv = ['egm', '--version']; main()"


def started(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", f"import sys\n{PRESS}{code}"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, **more)  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_during_the_imports_ends_the_command_in_one_line() -> None:
    press = "class Press:\n    def find_spec(self, name, *_):\n        if name == 'typer': press()\n"
    done = started(f"{press}sys.meta_path.insert(0, Press())\n{START}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_during_the_exit_prints_nothing() -> None:
    done = started(f"import atexit; atexit.register(press)\n{START}")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_background_job_of_a_shell_keeps_ignoring_ctrl_c() -> None:
    press = "import atexit; atexit.register(press)\n"
    done = started(press + START, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_the_installed_commands_start_here() -> None:
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"egm": "grounding.entry:main", "kubectl-egm": "grounding.entry:main"}
