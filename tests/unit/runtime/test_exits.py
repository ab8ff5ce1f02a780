"""The table of exit codes is closed, equals the documentation, and is used by the operator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grounding.errors import Failure, UserError
from grounding.runtime import exits

ROOT = Path(__file__).resolve().parents[3]


def test_errors_end_with_codes_of_the_table() -> None:
    assert UserError.exit_code == exits.MISTAKE
    assert Failure.exit_code == exits.FAILED


@pytest.mark.parametrize(
    ("code", "again"),
    [(1, True), (2, False), (137, True), (143, True), (134, True), (77, True), (None, True), (0, False)],
)
def test_only_a_mistake_is_not_tried_again(code: int | None, again: bool) -> None:
    assert exits.retryable(code) is again


def test_documentation_shows_the_table() -> None:
    text = (ROOT / "docs" / "images.md").read_text()
    shown = {
        int(m[0]): (m[1], m[2] == "yes") for m in re.findall(r"^\| (\d+) \| `(\w+)` \| (yes|no) \|", text, re.MULTILINE)
    }
    assert shown == {e.code: (e.name, e.retry) for e in exits.TABLE.values()}


def test_operator_goes_by_it() -> None:
    from egm_operator.manifests import batch

    assert batch._POLICY["rules"][0]["onExitCodes"]["values"] == exits.final_codes() == [2]  # type: ignore[index]
    plans = (ROOT / "operator" / "egm_operator" / "plan").glob("*.py")
    assert not [p.name for p in plans if re.search(r"\.code == \d", p.read_text())]
