"""A miniature of the published data set in its published layout: every reader accepts it."""

import os
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from release import COUNT, NAME, SIZE, is_flipped, lines, picture, write_release

from grounding.api import parse
from grounding.data.embedded import embedded_sources
from grounding.data.images import AmbiguousImage, MissingImage, open_images
from grounding.data.jobdata import materialise
from grounding.data.lint import lint
from grounding.data.prepare import prepare
from grounding.data.records import read_expressions
from grounding.data.shapes import EIGHT_FILES
from grounding.errors import UserError
from grounding.evaluate.engines import Sampling
from grounding.evaluate.worklist import read_worklist, settings_digest
from grounding.train.sft.data import load_rows


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "EGM_Datasets")


IMAGES = ("coco.tar", "coco_flip.tar")


def train_job(method: str, **data: Any) -> Any:
    preset = f"egm-8b-{method}"
    job = {
        "apiVersion": "grounding.egm.dev/v1alpha1",
        "kind": "GroundingTrainJob",
        "metadata": {"name": "a"},
        "spec": {"preset": preset, "data": data},
    }
    return parse(orjson.dumps(job).decode())[0]


def test_every_evaluation_row_finds_its_picture(release: Path) -> None:
    files = [release / f"metadata/eval/{f}.jsonl" for f in EIGHT_FILES]
    store = open_images(*(release / name for name in IMAGES))
    work = read_worklist(files, settings_digest("m", "qwen3", Sampling()), store)
    assert len(work) == 8 * COUNT
    for row in range(len(work)):
        assert not is_flipped(store.read(work.expression(row).image))


def test_sft_rows_are_read_as_published(release: Path) -> None:
    job = train_job(
        "sft",
        train=[str(release / "vanilla_grounding_reasoning_training_dataset_cot_subset.jsonl")],
        images=[str(release / name) for name in IMAGES],
    )
    found = materialise(job, release.parent / "data")
    assert found.sft_rows is not None
    rows, store = load_rows(found.sft_rows), open_images(*found.images)
    assert [is_flipped(store.read(r.image)) for r in rows] == [bool(i % 2) for i in range(COUNT)]


def test_the_published_parquet_is_resolved(release: Path) -> None:
    job = train_job(
        "rl",
        prepared=str(release / "processed_rl_data/train_grounding.parquet"),
        images=[str(release / name) for name in IMAGES],
    )
    found = materialise(job, release.parent / "data")
    assert found.train_parquet is not None and found.val_parquet is not None
    for path, source in ((found.train_parquet, "train"), (found.val_parquet, "val")):
        rows = pq.read_table(path).to_pylist()
        given = pq.read_table(release / f"processed_rl_data/{source}_grounding.parquet").to_pylist()
        assert [{k: v for k, v in r.items() if k != "images"} for r in rows] == [
            {k: v for k, v in r.items() if k != "images"} for r in given
        ]
        pictures = [Path(r["images"][0]) for r in rows]
        assert all(p.is_absolute() for p in pictures)
        assert [is_flipped(p.read_bytes()) for p in pictures] == [bool(i % 2) for i in range(COUNT)]
    before = found.train_parquet.stat().st_mtime_ns
    assert materialise(job, release.parent / "data") == found
    assert found.train_parquet.stat().st_mtime_ns == before


def test_prepared_rows_whose_pictures_cannot_be_opened_are_refused(release: Path) -> None:
    prepared = str(release / "processed_rl_data/train_grounding.parquet")
    with pytest.raises(UserError, match=r"6 pictures of 6 rows cannot be opened(.|\n)*spec.data.images"):
        materialise(train_job("rl", prepared=prepared), release.parent / "data")
    with pytest.raises(UserError, match=r"3 pictures of 6 rows cannot be opened(.|\n)*mirrored"):
        materialise(train_job("rl", prepared=prepared, images=[str(release / "coco.tar")]), release.parent / "data")


@pytest.mark.parametrize("column", ["images", "prompt", "reward_model"])
def test_prepared_data_lacks_a_column(release: Path, column: str) -> None:
    path = release / "processed_rl_data/train_grounding.parquet"
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(UserError, match=f"no column {column}"):
        materialise(train_job("rl", prepared=str(path)), release.parent / "data")


def test_preparation_takes_raw_rows_and_evaluation_files(release: Path) -> None:
    result = prepare(
        [release / "vanilla_grounding_reasoning_training_dataset_raw.jsonl"],
        [release / f"metadata/eval/{f}.jsonl" for f in EIGHT_FILES],
        [release / name for name in IMAGES],
        release.parent / "out",
        fraction=0.5,
    )
    assert (result.train, result.validation, result.left_out) == (COUNT, 8 * COUNT // 2, 0)
    rows = pq.read_table(release.parent / "out/train.parquet").to_pylist()
    assert rows[0]["prompt"][0]["content"] == "<image>\nLocate dog 0, output its bbox coordinates using JSON format"
    assert [is_flipped(Path(r["images"][0]).read_bytes()) for r in rows] == [bool(i % 2) for i in range(COUNT)]


def test_lint_reads_the_release(release: Path) -> None:
    files = [
        release / f"metadata/eval/{EIGHT_FILES[0]}.jsonl",
        release / "vanilla_grounding_reasoning_training_dataset_raw.jsonl",
    ]
    assert lint(files, [release / name for name in IMAGES], 2) == (2 * COUNT, [])


@pytest.mark.parametrize("unpacked", [False, True])
def test_folders_and_tars_match_alike(release: Path, unpacked: bool) -> None:
    sources = [release / name for name in IMAGES]
    if unpacked:
        sources = [release.parent / "data"]
        store = open_images(*(release / name for name in IMAGES))
        for name in list(store):
            path = sources[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.read(name))
    store = open_images(*sources)
    for prefix in ("data/", "/mnt/x/y/", "./"):
        for stem, flipped in (("coco", False), ("coco_flip", True)):
            assert is_flipped(store.read(f"{prefix}{stem}/train2014/{NAME.format(2)}")) is flipped
    with pytest.raises(MissingImage):
        store.read("data/coco/train2014/other.jpg")


def test_the_folder_of_a_source_tells_equal_names_apart(tmp_path: Path) -> None:
    for stem, flipped in (("coco", False), ("coco_flip", True)):
        folder = tmp_path / stem / "train2014"
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(picture(1, flipped))
    store = open_images(tmp_path / "coco_flip", tmp_path / "coco")
    assert not is_flipped(store.read("data/coco/train2014/a.jpg"))
    assert is_flipped(store.read("data/coco_flip/train2014/a.jpg"))
    alone = open_images(tmp_path / "coco_flip")
    with pytest.raises(MissingImage, match="mirrored"):
        alone.read("data/coco/train2014/a.jpg")


def test_ambiguity_names_the_candidates(tmp_path: Path) -> None:
    for number, folder in enumerate(("one/train2014", "two/train2014")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jpg").write_bytes(picture(number, False))
    store = open_images(tmp_path)
    with pytest.raises(AmbiguousImage, match=r"one/train2014/a.jpg(.|\n)*two/train2014/a.jpg"):
        store.read("data/coco/train2014/a.jpg")
    (tmp_path / "two/train2014/a.jpg").write_bytes((tmp_path / "one/train2014/a.jpg").read_bytes())
    assert open_images(tmp_path).read("data/coco/train2014/a.jpg"), (
        "two equal pictures with one name must not count as ambiguous"
    )


def embedded(path: Path) -> None:
    rows = [
        {
            "image": {"bytes": picture(i, False), "path": None if i % 2 else f"{i}.jpg"},
            "sent": f"cat {i}",
            "bbox": [6.0, 9.0, 26.0, 19.0],
            "bbox_format": "xywh",
            "width": SIZE[0],
            "height": SIZE[1],
        }
        for i in range(COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def test_one_reader_takes_lists_lines_and_parquet(release: Path, tmp_path: Path) -> None:
    stem = EIGHT_FILES[0]
    given = list(read_expressions(release / f"metadata/eval/{stem}.jsonl"))
    rows = [orjson.loads(line) for line in (release / f"metadata/eval/{stem}.jsonl").read_bytes().splitlines()]
    (tmp_path / f"{stem}.json").write_bytes(orjson.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{stem}.parquet")
    store = open_images(*(release / name for name in IMAGES))
    settings = settings_digest("m", "qwen3", Sampling())
    for ending in (".json", ".parquet"):
        path = tmp_path / f"{stem}{ending}"
        assert list(read_expressions(path)) == given
        work = read_worklist([path], settings, store)
        assert [work.expression(i) for i in range(len(work))] == given
        assert (work.keys == read_worklist([release / f"metadata/eval/{stem}.jsonl"], settings).keys).all()
    lines_in_json = tmp_path / "lines.json"
    lines_in_json.write_bytes(lines(rows))
    assert [e.sent for e in read_expressions(lines_in_json)] == [e.sent for e in given]


def test_embedded_pictures_and_declared_boxes(tmp_path: Path) -> None:
    path = tmp_path / "refcoco_val.parquet"
    embedded(path)
    found = list(read_expressions(path))
    assert {e.bbox for e in found} == {(6.0, 9.0, 32.0, 28.0)}
    store = open_images(*embedded_sources([path]))
    assert [store.read(e.image) for e in found] == [picture(i, False) for i in range(COUNT)]
    assert lint([path], [], 2) == (COUNT, [])
    assert prepare([], [path], [], tmp_path / "out", fraction=1).validation == COUNT
    assert len(read_worklist([path], settings_digest("m", "qwen3", Sampling()), store)) == COUNT


def test_a_broken_parquet_file_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(os.urandom(64))
    with pytest.raises(UserError, match="parquet"):
        list(read_expressions(tmp_path / "a.parquet"))
