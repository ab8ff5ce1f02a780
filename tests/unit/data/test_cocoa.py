"""The import of COCO-amodal annotations: both boxes of each object, in both formats, and masks in COCO's text encoding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from grounding.cli import run as egm
from grounding.data.cocoa import mask_box
from grounding.data.importers import recognise
from grounding.data.lint import lint
from grounding.data.records import read_expressions
from grounding.errors import UserError

# written by pycocotools 2.0, with the boxes that numpy found in the pixels
MASKS = [
    ({"size": [5, 4], "counts": "d0"}, None),
    ({"size": [5, 4], "counts": "0d0"}, (0, 0, 4, 5)),
    ({"size": [100, 97], "counts": "RT72R3000000000000000n^1"}, (72, 98, 81, 100)),
    ({"size": [59, 24], "counts": "bc0g0T10000000000000000000000000"}, (10, 36, 24, 59)),
    ({"size": [164, 14], "counts": "b7U1o3000000000000000000a1_N0=C"}, (1, 78, 14, 164)),
    ({"size": [145, 59], "counts": "f\\2;V400000000000000000gY4c1fdK0bN"}, (16, 46, 59, 145)),
    ({"size": [3, 4], "counts": [4, 1, 2, 1, 4]}, (1, 1, 3, 2)),
]


@pytest.mark.parametrize(("mask", "box"), MASKS)
def test_the_box_of_a_mask(mask: dict[str, Any], box: tuple[int, ...] | None) -> None:
    assert mask_box(mask) == box


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (None, "size"),
        ({"size": [5], "counts": "d0"}, "size"),
        ({"size": [5, 4], "counts": "d"}, "middle of a number"),
        ({"size": [5, 4], "counts": "\x01"}, "not a letter"),
        ({"size": [5, 4], "counts": "a0"}, "cover 17 pixels"),
        ({"size": [5, 4], "counts": [1, -1]}, "run lengths"),
    ],
)
def test_a_mask_that_is_none(mask: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mask_box(mask)


def regions() -> dict[str, Any]:
    """Return two pictures in the published format: a half hidden object, a whole one, stuff, and a name that occurs twice."""
    mask = {"size": [8, 10], "counts": [16, 4, 4, 4, 52]}  # columns 2 and 3, rows 0 to 3
    square = [1, 1, 3, 1, 3, 3, 1, 3]
    return {
        "info": {},
        "images": [
            {"id": 7, "file_name": "COCO_val2014_000000000007.jpg", "width": 10, "height": 8},
            {"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "width": 10, "height": 8},
        ],
        "annotations": [
            {
                "image_id": 7,
                "regions": [
                    {"name": "man behind", "segmentation": [2, 0, 9, 0, 9, 7.5, 2, 7.5], "occlude_rate": 0.6,
                     "visible_mask": mask, "isStuff": 0, "order": 2},
                    {"name": "Dog ", "segmentation": square, "occlude_rate": 0, "order": 1},
                    {"name": "sky", "segmentation": square, "isStuff": 1, "order": 3},
                ],
            },
            {"image_id": 9, "regions": [{"name": "car", "segmentation": square}, {"name": "Car", "segmentation": square}]},
        ],
    }  # fmt: skip


def test_regions_become_rows_with_both_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "COCO_amodal_val2014.json"
    path.write_bytes(orjson.dumps(regions()))
    assert recognise(path) == "cocoa"
    assert egm(["data", "import", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "2 rows" in capsys.readouterr().out
    rows = [orjson.loads(line) for line in (tmp_path / "out/COCO_amodal_val2014.jsonl").read_bytes().splitlines()]
    man = {"image": "COCO_val2014_000000000007.jpg", "sent": "man behind", "width": 10, "height": 8}
    assert rows[0] == man | {"bbox": [2, 0, 4, 4], "modal_bbox": [2, 0, 4, 4], "amodal_bbox": [2, 0, 9, 7.5]}
    assert (rows[1]["sent"], rows[1]["bbox"], rows[1]["amodal_bbox"]) == ("Dog", [1, 1, 3, 3], [1, 1, 3, 3])
    [first, _] = read_expressions(tmp_path / "out/COCO_amodal_val2014.jsonl")
    assert (first.visible, first.amodal, first.bbox) == ((2, 0, 4, 4), (2, 0, 9, 7.5), (2, 0, 4, 4))


@pytest.mark.parametrize(("more", "box", "words"), [
    ([], "[200, 0, 400, 500]", "bounding box coordinate"), (["--amodal"], "[200, 0, 900, 938]", "amodal bounding box"),
])  # fmt: skip
def test_training_rows_of_either_box(tmp_path: Path, more: list[str], box: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(orjson.dumps(regions()))
    assert egm(["data", "import", str(path), "--out", str(tmp_path), "--as", "rl", *more]) == 0
    first = orjson.loads((tmp_path / "a.jsonl").read_bytes().splitlines()[0])
    human, answer = (turn["value"] for turn in first["conversations"])
    assert answer == f"<box>{box}</box>" and words in human


def test_one_annotation_an_object(tmp_path: Path) -> None:
    value = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "category_id": 3, "bbox": [1, 1, 6, 6], "visible_bbox": [1, 1, 2, 6]},
            {"image_id": 1, "name": "hidden one", "a_bbox": [1, 1, 6, 6], "i_bbox": [0, 0, 0, 0]},
        ],
    }
    path = tmp_path / "instances.json"
    path.write_bytes(orjson.dumps(value))
    assert egm(["data", "import", str(path), "--out", str(tmp_path / "out")]) == 0
    [row] = read_expressions(tmp_path / "out/instances.jsonl")
    assert (row.sent, row.visible, row.amodal) == ("cat", (1, 1, 3, 7), (1, 1, 7, 7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["annotations"][0].update(image_id=1), r"a\.json:1: image_id: no picture"),
        (lambda v: v["images"][0].pop("width"), r"a\.json:1: images: .*has no file_name, width or height"),
        (
            lambda v: v["annotations"][0]["regions"][0].update(segmentation=[1, 2]),
            r"a\.json:1: regions\[0\]: .*polygon",
        ),
        (lambda v: v["annotations"][0]["regions"][0].update(visible_mask=[1]), r"a\.json:1: regions\[0\]: .*mask"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, path = regions(), tmp_path / "a.json"
    change(value)
    path.write_bytes(orjson.dumps(value))
    assert egm(["data", "import", str(path), "--out", str(tmp_path / "out")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_lint_takes_rows_of_whichever_box(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    row = {"image": "a.png", "sent": "cat", "width": 100, "height": 80, "amodal_bbox": [10, 10, 60, 60]}
    (tmp_path / "a.jsonl").write_bytes(orjson.dumps(row) + b"\n" + orjson.dumps(row | {"modal_bbox": [10, 10, 30, 60]}))
    assert lint([tmp_path / "a.jsonl"], [tmp_path], 1) == (2, [])


@pytest.mark.parametrize(
    ("fields", "amodal", "found"),
    [
        ({"bbox": 1}, False, (1, False)),
        ({"bbox": 1}, True, (1, False)),  # as in the reference code: the file's `bbox` is used
        ({"modal_bbox": 1}, False, (1, False)),
        ({"modal_bbox": 1}, True, "only the box of the visible part"),
        ({"amodal_bbox": 1}, False, "only the box of the whole object"),
        ({"amodal_bbox": 1}, True, (1, False)),
        ({"amodal_bbox": 1}, None, (1, False)),
        ({"bbox": 1, "modal_bbox": 2}, False, (1, False)),
        ({"bbox": 1, "amodal_bbox": 2}, False, (1, True)),
        ({"bbox": 1, "amodal_bbox": 2}, True, (2, True)),
        ({"bbox": 1, "modal_bbox": 2, "amodal_bbox": 3}, False, (2, True)),
        ({"bbox": 1, "modal_bbox": 2, "amodal_bbox": 3}, True, (3, True)),
    ],
)
def test_the_prompt_chooses_the_box(fields: dict[str, int], amodal: bool | None, found: Any) -> None:
    from grounding.data.records import parse_expression

    row: dict[str, Any] = {"image": "a", "sent": "b", "width": 100, "height": 100}
    row |= {name: [side, side, 50.0, 60.0] for name, side in fields.items()}
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            parse_expression(row, Path("f"), 1, amodal=amodal)
        return
    e = parse_expression(row, Path("f"), 1, amodal=amodal)
    assert (e.bbox[0], e.visible is not None and e.amodal is not None) == found
