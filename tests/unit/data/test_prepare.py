from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grounding.data.lint import lint
from grounding.data.prepare import Prepared, prepare, set_of
from grounding.data.problems import box_problem
from grounding.data.records import Expression
from grounding.errors import UserError

QWEN3 = "<image>\nLocate {}, output its bbox coordinates using JSON format"


def training(number: int, **change: Any) -> dict[str, Any]:
    question = f"<image>\nPlease find <ref>dog {number}</ref>"
    box = [10, 20, 300 + number, 400]
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"<box>{box}</box>"}]
    row = {"id": number, "image": f"train/{number % 7}.png", "sent": f"dog {number}", "conversations": turns}
    return {k: v for k, v in {**row, **change}.items() if v is not None}


def question(number: int, **change: Any) -> dict[str, Any]:
    row = {"image": f"/eval/{number % 5}.png", "sent": f"cat {number}", "bbox": [1.5, 2, 30 + number, 40]}
    return {**row, "width": 80, "height": 60, **change}


class Place:
    """A small data set on the disk, which the tests damage."""

    def __init__(self, root: Path) -> None:
        self.root, self.images, self.out = root, root / "images", root / "out"
        self.train, self.eval_a, self.eval_b = root / "rl.json", root / "refcoco_val.jsonl", root / "refcocog_val.jsonl"
        for sub, count in (("train", 7), ("eval", 5)):
            (self.images / sub).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (80, 60), (i, 9, 9)).save(self.images / sub / f"{i}.png")
        self.write([training(i) for i in range(30)], [question(i) for i in range(25)])

    def write(self, rows: list[Any], questions: list[Any]) -> None:
        self.train.write_bytes(orjson.dumps(rows))
        for path in (self.eval_a, self.eval_b):
            path.write_bytes(b"".join(orjson.dumps(q) + b"\n" for q in questions))

    def prepare(self, **options: Any) -> Prepared:
        out = options.pop("out", self.out)
        return prepare([self.train], [self.eval_a, self.eval_b], [self.images], out, **options)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return pq.read_table(self.out / f"{name}.parquet").to_pylist()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_rows_have_the_form_verl_reads(place: Place) -> None:
    result = place.prepare()
    assert (result.train, result.validation, result.left_out, result.problems) == (30, 4, 0, [])
    train, val = place.rows("train"), place.rows("val")
    assert train[3] == {
        "data_source": "grounding",
        "prompt": [{"role": "user", "content": QWEN3.format("dog 3")}],
        "images": [str(place.images / "train/3.png")],
        "ability": "grounding",
        "reward_model": {"style": "rule", "ground_truth": [10, 20, 303, 400]},
        "extra_info": {
            "split": "train",
            "index": 3,
            "id": "3",
            "height": 60,
            "width": 80,
            "question": QWEN3.format("dog 3"),
        },
    }
    for row in val:
        number = row["extra_info"]["index"]
        assert row["prompt"][0]["content"] == QWEN3.format(f"cat {number}")
        assert row["reward_model"]["ground_truth"] == [
            1.5 * 1000 / 80,
            2 * 1000 / 60,
            (30 + number) * 1000 / 80,
            40 * 1000 / 60,
        ]
        assert row["extra_info"]["split"] == "test" and row["extra_info"]["question"] == f"cat {number}"


def test_the_sample_is_the_one_the_reference_takes(place: Place) -> None:
    place.prepare(fraction=0.2, seed=42)
    taken = np.random.default_rng(42).permutation(25)[:5]  # as `datasets` does for shuffle(seed=42).select(range(k))
    both = [f"{stem}:{i + 1}" for stem in ("refcoco_val", "refcocog_val") for i in taken]
    expected = [both[i] for i in np.random.default_rng(42).permutation(10)]
    assert [r["extra_info"]["id"] for r in place.rows("val")] == expected


def test_the_same_bytes_whatever_the_workers(place: Place) -> None:
    for workers in (1, 7):
        place.prepare(out=place.root / str(workers), workers=workers)
    for name in ("train.parquet", "val.parquet", "problems.jsonl"):
        assert (place.root / "1" / name).read_bytes() == (place.root / "7" / name).read_bytes()


def test_a_row_without_sent_asks_what_its_conversation_asks(place: Place) -> None:
    place.write([training(1, sent=None)], [question(1)])
    place.prepare(prompt="grounding")
    assert place.rows("train")[0]["prompt"][0]["content"] == "<image>\nPlease find <ref>dog 1</ref>"
    own = [
        {"from": "human", "value": "<image>\nWhere is the dog?"},
        {"from": "gpt", "value": "<box>[1, 2, 3, 4]</box>"},
    ]
    place.write([training(1, sent=None, conversations=own)], [question(1)])
    place.prepare()
    assert place.rows("train")[0]["prompt"][0]["content"] == "<image>\nWhere is the dog?"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("qwen3", "Locate dog 1, output"), ("qwen3_amodal", "Locate dog 1 amodally, output")],
)
def test_the_words_of_internvl_become_those_of_qwen(place: Place, prompt: str, words: str) -> None:
    """The published raw rows have no `sent`; their expression is in `<ref>` of a question in InternVL's wording."""
    place.write([training(1, sent=None)], [question(1)])
    place.prepare(prompt=prompt)
    content = place.rows("train")[0]["prompt"][0]["content"]
    assert content.startswith(f"<image>\n{words}") and "<ref>" not in content


def test_a_pictures_archive_is_copied_out_for_the_trainer(place: Place) -> None:
    import tarfile

    with tarfile.open(place.root / "coco.tar", "w") as tar:
        tar.add(place.images, ".")
    prepare([place.train], [], [place.root / "coco.tar"], place.out)
    path = Path(place.rows("train")[0]["images"][0])
    assert path.is_absolute() and path.read_bytes() == (place.images / "train/0.png").read_bytes()
    assert not (place.out / "val.parquet").exists()


BAD_ROWS = [
    (training(0, image="train/none.png"), "missing-image"),
    (training(1, width=81, height=60), "size-mismatch"),
    (training(2, sent="the <image> on the wall"), "placeholder"),
    (training(2, sent=" \t"), "broken-row"),
    (training(3, conversations=[{"from": "human", "value": "x"}]), "broken-row"),
    (training(4, conversations=[{"value": "q"}, {"value": "<box>[5, 5, 5, 9]</box>"}]), "empty-box"),
    ("no object", "broken-row"),
]


@pytest.mark.parametrize(("row", "kind"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_an_error_unless_allowed(place: Place, row: Any, kind: str) -> None:
    place.write([training(5), row, training(6)], [question(1)])
    with pytest.raises(UserError, match=f"1 rows cannot be used, 0 are allowed:\n.*rl.json:2: {kind}"):
        place.prepare()
    assert not (place.out / "train.parquet").exists()
    (line,) = (place.out / "problems.jsonl").read_bytes().splitlines()
    assert orjson.loads(line)["kind"] == kind and orjson.loads(line)["row"] == 2
    result = place.prepare(max_missing=1)
    assert (result.train, result.left_out) == (2, 1)
    assert [r["extra_info"]["id"] for r in place.rows("train")] == ["5", "6"]


def test_warnings_are_listed_and_keep_their_rows(place: Place) -> None:
    place.write([training(1), training(1)], [question(1, bbox=[-1, 0, 40, 40])])
    result = place.prepare()
    assert result.train == 2 and result.validation == 2
    assert sorted(p.kind for p in result.problems) == ["box-outside", "box-outside", "duplicate"]


def test_nothing_left_and_wrong_options_are_errors(place: Place) -> None:
    with pytest.raises(UserError, match="share"):
        place.prepare(fraction=0)
    with pytest.raises(UserError, match="nothing to prepare"):
        prepare([], [], [place.images], place.out)
    with pytest.raises(UserError, match="prompt"):
        place.prepare(prompt="nonsense")
    place.write([training(1, image="x.png")], [question(1)])
    with pytest.raises(UserError, match="no usable row"):
        place.prepare(max_missing=9)


def test_lint_finds_the_same_and_orders_by_file_and_row(place: Place) -> None:
    place.write([r for r, _ in BAD_ROWS] + [training(6)], [question(1), question(2, width=70), {"sent": "x"}])
    rows, problems = lint([place.train, place.eval_a], [place.images], workers=3)
    assert rows == 11
    assert [(Path(p.file).name, p.row, p.kind) for p in problems] == [
        ("rl.json", i + 1, kind) for i, (_, kind) in enumerate(BAD_ROWS)
    ] + [("refcoco_val.jsonl", 2, "size-mismatch"), ("refcoco_val.jsonl", 3, "broken-row")]


def test_broken_and_empty_files_are_named(place: Place) -> None:
    place.train.write_text("[]")
    with pytest.raises(UserError, match="no rows"):
        lint([place.train], [place.images], 1)
    place.train.write_text("[1,")
    with pytest.raises(UserError, match=r"rl\.json:1: not valid JSON"):
        lint([place.train], [place.images], 1)


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ((0, 0, 10, 10), None),
        ((0, 0, 10.5, 10), "box-outside"),
        ((-0.1, 0, 5, 5), "box-outside"),
        ((5, 5, 5, 9), "empty-box"),
        ((6, 5, 5, 9), "empty-box"),
        ((10, 0, 12, 9), "empty-box"),
    ],
)
def test_boxes(box: tuple[float, float, float, float], kind: str | None) -> None:
    found = box_problem(box, 10, 10)
    assert (found and found[0]) == kind


def test_an_expression_is_not_changed_by_being_hashed() -> None:
    e = Expression("f", 1, "i", "s", (1, 2, 3, 4), 5, 6)
    assert e == Expression("f", 1, "i", "s", (1, 2, 3, 4), 5, 6)


def test_the_header_of_a_picture_is_read_once_and_rows_do_not_pile_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds at most one row group for any number of rows, and each picture's header is read only once."""
    import gc
    from collections import Counter

    from grounding.data import prepare as module
    from grounding.data.images import ImageStore
    from grounding.data.records import TrainingRow

    asked: Counter[str] = Counter()
    look = ImageStore.look
    monkeypatch.setattr(ImageStore, "look", lambda store, name, **how: asked.update([name]) or look(store, name, **how))
    alive: list[int] = []
    rows = iter(range(12_000))

    def watch(_: int) -> None:
        if next(rows) % 3000 == 0:
            alive.append(sum(type(o) is TrainingRow for o in gc.get_objects()))

    with place.train.with_suffix(".jsonl").open("wb") as f:
        for i in range(12_000):
            f.write(orjson.dumps(training(i % 600, sent=f"dog {i}")) + b"\n")
    module.prepare([place.train.with_suffix(".jsonl")], [], [place.images], place.out, advance=watch)
    assert set(asked.values()) == {1} and len(asked) == 7
    assert len(alive) == 4 and 0 < max(alive) <= 4096 + 2
    assert pq.ParquetFile(place.out / "train.parquet").metadata.num_row_groups == 2


def test_rows_of_named_validation_sets_have_a_source_of_their_own(place: Place) -> None:
    place.prepare(sets=("val", "cocog"), fraction=0.2)
    sources = [row["data_source"] for row in place.rows("val")]
    assert {source: sources.count(source) for source in sources} == {"grounding:val": 5, "grounding:cocog": 5}
    assert {row["data_source"] for row in place.rows("train")} == {"grounding"}
    assert [set_of(source) for source in ("grounding", "grounding:val", "refcoco")] == ["", "val", "refcoco"]


def test_a_mixture_takes_each_row_as_often_as_its_file_s_weight_says(place: Place) -> None:
    other = place.root / "other.json"
    other.write_bytes(orjson.dumps([training(i + 100) for i in range(20)]))
    for out in ("a", "b"):
        found = prepare([place.train, other], [], [place.images], place.root / out, weights=[2, 0.25])
        assert found.train == 65
    rows = pq.read_table(place.root / "a" / "train.parquet").to_pylist()
    ids = [row["extra_info"]["id"] for row in rows]
    assert all(ids.count(str(n)) == 2 for n in range(30)) and sum(int(i) >= 100 for i in ids) == 5
    assert [row["extra_info"]["index"] for row in rows] == list(range(65))
    assert (place.root / "a/train.parquet").read_bytes() == (place.root / "b/train.parquet").read_bytes()


def test_a_question_with_more_words_than_the_job_has_tokens_is_an_error(place: Place) -> None:
    place.write([training(0), training(1, sent="the cat " * 200)], [question(0)])
    place.prepare(longest=400, fraction=1)
    with pytest.raises(UserError, match="400 words, and promptLength is 300"):
        place.prepare(longest=300)
