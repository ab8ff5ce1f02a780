"""The reason for verl's end, as it passes from verl's processes to the role."""

from __future__ import annotations

from pathlib import Path

import pytest

from grounding.errors import EgmError, Failure, UserError
from grounding.runtime.environment import PROBLEM
from grounding.train.rl import problem


@pytest.mark.parametrize(
    "error",
    [
        UserError("would call os.system when it is loaded", file="/out/rank_1.pt", hint="Nothing was loaded."),
        Failure("its content does not match the marker", file="s3://b/j/checkpoints/global_step_2/rank_1.pt"),
    ],
)
def test_the_role_reads_the_error_that_was_written(tmp_path: Path, error: EgmError) -> None:
    problem.write(tmp_path / "stop", error)
    found = problem.read(tmp_path / "stop")
    assert type(found) is type(error) and str(found) == str(error)
    problem.forget(tmp_path / "stop")
    problem.forget(tmp_path / "stop")
    assert problem.read(tmp_path / "stop") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"user": true}', "no space is left"])
def test_an_incomplete_report_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / PROBLEM).write_text(text)
    assert problem.read(tmp_path / "stop") is None
    problem.write(tmp_path / "missing" / "stop", Failure("no space is left"))
