"""An evaluation with wrong boxes, rows or pictures stops before it sends anything, and says what to do."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.boxes import Space
from grounding.cli import run as egm
from grounding.data.images import open_images
from grounding.data.records import parse_expression
from grounding.errors import UserError
from grounding.evaluate.guard import Truths
from grounding.evaluate.worklist import read_worklist

SIZES = [(320, 240), (240, 320), (300, 200), (320, 214)]
BOXES = [
    [169.25, 42.5, 266.75, 114.1],
    [41.25, 176.5, 94.75, 236.1],
    [13.25, 37.5, 89.75, 104.1],
    [123.25, 26.5, 181.75, 76.1],
    [199.25, 93.5, 282.75, 144.1],
    [121.25, 73.5, 195.75, 157.1],
    [109.25, 30.5, 207.75, 84.1],
    [63.25, 37.5, 123.75, 97.1],
]


def written(box, size, space):
    """Return the box as a file in this space contains it."""
    (x1, y1, x2, y2), (w, h) = box, size
    scale, _, order = space.rpartition("-")
    if order in ("relative", "fraction"):
        scale, order = order, "xyxy"
    whole = {"relative": 1000.0, "fraction": 1.0}.get(scale)
    if whole is not None:
        x1, x2, y1, y2 = x1 * whole / w, x2 * whole / w, y1 * whole / h, y2 * whole / h
    return {
        "xyxy": [x1, y1, x2, y2],
        "xywh": [x1, y1, x2 - x1, y2 - y1],
        "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
        "yxyx": [y1, x1, y2, x2],
    }[order]


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "img").mkdir()
    for i, size in enumerate(SIZES):
        Image.new("RGB", size, (9, 9, i)).save(tmp_path / f"img/p{i}.png")
    return tmp_path


def rows(space="xyxy", **change):
    found = []
    for i, box in enumerate(BOXES):
        w, h = SIZES[i % 4]
        box = written(box, (w, h), space)
        found.append({"image": f"p{i % 4}.png", "sent": f"block {i}", "bbox": box, "width": w, "height": h} | change)
    return found


def read(root: Path, given_rows, truth=None, skip_broken=0):
    path = root / "refcoco_val.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in given_rows))
    return read_worklist([path], b"s", open_images(root / "img"), None, Truths(truth, skip_broken=skip_broken))


@pytest.mark.parametrize("space", [s for s in get_args(Space) if s not in ("xyxy", "relative-yxyx", "fraction-yxyx")])
def test_truths_in_another_space_stop_and_name_the_space(pictures, space):
    with pytest.raises(UserError) as caught:
        read(pictures, rows(space))
    assert str(caught.value).startswith(f"{pictures / 'refcoco_val.jsonl'}:")
    assert "of 8" in caught.value.message or "all 8" in caught.value.message
    assert f"--truth {space}" in caught.value.hint or f"or {space}" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("space", get_args(Space))
def test_declared_truths_are_the_same_questions(pictures, space):
    worklist = read(pictures, rows(space), truth=space)
    assert [worklist.expression(i).bbox for i in range(8)] == [pytest.approx(b) for b in BOXES]


@given(
    st.sampled_from(get_args(Space)),
    st.tuples(st.integers(2, 4000), st.integers(2, 4000)),
    st.tuples(*[st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.01, 0.5), st.floats(0.01, 0.5)]),
)
def test_each_declared_space_is_converted_exactly_once(space, size, at):
    (w, h), (x, y, dx, dy) = size, at
    box = [x * w, y * h, (x + dx) * w, (y + dy) * h]
    row = {"image": "a", "sent": "s", "bbox": written(box, size, space), "width": w, "height": h}
    assert parse_expression(row, Path("f.jsonl"), 1, space).bbox == pytest.approx(box, rel=1e-6, abs=1e-6)
    # a row that declares its format itself is not converted twice
    own = row | {"bbox": written(box, size, "xywh"), "bbox_format": "xywh"}
    assert parse_expression(own, Path("f.jsonl"), 1, space).bbox == pytest.approx(box, rel=1e-6, abs=1e-6)


def test_pixels_declared_as_0_to_1000_are_refused(pictures):
    with pytest.raises(UserError, match=r"look like pixels, but 0\.\.1000 was expected"):
        read(pictures, rows() * 2, truth="relative")


def test_reversed_truths_stop_with_file_line_and_share(pictures):
    with pytest.raises(UserError, match=r"refcoco_val\.jsonl:1: 8 of 8 boxes have corners out of order"):
        read(pictures, [r | {"bbox": r["bbox"][2:] + r["bbox"][:2]} for r in rows()])


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ([50, 50, 50, 90], "empty"),
        ([900, 10, 950, 60], "completely outside"),
        ([0.1, 0.1, 0.5, 0.5], "less than a pixel"),
    ],
)
def test_one_truth_that_cannot_be_stops_with_its_line(pictures, box, what):
    given_rows = rows()
    given_rows[4]["bbox"] = box
    with pytest.raises(UserError, match=rf"refcoco_val\.jsonl:5: bbox: .*{what}"):
        read(pictures, given_rows)


def test_broken_rows_are_left_out_only_if_the_user_says_how_many(pictures):
    given_rows = rows()
    given_rows[1] |= {"image": "none.png"}
    given_rows[2] |= {"width": 77}
    given_rows[4] |= {"bbox": [50, 50, 50, 90]}
    given_rows[6] |= {"bbox": "no box"}
    worklist = read(pictures, given_rows, skip_broken=4)
    assert len(worklist) == 4 and sorted((p.row, p.kind) for p in worklist.left_out) == [
        (2, "missing-image"),
        (3, "size-mismatch"),
        (5, "empty-box"),
        (7, "broken-row"),
    ]
    with pytest.raises(
        UserError, match=r"4 rows cannot be used, 3 are allowed:\n.*refcoco_val\.jsonl:2: missing-image"
    ):
        read(pictures, given_rows, skip_broken=3)


def test_a_picture_too_long_for_the_models_stops(pictures):
    Image.new("RGB", (2000, 10)).save(pictures / "img/long.png")
    row = {"image": "long.png", "sent": "x", "bbox": [1, 1, 900, 9], "width": 2000, "height": 10}
    with pytest.raises(UserError, match=r"refcoco_val\.jsonl:9: .*200:1"):
        read(pictures, [*rows(), row])


def test_a_row_in_the_grid_of_a_turned_picture_is_told_about_the_exif_orientation(pictures):
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(data, "JPEG", exif=exif)
    (pictures / "img/turned.jpg").write_bytes(data.getvalue())
    row = {"image": "turned.jpg", "sent": "x", "bbox": [10, 10, 90, 90], "width": 200, "height": 300}
    with pytest.raises(UserError, match=r"200 x 300 pixels, but turned\.jpg is 300 x 200 .*EXIF orientation 6"):
        read(pictures, [row])


def command(root, server, *more, out="out"):
    fixed = ["--images", str(root / "images"), "--endpoint", server.url, "--model", "m", "--out", str(root / out)]
    return egm(["eval", "--files", str(root / "refcoco_val.jsonl"), *fixed, "--json", *more])


def rewrite(root, change):
    path = root / "refcoco_val.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | change(i, r)) + "\n" for i, r in enumerate(found)))


def test_nothing_is_asked_about_wrong_truths_and_the_declared_ones_give_the_same_number(dataset, server, capsys):
    assert command(dataset, server, out="right") == 0
    right = json.loads(capsys.readouterr().out)
    asked = server.count
    rewrite(dataset, lambda i, r: {"bbox": written(r["bbox"], (r["width"], r["height"]), "fraction")})
    assert command(dataset, server) == 2 and server.count == asked
    assert "--truth fraction" in capsys.readouterr().err and not (dataset / "out").exists()
    assert command(dataset, server, "--truth", "fraction") == 0
    declared = json.loads(capsys.readouterr().out)
    assert (declared["macro"], declared["done"]) == (right["macro"], right["done"])
    assert egm(["rescore", str(dataset / "out")]) == 0
    assert json.loads((dataset / "out/summary.json").read_bytes())["macro"] == right["macro"]


def test_rows_left_out_are_said_beside_the_number_and_stay_left_out(dataset, server, capsys):
    rewrite(dataset, lambda i, r: {"image": "none.jpg"} if i in (3, 5) else {})
    assert command(dataset, server, "--skip-broken", "1") == 2 and server.count == 0
    assert command(dataset, server, "--skip-broken", "2", "--strict") == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["total"], summary["left_out"]) == (22, 2) and "refcoco_val.jsonl:4" in summary["notes"][0]
    assert egm(["rescore", str(dataset / "out")]) == 0
    again = json.loads((dataset / "out/summary.json").read_bytes())
    assert (again["total"], again["macro"]) == (22, summary["macro"])


def test_rows_of_a_cut_picture_are_left_out_if_the_user_allows_it(dataset, server, capsys):
    data = io.BytesIO()
    Image.effect_noise((100, 80), 50).save(data, "JPEG")
    (dataset / "images/3.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    assert command(dataset, server, "--skip-broken", "4") == 0 and server.count == 20
    summary = json.loads(capsys.readouterr().out)
    assert (summary["total"], summary["left_out"], summary["errors"]) == (20, 4, 0)


def test_a_file_of_another_kind_is_told_about_the_import(dataset, server, capsys):
    (dataset / "refs(unc).p").write_bytes(b"\x80\x04")
    fixed = ["--images", str(dataset / "images"), "--model", "m", "--out", str(dataset / "out"), "--dry-run"]
    assert egm(["eval", "--files", str(dataset / "refs(unc).p"), *fixed]) == 2
    assert "egm data import" in capsys.readouterr().err


def test_pixel_answers_are_kept_as_they_are(dataset, server, capsys):
    server.plan = lambda n, body: {
        "model": "m",
        "choices": [{"message": {"content": "[10, 8, 50, 48]"}, "finish_reason": "stop"}],
    }
    assert command(dataset, server, out="scaled") == 0
    assert json.loads(capsys.readouterr().out)["macro"] == 0.0
    assert command(dataset, server, "--box-remap", "keep") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["macro"], summary["scoring"]) == (1.0, "egm-eval-pixels")
    assert command(dataset, server, "--box-remap", "inverse") == 2
    assert "--truth relative" in capsys.readouterr().err


def test_a_json_list_passes_the_same_guard(pictures):
    path = pictures / "refcoco_val.json"
    path.write_text(json.dumps(rows("xywh")))
    with pytest.raises(UserError, match=r"refcoco_val\.json:1: .*xywh\?"):
        read_worklist([path], b"s", open_images(pictures / "img"))


def test_all_missing_files_and_images_are_named_at_once(pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    words = ["--model", "m", "--prompt", "qwen3", "--out", "out", "--endpoint", "http://127.0.0.1:9"]
    assert egm(["eval", "--files", "a.jsonl", "b.jsonl", "--images", "coco.tar", "--images", "img", *words]) == 2
    shown = capsys.readouterr().err
    assert "error: a.jsonl, b.jsonl, coco.tar: no such file or folder\n" in shown
    assert "egm data import" in shown
    assert egm(["eval", "--files", "img", "--images", "img", *words]) == 2
    assert "img is neither an evaluation file nor a part of a split tar" in capsys.readouterr().err
