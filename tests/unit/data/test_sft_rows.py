"""Rows of SFT: every fault that would end a training is found before it starts, with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grounding.api import read
from grounding.api.models import GROUP_VERSION
from grounding.data.images import open_images
from grounding.data.jobdata import materialise
from grounding.data.sft_rows import check, errors
from grounding.errors import UserError

ANSWER = 'It is left.</think>\n```json\n[\n\t{"bbox_2d": [10, 20, 300, 400], "label": "x"}\n]\n```'


def _row(image: object = "a.jpg", human: object = "<image>\nLocate the cat", gpt: object = ANSWER) -> dict[str, Any]:
    return {"image": image, "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    Image.effect_noise((320, 240), 90).convert("RGB").save(folder / "a.jpg")
    (folder / "half.jpg").write_bytes((folder / "a.jpg").read_bytes()[:4000])
    Image.new("RGB", (1, 300)).save(folder / "thin.png")
    return folder


WRONG = [
    (_row() | {"conversations": _row()["conversations"] * 2}, "broken-row"),
    (_row(human=5), "broken-row"),
    (_row(gpt="  "), "broken-row"),
    (_row(image=["a.jpg", "b.jpg"]), "broken-row"),
    ({"image": "a.jpg", "sent": "x", "bbox": [1, 2, 3, 4], "width": 320, "height": 240}, "broken-row"),
    (_row(image="absent.jpg"), "missing-image"),
    (_row(image="half.jpg"), "unreadable-image"),
    (_row(image="thin.png"), "aspect"),
    (_row(human="<image>\nfind <|image_pad|>"), "placeholder"),
    (_row(human="<image>\n<image>\nfind both"), "placeholder"),
    (_row(gpt="I <|im_end|> see"), "placeholder"),
    (_row(human="<image>\n  "), "broken-row"),
    (_row(human="<image>\n" + "cat " * 300), "too-long"),
    (_row(gpt='[{"bbox_2d": [300, 400, 10, 20]}]'), "empty-box"),
]


@pytest.mark.parametrize(("row", "kind"), WRONG)
def test_what_would_end_a_training_is_an_error_of_its_row(row: Any, kind: str, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (_row(), row, _row())))
    found = errors(file, open_images(pictures), 256)
    assert [(problem.kind, problem.row) for problem in found] == [(kind, 2)]


@pytest.mark.parametrize(
    "row",
    [
        _row(gpt="I see nothing of the kind"),
        _row(human="<image>\n<|object_ref_start|>the cat<|object_ref_end|>", gpt="<|box_start|>(1,2),(3,4)<|box_end|>"),
        _row(gpt="<think>a</think> <box>[1, 2, 300, 400]</box>"),
    ],
)
def test_marks_of_boxes_and_answers_without_one_may_be_trained(
    row: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert list(check(tmp_path / "rows.json", open_images(pictures), 256)) == []


@pytest.mark.parametrize("place", ["train", "validation"])
def test_a_job_is_refused_before_it_trains_and_its_rows_are_looked_at_once(
    place: str, pictures: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps([_row(human=f"<image>\nLocate cat {n}") for n in range(20)]))
    bad.write_text(json.dumps([_row(), _row(image="half.jpg"), _row(image="absent.jpg")]))
    data = {"train": [str(good)], "images": [str(pictures)], place: [str(bad)]}
    spec = {"preset": "egm-8b-sft", "data": data}
    job, found = read(
        {"apiVersion": GROUP_VERSION, "kind": "GroundingTrainJob", "metadata": {"name": "a"}, "spec": spec}
    )
    assert job is not None, found
    with pytest.raises(UserError, match="2 rows cannot be used") as caught:
        materialise(job, tmp_path / "data")
    assert "bad.json:2: unreadable-image" in caught.value.message
    assert "bad.json:3: missing-image" in caught.value.message
    bad.write_text(good.read_text().replace("cat", "dog"))
    materialise(job, tmp_path / "data")
    checked = list((tmp_path / "data").glob("checked-*.json"))
    assert len(checked) == 1
    before = checked[0].stat().st_mtime_ns
    materialise(job, tmp_path / "data")
    assert checked[0].stat().st_mtime_ns == before
