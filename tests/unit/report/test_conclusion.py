"""The end of a finished run on the terminal: the sentence, the table of the files, and commands that work when they are pasted."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import orjson
import pytest
import samples
from rich.console import Console

from grounding.local.command import Order, next_commands
from grounding.local.scheduler import ModelSource, PlannedJob
from grounding.report import conclude, page, table, text_of
from grounding.report.collect import collect


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return samples.run(tmp_path / "runs" / "demo", samples.pictures(tmp_path / "pictures of cats"))


def text(run_dir: Path) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(conclude(run_dir)))
    out: str = console.file.getvalue()  # type: ignore[attr-defined]
    return out


def test_the_sentence_is_that_of_the_page(run_dir: Path) -> None:
    found = conclude(run_dir).sentence
    assert found.startswith("after is better than before: 70.0 % against 40.0 % of 30 questions")
    assert found in text_of(collect(run_dir))


def test_the_table_has_a_row_for_each_file_and_for_the_means(run_dir: Path) -> None:
    rows = [line.split("  ") for line in text(run_dir).splitlines()[2:]]
    cells = [[c.strip() for c in row if c.strip()] for row in rows]
    assert [c[0] for c in cells][-2:] == ["macro mean", "micro mean"] and len(cells) == len(samples.FILES) + 2
    assert all(c[1:] == ["40.0", "70.0", "+30.0"] for c in cells)


def test_the_difference_is_rounded_as_in_the_sentence(tmp_path: Path) -> None:
    images = samples.pictures(tmp_path / "pictures")
    for name, macro in (("before", 0.85), ("after", 0.8875)):
        folder = samples.evaluation(tmp_path / "demo" / name, images, 5)
        summary = orjson.loads((folder / "summary.json").read_bytes())
        (folder / "summary.json").write_bytes(orjson.dumps(summary | {"macro": macro}))
    (tmp_path / "demo" / "run.json").write_bytes(orjson.dumps({"jobs": ["before", "after"]}))
    assert re.search(r"macro mean +85.0 +88.8 +\+3.8 ", text(tmp_path / "demo"))


def test_a_note_of_all_evaluations_is_on_the_page_once_and_others_name_theirs() -> None:
    notes = [("a", "Synthetic."), ("a", "Cut off."), ("b", "Synthetic.")]
    assert page._joined(notes, 2) == ["Synthetic.", "a: Cut off."]
    assert page._joined(notes, 3) == ["a, b: Synthetic.", "a: Cut off."]


def test_one_evaluation_has_no_difference_and_a_training_alone_has_no_table(tmp_path: Path) -> None:
    images = samples.pictures(tmp_path / "pictures")
    one = samples.evaluation(tmp_path / "one" / "only", images, 5).parent
    assert "difference" not in text(one) and "50.0" in text(one)
    assert conclude(one).sentence.startswith("only points at the right object in 50.0 % of 30 answers")


def job(name: str, engine: str, upstream: str = "") -> PlannedJob:
    return PlannedJob(name, "", {"spec": {"engine": engine}}, lambda _: [], (ModelSource(upstream),))


def commands(order: Order, works: list[PlannedJob], run_dir: Path) -> list[list[str]]:
    head, *lines = next_commands(order, works, conclude(run_dir)).splitlines()
    assert head == "Next:"
    return [shlex.split(line) for line in lines]


def test_the_next_commands_ask_the_evaluated_model_one_of_its_questions(run_dir: Path, tmp_path: Path) -> None:
    works = [job("before", "transformers", "sft"), job("rl", ""), job("after", "transformers", "rl")]
    found = commands(Order(Path("demo.yaml"), run_dir.parent), works, run_dir)
    picture = tmp_path / "pictures of cats" / "0.png"
    assert found == [
        ["egm", "view", str(run_dir.parent)],
        ["egm", "ask", "--model", str(run_dir / "rl" / "model"), "--", str(picture), "the red circle 0 "],
        ["egm", "logs", "after", "--runs", str(run_dir.parent)],
    ]


@pytest.mark.parametrize(
    "works",
    [[job("before", "sglang", "sft"), job("after", "sglang", "rl")], [job("after", "transformers")], [job("x", "")]],
    ids=["a model on GPUs", "a model from elsewhere", "another manifest"],
)
def test_only_a_model_that_this_machine_has_trained_and_can_serve_is_asked(
    works: list[PlannedJob], run_dir: Path
) -> None:
    assert [c[1] for c in commands(Order(Path("demo.yaml"), run_dir.parent), works, run_dir)] == ["view", "logs"]
