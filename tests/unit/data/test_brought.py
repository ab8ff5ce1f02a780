"""Unusual forms of users' data: other names of tar parts, other systems' file names, pictures in parquet files, single rows."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grounding.data.embedded import embedded_sources
from grounding.data.images import AmbiguousImage, open_images
from grounding.data.lint import lint
from grounding.data.records import read_expressions
from grounding.data.tars import stem_of_part
from grounding.errors import UserError
from grounding.train.sft.data import load_rows

SIZE = (64, 48)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (number * 20, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def row(image: Any, **more: Any) -> dict[str, Any]:
    return {"image": image, "sent": "cat", "bbox": [6.0, 9.0, 32.0, 28.0], "width": SIZE[0], "height": SIZE[1]} | more


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (["c.tar.part_00", "c.tar.part_01", "c.tar.part_02"], "c.tar"),
        (["c.tar.part_aa", "c.tar.part_ab"], "c.tar.part_aa"),
        (["c.tar.part-aa", "c.tar.part-ab"], "c.tar"),
        (["c.tar.000", "c.tar.001"], "c.tar"),
        (["c.taraa", "c.tarab"], "c.tar"),
        (["c.tar.aa", "c.tar.ab"], "c.tar.ab"),
        ([f"c.tar.part{n}" for n in range(1, 12)], "c.tar"),  # part 2 must come before part 10
    ],
)
def test_parts_by_the_names_that_tools_give_them(tmp_path: Path, names: list[str], given: str) -> None:
    members = {f"coco/{i}.jpg": picture(i) for i in range(6)}
    whole = tar(tmp_path / "whole", members)
    step = -(-len(whole) // len(names))
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(whole[number * step : (number + 1) * step])
    store = open_images(tmp_path / given)
    assert {name: store.read(name) for name in members} == members


@pytest.mark.parametrize(
    "name", ["coco.tar", "coco.tar.gz", "coco.tar.sha", "coco.tar.md5", "a.jpg", "part_aa", "x.jsonl"]
)
def test_what_is_no_part(name: str) -> None:
    assert stem_of_part(name) is None


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("coco/a.jpg", "data\\coco\\a.jpg"),
        (unicodedata.normalize("NFD", "coco/Ärger é.jpg"), unicodedata.normalize("NFC", "data/coco/Ärger é.jpg")),
        (unicodedata.normalize("NFC", "coco/Ärger é.jpg"), unicodedata.normalize("NFD", "/x/coco/Ärger é.jpg")),
        ("train2014/a.jpg", "http://images.cocodataset.org/train2014/a.jpg"),
        ("coco/a b%20c.jpg", "data/coco/a b%20c.jpg"),
    ],
)
def test_names_of_other_systems(tmp_path: Path, stored: str, asked: str) -> None:
    tar(tmp_path / "a.tar", {stored: picture(1)})
    assert open_images(tmp_path / "a.tar").read(asked) == picture(1)


STRUCT = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("image", pa.array([{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(3)], STRUCT)),
        ("image", pa.array([{"bytes": picture(i), "path": "image.jpg"} for i in range(3)], STRUCT)),
        ("image", pa.array([{"bytes": picture(i), "path": None} for i in range(3)], STRUCT)),
        ("image", pa.array([picture(i) for i in range(3)])),
        ("image", pa.array([[{"bytes": picture(i), "path": "image.jpg"}] for i in range(3)], pa.list_(STRUCT))),
        ("images", pa.array([[{"bytes": picture(i), "path": f"{i}.jpg"}] for i in range(3)], pa.list_(STRUCT))),
        ("images", pa.array([[picture(i)] for i in range(3)])),
    ],
    ids=["paths", "one path", "no path", "bytes", "lists", "images", "lists of bytes"],
)
def test_each_row_of_a_parquet_file_has_its_own_picture(tmp_path: Path, name: str, column: pa.Array) -> None:
    table = pa.table({
        name: column, "sent": ["cat"] * 3, "bbox": [[6.0, 9.0, 32.0, 28.0]] * 3, "width": [SIZE[0]] * 3, "height": [SIZE[1]] * 3,
    })  # fmt: skip
    path = tmp_path / "e.parquet"
    pq.write_table(table, path, row_group_size=2)
    store = open_images(*embedded_sources([path]))
    assert [store.read(e.image) for e in read_expressions(path)] == [picture(i) for i in range(3)]
    assert lint([path], [], 1)[0] == 3


def test_one_picture_in_several_rows_has_one_name(tmp_path: Path) -> None:
    rows = [row({"bytes": picture(i // 2), "path": f"{i // 2}.jpg"}) for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    assert [e.image for e in read_expressions(tmp_path / "e.parquet")] == ["0.jpg", "0.jpg", "1.jpg", "1.jpg"]


def test_paths_without_pictures_are_looked_for_elsewhere(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"coco/a.jpg": picture(1)})
    rows = [
        row({"bytes": None, "path": "data/coco/a.jpg"}),
        row({"bytes": None, "path": "data/coco/a.jpg"}, sent="dog"),
    ]
    schema = pa.Table.from_pylist(rows).schema.set(0, pa.field("image", STRUCT))
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "e.parquet")
    assert lint([tmp_path / "e.parquet"], [tmp_path / "a.tar"], 1) == (2, [])


def test_two_files_that_call_different_pictures_alike_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(
            pa.Table.from_pylist([row({"bytes": picture(number), "path": "image.jpg"})]), tmp_path / f"{number}.parquet"
        )
    store = open_images(*embedded_sources([tmp_path / "0.parquet", tmp_path / "1.parquet"]))
    with pytest.raises(
        AmbiguousImage, match=r"(?s)'image.jpg' is a different picture in each of:.*0.parquet.*1.parquet"
    ):
        store.read("image.jpg")


@pytest.mark.parametrize(
    ("name", "raw", "found"),
    [
        ("a.json", b"\xef\xbb\xbf" + json.dumps([row("a.jpg")], indent=1).encode(), 1),
        ("a.json", json.dumps(row("a.jpg")).encode(), 1),
        ("a.jsonl", orjson.dumps(row(["a.jpg"])), 1),
        ("a.jsonl", orjson.dumps({k: v for k, v in row("").items() if k != "image"} | {"images": ["a.jpg"]}), 1),
        ("a.json", json.dumps({"data": [row("a.jpg")]}).encode(), "found an object with data"),
        ("a.jsonl", json.dumps([row("a.jpg")], indent=1).encode(), "name ends in .json"),
        ("a.jsonl", json.dumps([row("a.jpg")]).encode(), "name ends in .json"),
    ],
)
def test_rows_in_the_forms_that_programs_write(tmp_path: Path, name: str, raw: bytes, found: Any) -> None:
    (tmp_path / name).write_bytes(raw)
    if isinstance(found, str):
        with pytest.raises(UserError) as caught:
            list(read_expressions(tmp_path / name))
        assert found in str(caught.value)
    else:
        assert [e.image for e in read_expressions(tmp_path / name)] == ["a.jpg"] * found


def test_sft_rows_name_their_picture_in_a_list_too(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    (tmp_path / "s.jsonl").write_bytes(orjson.dumps({"image": ["a.jpg"], "conversations": turns}))
    assert [r.image for r in load_rows(tmp_path / "s.jsonl")] == ["a.jpg"]
    (tmp_path / "s.jsonl").write_bytes(orjson.dumps({"image": "a.jpg", "messages": turns}))
    with pytest.raises(UserError, match="egm data import --as sft"):
        load_rows(tmp_path / "s.jsonl")
