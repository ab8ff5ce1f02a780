import io
import re
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.data.flip import flip_box, flip_files, flip_image, flip_row, flip_text, flip_words
from grounding.data.records import read_expressions
from grounding.errors import UserError


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("left man", "right man"),
        ("the Right one, not the LEFT one", "the Left one, not the RIGHT one"),
        ("leftmost left-hand lefthand leftest", "rightmost right-hand righthand rightest"),
        ("bright copyright upright alright", "bright copyright upright alright"),
        ("lefty rightie", "righty leftie"),
        ("lft guy", "rgt guy"),
        ("leftover pizza", "leftover pizza"),
        ("rightly", "rightly"),
        ("guy's left/right", "guy's right/left"),
    ],
)
def test_words(text: str, flipped: str) -> None:
    assert flip_words(text) == flipped
    assert flip_words(flipped) == text


SIDES = st.sampled_from(["left", "right", "Left", "Right", "LEFT", "RIGHT", "leftmost", "rightmost", "left-hand"])
WORDS = SIDES | st.sampled_from(["man", "bright", "upright", "leftover", ",", ".", "'", "[", "<box>[1,2,3]</box>"])
NUMBER = st.integers(0, 1000).map(str) | st.decimals(0, 1000, places=2, allow_nan=False).map(str)
BOX = st.lists(NUMBER, min_size=4, max_size=4).map(lambda n: f"<box>[{', '.join(n)}]</box>")
BOX_2D = st.lists(NUMBER, min_size=4, max_size=4).map(lambda n: f'"bbox_2d": [{", ".join(n)}]')


def value(text: str) -> str:
    """Compare numbers by value: 7.00 and 7.0 are the same coordinate."""
    return re.sub(r"\d+\.\d+|\d+", lambda m: f"{float(m[0]):g}", text)


@given(st.lists(WORDS | BOX | BOX_2D, max_size=8).map(" ".join))
def test_twice_is_the_first_text(text: str) -> None:
    assert value(flip_text(flip_text(text))) == value(text)


def test_boxes_in_texts_are_mirrored() -> None:
    assert flip_text("<box>[100, 20, 300, 40]</box>") == "<box>[700, 20, 900, 40]</box>"
    assert flip_text('[{"bbox_2d": [0, 1, 12.5, 3]}]') == '[{"bbox_2d": [987.5, 1, 1000, 3]}]'


@given(st.lists(st.floats(0, 5000), min_size=4, max_size=4), st.integers(1, 5000))
def test_pixel_boxes_twice_are_themselves(box: list[float], width: int) -> None:
    assert flip_box(flip_box(box, width), width) == pytest.approx(box, abs=1e-9)


@given(st.integers(0, 400), st.integers(0, 400), st.integers(400, 900))
def test_whole_pixels_are_exact(a: int, b: int, width: int) -> None:
    assert flip_box(flip_box([a, 0, b, 9], width), width) == [a, 0, b, 9]


def test_pixels_under_the_box_stay_under_it() -> None:
    image = Image.new("RGB", (50, 20), "white")
    image.paste((255, 0, 0), (5, 3, 17, 11))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = np.asarray(Image.open(io.BytesIO(flip_image(buffer.getvalue()))))
    ys, xs = np.nonzero(pixels[..., 1] == 0)
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == flip_box([5, 3, 17, 11], 50)


def test_jpeg_stays_jpeg_and_close() -> None:
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 255, (4, 5, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    once = Image.open(io.BytesIO(flip_image(data)))
    assert once.format == "JPEG"
    before = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(np.asarray(once).astype(int)[:, ::-1] - before).mean() < 3


def write_input(folder: Path) -> Path:
    (folder / "img").mkdir()
    Image.new("RGB", (100, 60), "white").save(folder / "img/a.png")
    rows = [
        {"image": "/a.png", "sent": s, "bbox": [10.0, 5, 40, 20], "width": 100, "height": 60} for s in ("left", "dog")
    ]
    path = folder / "refcoco_val.jsonl"
    path.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
    return path


def test_files(tmp_path: Path) -> None:
    source = write_input(tmp_path)
    assert flip_files([source], [tmp_path / "img"], tmp_path / "out") == (2, 1)
    rows = list(read_expressions(tmp_path / "out/refcoco_val.jsonl"))
    assert [(r.sent, r.bbox, r.image) for r in rows] == [
        ("right", (60, 5, 90, 20), "flipped/a.png"),
        ("dog", (60, 5, 90, 20), "flipped/a.png"),
    ]
    assert Image.open(tmp_path / "out/images/flipped/a.png").size == (100, 60)


def test_files_that_cannot_be_flipped_say_where(tmp_path: Path) -> None:
    source = write_input(tmp_path)
    with pytest.raises(UserError, match="same name"):
        flip_files([source], [tmp_path / "img"], tmp_path)
    Image.new("RGB", (99, 60)).save(tmp_path / "img/a.png")
    with pytest.raises(UserError, match=r"refcoco_val\.jsonl:1: the row says 100 x 60"):
        flip_files([source], [tmp_path / "img"], tmp_path / "out")
    (tmp_path / "img/a.png").unlink()
    with pytest.raises(UserError, match=r"refcoco_val\.jsonl:1: image: no image"):
        flip_files([source], [tmp_path / "img"], tmp_path / "out")


def test_other_fields_are_kept_and_the_input_row_is_not_touched() -> None:
    row = {"image": "a", "id": 3, "bbox": [1, 2, 3, 4], "conversations": [{"from": "gpt", "value": "left"}]}
    before = orjson.dumps(row)
    flipped = flip_row(row, 10, "b")
    assert orjson.dumps(row) == before
    assert flipped == {
        "image": "b",
        "id": 3,
        "bbox": [7, 2, 9, 4],
        "conversations": [{"from": "gpt", "value": "right"}],
    }
