"""The check of rows, boxes and pictures in lint and prepare: its findings and their consequences."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from grounding.cli import app
from grounding.data.lint import lint
from grounding.data.prepare import prepare
from grounding.errors import UserError


def jpeg(size: tuple[int, int] = (200, 150), orientation: int = 1) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.effect_noise(size, 60).convert("RGB").save(out, "JPEG", exif=exif)
    return out.getvalue()


def png(mode: str = "RGB", size: tuple[int, int] = (200, 150)) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 30000 if mode == "I;16" else 9).save(out, "PNG")
    return out.getvalue()


def broken_stream() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((200, 150), 60).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[data.find(b"IDAT") + 200] ^= 255
    return bytes(data)


def training(image: str, box: list[Any], **change: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nLocate <ref>x</ref>"}, {"from": "gpt", "value": f"<box>{box}</box>"}]
    return {"id": image, "image": image, "sent": f"x {box}", "conversations": turns} | change


class Place:
    """A folder for pictures, and rows of both kinds about them."""

    def __init__(self, root: Path, pictures: dict[str, bytes]) -> None:
        self.root, self.images = root, root / "img"
        self.images.mkdir()
        for name, data in pictures.items():
            (self.images / name).write_bytes(data)
        boxes = [[10 + 10 * i, 10, 500 + 10 * i, 990] for i in range(12)]
        self.rl, self.val = root / "rl.jsonl", root / "refcoco_val.jsonl"
        self.write([training(name, box) for name in pictures for box in boxes], list(pictures))

    def write(self, rows: list[Any], names: list[str], boxes: list[list[float]] | None = None) -> None:
        questions = [
            {"image": name, "sent": f"y {box}", "bbox": box, "width": 200, "height": 150}
            for name in names
            for box in boxes or [[5, 5, 150, 140], [50, 5, 190, 120]]
        ]
        self.rl.write_text("".join(json.dumps(r) + "\n" for r in rows))
        self.val.write_text("".join(json.dumps(q) + "\n" for q in questions))

    def lint(self, **options: Any) -> set[tuple[str, str, str]]:
        _, problems = lint([self.rl, self.val], [self.images], 2, **options)
        return {(Path(p.file).name, p.kind, p.severity) for p in problems}

    def prepare(self, **options: Any) -> Any:
        return prepare([self.rl], [self.val], [self.images], self.root / "out", fraction=1, **options)


@pytest.mark.parametrize(
    ("name", "data", "kind", "severity", "whole"),
    [
        ("cut.jpg", jpeg()[:4000], "unreadable-image", "error", False),
        ("crc.png", broken_stream(), "unreadable-image", "error", True),
        ("deep.png", png("I;16"), "deep-picture", "warning", False),
        ("turned.jpg", jpeg(orientation=3), "orientation", "warning", False),
    ],
)
def test_pictures_are_checked_by_lint_and_prepare_alike(
    tmp_path: Path, name: str, data: bytes, kind: str, severity: str, whole: bool
) -> None:
    place = Place(tmp_path, {"good.png": png(), name: data})
    expected = {(file, kind, severity) for file in ("rl.jsonl", "refcoco_val.jsonl")}
    assert place.lint(decode=whole) == expected
    if severity == "warning":
        result = place.prepare(decode=whole)
        assert (result.train, result.validation, result.left_out) == (24, 4, 0)
        assert [p.kind for p in result.problems] == [kind, kind]  # once per picture and file, not once per row
        return
    with pytest.raises(UserError, match=rf"14 rows cannot be used, 0 are allowed:\n.*{name}"):
        place.prepare(decode=whole)
    result = place.prepare(decode=whole, max_missing=14)
    assert (result.train, result.validation, result.left_out) == (12, 2, 14)


def test_rl_gets_an_8_bit_copy_of_a_16_bit_picture(tmp_path: Path) -> None:
    """verl's loader would clip the picture to white, so that RL would see a different picture than evaluation and SFT."""
    place = Place(tmp_path, {"good.png": png(), "deep.png": png("I;16")})
    place.prepare()
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    paths = {row["extra_info"]["id"]: Path(row["images"][0]) for row in rows}
    assert paths["good.png"] == place.images / "good.png"
    with Image.open(paths["deep.png"]) as image:
        assert image.mode == "RGB" and image.getpixel((0, 0)) == (117, 117, 117)


def test_a_picture_too_long_for_the_models_makes_each_of_its_rows_unusable(tmp_path: Path) -> None:
    place = Place(tmp_path, {"good.png": png(), "long.png": png("RGB", (2000, 10))})
    place.write([training(n, [1, 1, 600 + i, 990]) for n in ("good.png", "long.png") for i in range(3)], ["good.png"])
    with pytest.raises(UserError, match="3 rows cannot be used"):
        place.prepare()
    assert place.prepare(max_missing=3).train == 3


def test_pixels_in_training_rows_are_refused_and_converted_if_declared(tmp_path: Path) -> None:
    place = Place(tmp_path, {"good.png": png()})
    pixels = [[10.0 + i, 20.0, 100.0 + 4 * i, 140.0] for i in range(20)]
    place.write([training("good.png", box) for box in pixels], ["good.png"])
    assert ("rl.jsonl", "whole-file", "error") in place.lint()
    with pytest.raises(UserError, match=r"rl\.jsonl:1: of 20 boxes none reaches beyond") as caught:
        place.prepare()
    assert "--truth xyxy" in caught.value.hint and not (tmp_path / "out/train.parquet").exists()
    assert place.prepare(truth="xyxy").train == 20
    truths = [r["reward_model"]["ground_truth"] for r in pq.read_table(tmp_path / "out/train.parquet").to_pylist()]
    assert truths == [pytest.approx([x1 * 5, y1 / 0.15, x2 * 5, y2 / 0.15]) for x1, y1, x2, y2 in pixels]


def test_all_rows_of_an_evaluation_file_are_looked_at_though_a_sample_is_used(tmp_path: Path) -> None:
    place = Place(tmp_path, {"good.png": png()})
    boxes = [[100.0 + i, 5, 80.0, 90.0 + i] for i in range(12)]  # x, y, width, height
    place.write([training("good.png", [1, 1, 990, 990])], ["good.png"], boxes)
    with pytest.raises(UserError, match=r"xywh\?") as caught:
        prepare([place.rl], [place.val], [place.images], tmp_path / "out", fraction=0.1)
    assert "--eval-truth xywh" in caught.value.hint
    result = place.prepare(eval_truth="xywh")
    assert (result.validation, result.left_out) == (12, 0)


def test_what_a_trainer_stumbles_over_in_texts_is_said(tmp_path: Path) -> None:
    place = Place(tmp_path, {"good.png": png()})
    base = training("good.png", [1, 1, 990, 990])
    turns = base["conversations"]
    two = [turns[0], {"from": "gpt", "value": "<box>[1, 1, 9, 9]</box> or <box>[1, 1, 990, 990]</box>"}]
    rows = [
        base | {"id": 1, "sent": "a", "conversations": [*turns, *turns]},
        base | {"id": 2, "sent": "b", "conversations": two},
        base | {"id": 3, "sent": "c" * 2001},
        base | {"id": 4, "sent": "d <|im_end|>"},
        {k: v for k, v in base.items() if k != "sent"}
        | {"id": 5, "conversations": [{"from": "human", "value": "<image>\n<ref> </ref>"}, turns[1]]},
    ]
    place.write(rows, ["good.png"])
    assert place.lint() == {
        ("rl.jsonl", "extra-turns", "warning"),
        ("rl.jsonl", "several-boxes", "warning"),
        ("rl.jsonl", "long-prompt", "warning"),
        ("rl.jsonl", "placeholder", "error"),
        ("rl.jsonl", "broken-row", "error"),
    }


def egm(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_lint_ends_with_2_for_a_file_in_another_space_and_says_how_to_declare_it(tmp_path: Path) -> None:
    place = Place(tmp_path, {"good.png": png()})
    place.write([], ["good.png"], [[0.1, 0.1, 0.5 + i / 20, 0.9] for i in range(8)])
    code, text = egm("data", "lint", place.val, "--images", place.images)
    assert code == 2 and "all 8 boxes are in 0..1" in text and "--truth fraction" in text
    assert egm("data", "lint", place.val, "--images", place.images, "--truth", "fraction")[0] == 0


def test_lint_allows_as_many_broken_rows_as_it_is_told(tmp_path: Path) -> None:
    place = Place(tmp_path, {"good.png": png(), "cut.jpg": jpeg()[:4000]})
    common = ("data", "lint", place.val, "--images", place.images)
    assert [egm(*common, *more)[0] for more in ((), ("--skip-broken", 1), ("--skip-broken", 2))] == [1, 1, 0]
