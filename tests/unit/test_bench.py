"""`make bench`: each result has the machine, the load and the commit; a failed comparison leaves no result of an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from by_path import module

ROOT = Path(__file__).resolve().parents[2]
bench = module(ROOT / "bench" / "side_by_side.py")


def test_the_programs_of_the_comparisons_exist() -> None:
    assert [words[0] for words in bench.COMPARISONS.values() if not (ROOT / words[0]).exists()] == []


def test_a_result_is_read_from_the_output_or_from_the_file_that_the_command_writes(tmp_path: Path) -> None:
    prints, writes = tmp_path / "prints.py", tmp_path / "writes.py"
    prints.write_text("print('{\"ratio\": 2.5}')")
    writes.write_text('import sys; print("progress"); open(sys.argv[1], "w").write(\'{"ratio": 3.5}\')')
    assert bench.measured("a", [str(prints)], tmp_path / "a.json") == ""
    assert bench.measured("b", [str(writes), "{out}"], tmp_path / "b.json") == ""
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"}
    assert [found[name]["result"]["ratio"] for name in "ab"] == [2.5, 3.5]
    for one in found.values():
        assert one["load"]["before"] >= 0 and one["began"] > "2026" and one["machine"]["cores"] >= 1
    assert not list(tmp_path.glob("*.part"))


def test_a_failed_comparison_is_named_and_leaves_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{}")
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "COMPARISONS", {"bad": (str(broken),)})
    assert bench.main(["--out", str(tmp_path)]) == 1
    assert "error: bad failed" in capsys.readouterr().err and not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("pass", "expected JSON, found no output"),
        ("for i in range(9): print('line', i)", "which ends with:\n  line 4\n  line 5\n  line 6\n  line 7\n  line 8\n"),
        ("import sys; sys.stdout.buffer.write(b'{\\xff')", "which ends with:\n  {\ufffd\n"),
        ("import sys; open(sys.argv[1], 'w').write('{\"a\": ')", 'which ends with:\n  {"a": \n'),
    ],
)
def test_a_comparison_without_json_is_named_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, says: str
) -> None:
    (tmp_path / "odd.json").write_text("{}")
    (tmp_path / "odd.py").write_text(program)
    monkeypatch.setattr(bench, "COMPARISONS", {"odd": (str(tmp_path / "odd.py"), "{out}")})
    assert bench.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "odd: 0 s, failed: expected JSON" in shown.out and says in shown.out
    assert "error: odd failed" in shown.err
    assert not (tmp_path / "odd.json").exists() and not (tmp_path / "odd.part").exists()
