import hashlib
import io
import re
from pathlib import Path

import numpy as np
import orjson
import pytest
from PIL import Image

from grounding.data.records import last_reference, read_expressions
from grounding.data.shapes import COLOURS, EIGHT_FILES, ShapeSet, draw, generate, scenes
from grounding.errors import UserError

SMALL = ShapeSet(seed=3, train=20, per_file=5, size=64)


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, spec in (("a", SMALL), ("b", SMALL), ("c", ShapeSet(seed=4, train=20, per_file=5, size=64))):
        assert generate(tmp_path / name, spec)
    a, b, c = (tree(tmp_path / n) for n in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert a["images/train/000000.png"] != c["images/train/000000.png"]


def test_the_drawn_pixels_fill_the_box_exactly() -> None:
    for scene in scenes(SMALL, "pixels", 40, 1, (0,)):
        (shape,) = scene.shapes
        pixels = np.asarray(Image.open(io.BytesIO(draw(SMALL, scene.shapes))))
        ys, xs = np.nonzero((pixels != 255).any(axis=2))
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == shape.box
        assert (
            tuple(pixels[(shape.box[1] + shape.box[3]) // 2, (shape.box[0] + shape.box[2]) // 2])
            == COLOURS[shape.colour]
        )


def test_rows_agree_with_each_other(tmp_path: Path) -> None:
    generate(tmp_path / "set", SMALL)
    sft = orjson.loads((tmp_path / "set/train_data/sft.json").read_bytes())
    rl = orjson.loads((tmp_path / "set/train_data/rl.json").read_bytes())
    assert len(sft) == len(rl) == 20
    for s, r in zip(sft, rl, strict=True):
        human, gpt = (t["value"] for t in s["conversations"])
        assert human == f"<image>\nLocate {r['sent']}, output its bbox coordinates using JSON format"
        assert last_reference([r["conversations"][0]["value"]]) == r["sent"]
        (item,) = orjson.loads(gpt)
        assert r["conversations"][1]["value"] == f"<box>{item['bbox_2d']}</box>"
        assert s["image"] == r["image"]


def test_long_answers_have_the_reference_form(tmp_path: Path) -> None:
    generate(tmp_path / "set", ShapeSet(seed=1, train=3, per_file=1, size=64, reasoning=True))
    for row in orjson.loads((tmp_path / "set/train_data/sft.json").read_bytes()):
        human, gpt = (t["value"] for t in row["conversations"])
        assert human.endswith("JSON format.")
        match = re.fullmatch(r"[^\n]+\n</think>\n\n```json\n(.*)\n```", gpt)
        assert match and orjson.loads(match[1])[0].keys() == {"bbox_2d", "label"}


def test_evaluation_files_hold_two_expressions_a_picture_and_no_training_picture(tmp_path: Path) -> None:
    generate(tmp_path / "set", SMALL)
    train = {p.read_bytes() for p in (tmp_path / "set/images/train").iterdir()}
    for stem in EIGHT_FILES:
        rows = list(read_expressions(tmp_path / f"set/eval_data/{stem}.jsonl"))
        assert len(rows) == 5
        assert len({r.image for r in rows}) == 3
        assert len({(r.image, r.sent) for r in rows}) == 5
        assert not train & {(tmp_path / "set/images" / r.image).read_bytes() for r in rows}


def test_several_shapes_never_overlap_and_differ() -> None:
    spec = ShapeSet(train=1, shapes_per_image=3)
    for scene in scenes(spec, "many", 60, 2, (0, 1)):
        kinds = [(s.colour, s.name) for s in scene.shapes]
        assert 1 <= len(set(kinds)) == len(kinds) <= 3
        for i, a in enumerate(scene.shapes):
            for b in scene.shapes[:i]:
                assert a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]


def test_again_is_a_no_op_and_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert generate(out, SMALL)
    assert not generate(out, SMALL)
    with pytest.raises(UserError, match="not empty"):
        generate(out, ShapeSet(seed=9, train=2, per_file=1, size=64))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        generate(tmp_path / "other", SMALL)
    assert (tmp_path / "other/precious.txt").exists()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", SMALL, stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"train": 0}, {"per_file": 0}, {"size": 8}, {"shapes_per_image": 13}])
def test_impossible_sets_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(UserError):
        generate(tmp_path / "set", ShapeSet(**bad))


@pytest.mark.parametrize("name", ["mine.txt", "images/train/mine.png"])
def test_a_damaged_set_is_made_again_but_never_over_a_file_that_is_not_of_it(tmp_path: Path, name: str) -> None:
    out = tmp_path / "set"
    generate(out, SMALL)
    before, row_file = tree(out), out / "train_data" / "rl.json"
    row_file.write_bytes(b"")
    (out / name).write_bytes(b"precious")
    with pytest.raises(UserError, match=rf"a file that is not part of it \({name}\)"):
        generate(out, SMALL)
    assert (out / name).read_bytes() == b"precious"
    (out / name).unlink()
    assert generate(out, SMALL) and tree(out) == before
