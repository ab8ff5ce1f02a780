"""Published figures beside ours: each has a source, and neither chance nor a part of a file gives a good verdict."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.evaluate.published import MACRO, PER_FILE, expressions, find, judge, of_model, published, reproduce
from grounding.evaluate.results.reader import Answers, read_answers
from grounding.evaluate.summary import file_order
from grounding.report import build


def answers(folder: Path, acc: dict[str, float], counts: dict[str, int]) -> Answers:
    """Return an evaluation of EGM-8B with these accuracies and two expressions per picture."""
    rows = []
    for name, n in counts.items():
        right = round(acc[name] * n)
        for i in range(n):
            rows.append({
                "key": f"{name}{i}", "file": name, "line": i + 1, "image": f"{name}/{i // 2}.jpg", "sent": f"s{i}",
                "width": 9, "height": 9, "bbox": [1.0, 1.0, 5.0, 5.0], "text": "t", "scaled_bbox": [1.0, 1.0, 5.0, 5.0],
                "iou": 0.9, "correct": i * right // n != (i + 1) * right // n, "outcome": "ok", "model": "models/EGM-8B",
                "prompt": "qwen3", "scoring": "egm-eval", "completion_tokens": 9,
            })  # fmt: skip
    (folder / "results").mkdir(parents=True)
    (folder / "results/part-00000.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
    return read_answers(folder)


def test_the_data_has_sources_and_the_means_of_the_paper() -> None:
    for paper in published().values():
        assert paper.url.startswith("https://") and paper.title
        assert set(paper.acc) == set(expressions()) and all(0.5 < a < 1 for a in paper.acc.values())
    assert sum(expressions().values()) == 57_457
    means = {"EGM-4B": 91.05, "EGM-8B": 91.38, "Qwen3-VL-235B-Instruct": 90.5, "Qwen3-VL-8B-Thinking": 87.8}
    for name, mean in means.items():
        assert 100 * find(name).macro == pytest.approx(mean, abs=0.051)
    assert list(find("egm-8b").acc) == file_order(list(find("EGM-8B").acc))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"(?s)EGM-9B.*Did you mean EGM-.*Qwen3-VL-235B-Instruct"):
        find("EGM-9B")
    for model in ("EGM-8B", "JamesZGQ/EGM-8B", "/models/egm-8b/"):
        assert of_model(model) is find("EGM-8B")
    assert of_model("") is None and of_model("my-model") is None


def test_a_verdict_is_by_the_tolerance_then_by_our_interval() -> None:
    assert judge(0.935, (0.93, 0.94), 0.939, PER_FILE, whole=True) == "reproduced"
    assert judge(0.934, (0.934, 0.934), 0.939, PER_FILE, whole=True) == "reproduced", (
        "a difference of exactly the tolerance is within it"
    )
    assert judge(0.93, (0.92, 0.9345), 0.939, PER_FILE, whole=True) == "undecided"
    assert judge(0.93, (0.925, 0.9335), 0.939, PER_FILE, whole=True) == "not reproduced"
    assert judge(0.95, (0.945, 0.955), 0.939, PER_FILE, whole=True) == "not reproduced", (
        "a result that is better than published is not reproduced either"
    )
    assert judge(0.939, (0.93, 0.94), 0.939, PER_FILE, whole=False) == "not comparable"
    assert judge(None, None, 0.939, MACRO, whole=True) == "not comparable"


def test_eight_whole_files(tmp_path: Path) -> None:
    paper = find("EGM-8B")
    same = reproduce(answers(tmp_path / "same", paper.acc, expressions()), paper)
    assert same.verdict == "reproduced" and same.macro.ours == pytest.approx(paper.macro, abs=1e-4)
    worse = reproduce(answers(tmp_path / "worse", {f: a - 0.05 for f, a in paper.acc.items()}, expressions()), paper)
    assert worse.verdict == "not reproduced" and {line.verdict for line in worse.files} == {"not reproduced"}
    line = worse.files[0]
    assert line.ci95 is not None and line.ours is not None and line.ci95[0] < line.ours < line.ci95[1]


def test_a_part_is_not_judged(tmp_path: Path, capsys: Any) -> None:
    few = {"refcoco_val": 40}
    found = reproduce(answers(tmp_path / "a", {"refcoco_val": 0.925}, few), find("EGM-8B"))
    assert found.verdict == "not comparable" and found.macro.ours is None
    assert "refcoco_val: 40 of 10,834" in found.notes[0]
    assert egm(["compare", str(tmp_path / "a"), "--paper", "EGM-8B", "--json"]) == 1
    printed = capsys.readouterr()
    assert orjson.loads(printed.out)["verdict"] == "not comparable" and "cannot be judged" in printed.err
    assert egm(["compare", str(tmp_path / "a"), "--paper", "nothing"]) == 2
    assert egm(["compare", str(tmp_path / "a")]) == 2
    assert egm(["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--paper", "EGM-8B"]) == 2


def test_the_report_has_the_table(tmp_path: Path) -> None:
    answers(tmp_path / "run", dict.fromkeys(expressions(), 0.9), dict.fromkeys(expressions(), 20))
    build(tmp_path / "run", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Comparison with the published figures" in page and "93.9" in page and "github.com/zgq1879/EGM" in page


def test_the_interval_of_one_file_holds_its_accuracy(tmp_path: Path) -> None:
    found = reproduce(answers(tmp_path / "a", {"refcoco_val": 0.3}, {"refcoco_val": 60}), find("EGM-4B")).files[0]
    assert found.ci95 is not None and np.diff(found.ci95) > 0.05


def test_figures_of_the_user_s_own_need_a_source(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "mine.json"
    good: dict[str, Any] = {
        "name": "Other-8B",
        "url": "https://example.org/card",
        "acc": {"refcoco_val": 90.0, "refcoco_testA": 92},
    }
    file.write_bytes(orjson.dumps(good))
    found = find(str(file))
    assert (found.name, found.title, found.acc) == ("Other-8B", "Other-8B", {"refcoco_val": 0.9, "refcoco_testA": 0.92})
    answers(tmp_path / "e", {"refcoco_val": 0.9, "refcoco_testA": 0.92}, {"refcoco_val": 10, "refcoco_testA": 10})
    assert egm(["compare", str(tmp_path / "e"), "--paper", str(file)]) == 1
    assert "Other-8B" in capsys.readouterr().out
    for change, words in (
        ({"url": ""}, "url: expected a text, because a figure needs its source"),
        ({"acc": {"refcoco_val": 0.9}}, "acc.refcoco_val: expected per cent, found 0.9"),
        ({"acc": {"coco": 90}}, "acc: coco is not one of refcoco_val"),
        ({"acc": {}}, "acc: expected the accuracy of each file"),
    ):
        file.write_bytes(orjson.dumps(good | change))
        with pytest.raises(UserError) as caught:
            find(str(file))
        assert words in str(caught.value)
