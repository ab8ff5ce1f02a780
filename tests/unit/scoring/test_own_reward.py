"""Custom rewards: each mistake is found before the run, with file and line, and the figures beside the reward do not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.scoring import own_reward
from grounding.train.rl.reward import compute_score

GOOD = "def mine(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str) / 10\n"
INFO = {"width": 100, "height": 100, "split": "train"}
TRUTH = [100, 100, 300, 300]
RIGHT = '[{"bbox_2d": [100, 100, 300, 300]}]'


def _file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "own.py"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "def mine(*all):\n    return 1\n",
        "def mine(a, b, c, d, e=1, **more):\n    return {'score': 1}\n",
        "import math\n\ndef mine(data_source, solution_str, ground_truth, extra_info):\n    return math.pi\n",
    ],
)
def test_a_function_of_the_right_form_passes(tmp_path: Path, text: str) -> None:
    file = _file(tmp_path, text)
    own_reward.inspect(file, "mine")
    own_reward.try_on(file, "mine", "grounding", TRUTH, INFO)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("def mine(:\n", 1, "not valid Python"),
        ("x = 1\ndef other(a, b, c, d):\n    pass\n", 0, "has no function mine"),
        ("\nasync def mine(a, b, c, d):\n    pass\n", 2, "is async"),
        ("def mine(answer):\n    return 1\n", 1, "cannot be called with 4"),
        ("def mine(a, b, c, d, e):\n    return 1\n", 1, "cannot be called with 4"),
        ("def mine(a, b, c, d, *, alpha):\n    return 1\n", 1, "cannot be called with 4"),
        ("class A:\n    def mine(a, b, c, d):\n        return 1\n", 0, "has no function mine"),
    ],
)
def test_a_mistake_is_found_without_running_the_file(tmp_path: Path, text: str, line: int, words: str) -> None:
    file = _file(tmp_path, text + "\nraise SystemExit('it was run')\n" if "(:" not in text else text)
    with pytest.raises(UserError, match=words) as caught:
        own_reward.inspect(file, "mine")
    assert (caught.value.file, caught.value.line) == (str(file), line)


@pytest.mark.parametrize(
    ("body", "line", "words"),
    [
        ("    x = {}\n    return x['no']\n", 3, "KeyError"),
        ("    return None\n", 0, "has no score"),
        ("    return float('nan')\n", 0, "not a finite number"),
        ("    return {'reward': 1}\n", 0, "has no score"),
        ("    return 1 if 'bbox' in b else 1 / 0\n", 2, "I cannot see it"),
    ],
)
def test_a_function_that_fails_is_found_by_one_try(tmp_path: Path, body: str, line: int, words: str) -> None:
    file = _file(tmp_path, f"def mine(a, b, c, d):\n{body}")
    with pytest.raises(UserError, match=words) as caught:
        own_reward.try_on(file, "mine", "grounding", TRUTH, INFO)
    assert (caught.value.file, caught.value.line) == (str(file), line)


def test_the_score_is_the_user_s_and_the_figures_are_ours(tmp_path: Path) -> None:
    own = {"own_file": str(_file(tmp_path, GOOD)), "own_name": "mine"}
    found = compute_score("grounding", RIGHT, TRUTH, INFO, **own)
    assert found == {"score": len(RIGHT) / 10, "acc": 1.0, "iou": 1.0, "parsed": 1.0, "length": float(len(RIGHT))}
    plain = compute_score("grounding", RIGHT, TRUTH, INFO)
    assert found.keys() == plain.keys(), "expected the same keys for every answer, because verl requires it"
    lost = compute_score("grounding", "nothing", TRUTH, INFO, **own)
    assert (lost["score"], lost["parsed"], lost["acc"]) == (0.7, 0.0, 0.0)
    tested = compute_score("grounding", RIGHT, TRUTH, {**INFO, "split": "test"}, **own)
    assert tested["score"] == 1.0


def test_an_answer_for_which_it_fails_counts_nothing(tmp_path: Path) -> None:
    file = _file(tmp_path, "def mine(a, b, c, d):\n    raise RuntimeError('no')\n")
    assert compute_score("grounding", RIGHT, TRUTH, INFO, own_file=str(file), own_name="mine")["score"] == 0.0


MANIFEST = """apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: a}
spec:
  preset: tiny-rl
  data: {shapes: {train: 16}}
  reward:
    file: FILE
    entryPoint: mine
"""


def test_validate_and_preparation_read_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, file = tmp_path / "job.yaml", _file(tmp_path, GOOD)
    job.write_text(MANIFEST.replace("FILE", str(file)))
    assert egm(["validate", "-f", str(job)]) == 0
    file.write_text("def other(a, b, c, d):\n    return 1\n")
    assert egm(["validate", "-f", str(job)]) == 2
    assert f"{job}:8: spec.reward.file: {file}: has no function mine" in capsys.readouterr().err
    assert egm(["role", "prepare", "--job", str(job), "--data", str(tmp_path / "data")]) == 2
    assert "has no function mine" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reward",
    [
        "{entryPoint: mine}",
        "{file: /r.py, alpha: 0.7}",
        "{file: /r.py, type: sigmoid}",
        "{file: /r.py, entryPoint: a-b}",
    ],
)
def test_fields_without_effect_are_refused(tmp_path: Path, reward: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(MANIFEST.split("  reward:")[0] + f"  reward: {reward}\n")
    assert egm(["validate", "-f", str(job)]) == 2
