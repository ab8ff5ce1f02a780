"""Answers about a picture are never reported for another picture of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grounding.cli import main
from grounding.evaluate.results.replica import PICTURES, Remote

RIGHT = '[{"bbox_2d": [100, 100, 500, 600]}]'
ANSWER = {"model": "m", "choices": [{"message": {"role": "assistant", "content": RIGHT}, "finish_reason": "stop"}]}


def _draw(path: Path, colour: int) -> None:
    Image.new("RGB", (100, 80), (colour, 10, 10)).save(path, format="PNG")


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return int(ended.value.code or 0), capsys.readouterr().err


def test_swapped_pictures_are_refused_and_one_that_had_no_answer_may_be_repaired(
    dataset: Path, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    words = ["eval", "--files", str(dataset / "refcoco_val.jsonl"), "--images", str(dataset / "images"), "--model", "m"]
    words += ["--endpoint", server.url, "--out", out]
    failing = {"thing 5", "thing 11", "thing 17", "thing 23"}  # the four questions of picture 5

    def plan(_: int, asked: dict[str, Any]) -> Any:
        text = asked["messages"][0]["content"][1]["text"]
        return 400 if any(f"{name}," in text for name in failing) else ANSWER

    server.plan = plan
    assert _run(capsys, *words)[0] == 1
    assert len(json.loads((Path(out) / "pictures.json").read_text())) == 6

    _draw(dataset / "images/5.jpg", 222)  # repaired
    failing.clear()
    assert _run(capsys, *words, "--retry-errors")[0] == 0

    before = (dataset / "images/2.jpg").read_bytes()
    _draw(dataset / "images/2.jpg", 223)
    code, said = _run(capsys, *words)
    assert code == 2 and "has answers for other pictures: 1 of 6 have changed, such as 2.jpg" in said
    (dataset / "images/2.jpg").write_bytes(before)
    more = [w.replace("refcoco_val", "refcoco+_testA") for w in words]
    assert _run(capsys, *more)[0] == 0, (
        "expected exit code 0: further rows about the same pictures are only asked in addition"
    )


def test_a_pod_on_another_node_knows_the_pictures_that_were_asked_about(tmp_path: Path) -> None:
    one, two, store = tmp_path / "one", tmp_path / "two", str(tmp_path / "store")
    (one / "results").mkdir(parents=True)
    (one / PICTURES).write_text('{"a.jpg": "1"}')
    Remote(one, store).push([])
    two.mkdir()
    Remote(two, store).pull()
    assert (two / PICTURES).read_text() == '{"a.jpg": "1"}'
