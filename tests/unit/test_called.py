from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grounding import called


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a program `egm` in an environment below the current folder, which is not on PATH."""
    path = tmp_path / ".venv" / "bin" / "egm"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return path


@pytest.mark.parametrize("absolute", [True, False])
def test_a_program_below_the_current_folder_is_named_by_its_path(
    program: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    monkeypatch.setattr(sys, "argv", [str(program) if absolute else ".venv/bin/egm", "run"])
    assert called.command() == ".venv/bin/egm"


def test_a_program_in_the_current_folder_is_named_so_that_the_shell_finds_it(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program.parent)
    monkeypatch.setattr(sys, "argv", ["./egm", "run"])
    assert called.command() == "./egm"


def test_a_program_on_path_is_named_by_its_name_and_another_one_of_that_name_is_not(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "egm"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", f"{program.parent}:{other.parent}")
    assert called.command() == "egm"
    monkeypatch.setenv("PATH", f"{other.parent}:{program.parent}")
    assert called.command() == ".venv/bin/egm"


def test_a_program_elsewhere_is_named_by_its_whole_path_as_one_word(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a place"
    program.parent.rename(place)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", [str(place / "egm")])
    assert called.command() == f"'{place}/egm'"


def test_the_plug_in_and_the_module_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-egm"])
    assert called.command() == "kubectl egm"
    monkeypatch.setattr(sys, "argv", ["/x/grounding/cli/__main__.py"])
    assert called.command() == "egm"


def test_the_installed_programs_print_commands_that_their_user_can_paste(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    for name, word in (("egm", str(folder / "egm")), ("kubectl-egm", "kubectl egm")):
        done = subprocess.run(
            [folder / name, "get"], cwd=tmp_path, env=os.environ | {"PATH": "/bin"}, capture_output=True, text=True
        )
        assert done.stderr == f"No runs in runs. Start one with: {word} run -f jobs/demo.yaml\n"
