"""Custom scoring: mistakes are found before any question is asked, and rows name the version of the file."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.scoring import get_profile, own_profile

GOOD = '''
import re

def read_box(answer, width, height):
    """Corners in per cent, as <loc>1 2 3 4</loc>."""
    found = re.search(r"<loc>([0-9. ]+)</loc>", answer)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(v) / 100 for v in found[1].split())
    return [x1 * width, y1 * height, x2 * width, y2 * height]
'''


def _file(folder: Path, text: str = GOOD) -> Path:
    file = folder / "mine.py"
    file.write_text(text)
    own_profile.of_file.cache_clear()
    own_profile.own_function.load.cache_clear()
    return file


def test_the_box_is_the_user_s_and_the_verdict_ours(tmp_path: Path) -> None:
    profile = get_profile(str(_file(tmp_path)))
    assert profile.name.startswith("mine.py:read_box@") and len(profile.name) == len("mine.py:read_box@") + 8
    right = profile.score_answer("I see <loc>10 10 50 60</loc>", [64.0, 48.0, 320.0, 288.0], 640, 480, "scale")
    assert right == ([64.0, 48.0, 320.0, 288.0], 1.0, True, True)
    assert profile.score_answer("no", [1, 1, 2, 2], 640, 480, "scale") == (None, 0.0, False, False)
    assert profile.score_answer(None, [1, 1, 2, 2], 640, 480, "scale").parsed is False
    other = get_profile(str(_file(tmp_path, GOOD + "# changed\n")))
    assert other.name != profile.name


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("def read_box(:\n", 1, "not valid Python"),
        ("def other(a, b, c):\n    pass\n", 0, "has no function read_box"),
        ("def read_box(answer):\n    pass\n", 1, "cannot be called with 3"),
        ("async def read_box(a, b, c):\n    pass\n", 1, "is async"),
        ("def read_box(a, b, c):\n    return 1 / 0 if '[' in a else None\n", 2, "failed for the answer"),
        ("def read_box(a, b, c):\n    return [1, 2, 3]\n", 0, "which is not a box"),
        ("def read_box(a, b, c):\n    return 'left'\n", 0, "which is not a box"),
        ("def read_box(a, b, c):\n    return [1, 2, 3, float('nan')]\n", 0, "not finite"),
        ("def read_box(a, b, c):\n    return [1, 2, 3, 4] if a else a[0]\n", 2, "failed for the answer ''"),
    ],
)
def test_mistakes_are_found_at_once(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        get_profile(str(_file(tmp_path, text)))
    assert caught.value.file == str(tmp_path / "mine.py") and (not line or caught.value.line == line)


def test_what_is_no_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        get_profile(str(tmp_path / "absent.py"))
    with pytest.raises(
        UserError, match=r"(?s)the user's own profile mine.py:read_box@12345678.*--scoring mine.py:read_box"
    ):
        get_profile("mine.py:read_box@12345678")
    with pytest.raises(UserError, match=r"FILE.py for your own profile"):
        get_profile("nonsense")


def test_answers_are_scored_by_a_file(tmp_path: Path) -> None:
    row = {"text": "<loc>10 10 50 60</loc>", "bbox": [64, 48, 320, 288], "width": 640, "height": 480}
    (tmp_path / "a.jsonl").write_bytes(orjson.dumps(row) + b"\n")
    words = [
        "score",
        "--profile",
        f"{_file(tmp_path)}:read_box",
        str(tmp_path / "a.jsonl"),
        "-o",
        str(tmp_path / "b.jsonl"),
    ]
    assert egm(words) == 0
    assert orjson.loads((tmp_path / "b.jsonl").read_bytes())["correct"] is True


JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: e}
spec:
  model: {source: "tiny://"}
  engine: transformers
  scoringFile: FILE
  data: {shapes: {}}
"""


def test_a_job_is_refused_before_its_servers_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, job = _file(tmp_path), tmp_path / "job.yaml"
    job.write_text(JOB.replace("FILE", str(file)))
    assert egm(["validate", "-f", str(job)]) == 0
    _file(tmp_path, "def read_box(answer):\n    pass\n")
    assert egm(["validate", "-f", str(job)]) == 2
    assert "cannot be called with 3 arguments" in capsys.readouterr().err
    _file(tmp_path, "def read_box(a, b, c):\n    return 1 / 0\n")
    assert egm(["validate", "-f", str(job)]) == 0, "expected exit code 0: `egm validate` must not run the user's file"
    assert egm(["role", "prepare", "--job", str(job), "--data", str(tmp_path / "data")]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    job.write_text(JOB.replace("FILE", str(file)) + "  boxRemap: keep\n")
    assert egm(["validate", "-f", str(job)]) == 2
    assert "leave scoring and boxRemap out" in capsys.readouterr().err
