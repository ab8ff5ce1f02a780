import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grounding import files
from grounding.data import jobdata
from grounding.data.jobdata import locate, materialise, sources
from grounding.data.shapes import EIGHT_FILES
from grounding.errors import UserError
from grounding.files import sha256_of

SHAPES = SimpleNamespace(seed=7, train=12, per_file=10, size=64, reasoning=False)


def train_job(method: str, **data: Any) -> Any:
    fields = {"train": [], "validation": [], "images": [], "prepared": None, "prompt": "qwen3", "shapes": None}
    fields |= {"truth": None, "validation_truth": None, "skip_broken": 0, "validation_sets": {}, "weights": []}
    spec = SimpleNamespace(method=method, seed=42, data=SimpleNamespace(**{**fields, **data}))
    return SimpleNamespace(kind="GroundingTrainJob", spec=spec)


def eval_job(**data: Any) -> Any:
    fields = {"files": [], "root": None, "images": [], "shapes": None, "truth": None, "skip_broken": 0}
    return SimpleNamespace(kind="GroundingEvalJob", spec=SimpleNamespace(data=SimpleNamespace(**{**fields, **data})))


def times(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "job", [train_job("sft", shapes=SHAPES), train_job("rl", shapes=SHAPES), eval_job(shapes=SHAPES)]
)
def test_shapes_lie_where_locate_says_and_are_made_once(job: Any, tmp_path: Path) -> None:
    located = locate(job, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert materialise(job, tmp_path) == located
    single = (located.sft_rows, located.train_parquet, located.val_parquet)
    paths = [p for p in (*single, *located.eval_files, *located.images) if p]
    assert paths and all(p.exists() for p in paths)
    before = times(tmp_path)
    assert materialise(job, tmp_path) == located
    assert times(tmp_path) == before


def test_the_jobs_of_a_run_share_the_set_but_not_with_another_seed(tmp_path: Path) -> None:
    sft, evaluation = (locate(j, tmp_path) for j in (train_job("sft", shapes=SHAPES), eval_job(shapes=SHAPES)))
    assert sft.images == evaluation.images
    assert [p.stem for p in evaluation.eval_files] == list(EIGHT_FILES)
    other = SimpleNamespace(seed=8, train=12, per_file=10, size=64, reasoning=False)
    assert locate(eval_job(shapes=other), tmp_path).images != sft.images


def test_validation_is_a_share_of_each_file(tmp_path: Path) -> None:
    located = materialise(train_job("rl", shapes=SHAPES), tmp_path, validation_fraction=0.3)
    assert pq.read_metadata(located.train_parquet).num_rows == 12
    rows = pq.read_table(located.val_parquet).to_pylist()
    assert len(rows) == 24
    assert all(Path(r["images"][0]).is_file() for r in rows)


def test_an_interrupted_preparation_is_made_again(tmp_path: Path) -> None:
    job = train_job("rl", shapes=SHAPES)
    located = materialise(job, tmp_path)
    assert located.val_parquet is not None
    folder = located.val_parquet.parent
    (folder / "done.json").unlink()
    located.val_parquet.write_bytes(b"half")
    materialise(job, tmp_path)
    assert pq.read_metadata(located.val_parquet).num_rows == 8


def test_changed_input_is_prepared_again_and_a_moved_folder_too(tmp_path: Path) -> None:
    first = materialise(train_job("rl", shapes=SHAPES), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = materialise(train_job("rl", shapes=SHAPES), tmp_path / "b")
    assert moved.train_parquet is not None and first.train_parquet is not None
    assert moved.train_parquet.parent.name == first.train_parquet.parent.name
    image = pq.read_table(moved.train_parquet).to_pylist()[0]["images"][0]
    assert image.startswith(str(tmp_path / "b"))

    rl = next((tmp_path / "b").glob("shapes-*/train_data/rl.json"))
    job = train_job("rl", train=[str(rl)], validation=[str(f) for f in rl.parents[1].glob("eval_data/*")],
                    images=[str(rl.parents[1] / "images")])  # fmt: skip
    assert pq.read_metadata(materialise(job, tmp_path / "c").train_parquet).num_rows == 12
    rl.write_bytes(orjson.dumps(orjson.loads(rl.read_bytes())[:5]))
    assert pq.read_metadata(materialise(job, tmp_path / "c").train_parquet).num_rows == 5


def test_own_files_are_used_where_they_lie(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "refcoco_val.jsonl", "x.jsonl"):
        (tmp_path / name).write_text("[1]")
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.jpg").write_bytes(b"picture")
    for name in ("train.parquet", "val.parquet"):
        row = {"prompt": [], "images": [str(tmp_path / "img/a.jpg")], "reward_model": {"style": "rule"}}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / name)
    a, b, image = (str(tmp_path / n) for n in ("a.json", "b.json", "img"))
    data = tmp_path / "data"
    assert materialise(train_job("sft", train=[a], images=[f"file://{image}"]), data).sft_rows == Path(a)
    merged = materialise(train_job("sft", train=[a, b], images=[image]), data).sft_rows
    assert merged is not None and merged.read_bytes() == b"[1,1]"
    ready = materialise(train_job("rl", prepared=str(tmp_path)), data)
    assert (ready.train_parquet, ready.val_parquet) == (tmp_path / "train.parquet", tmp_path / "val.parquet")
    assert materialise(train_job("rl", prepared=str(tmp_path / "train.parquet")), data) == ready
    files = materialise(eval_job(root=str(tmp_path), files=["refcoco_val", "x.jsonl"], images=[image]), data).eval_files
    assert files == (tmp_path / "refcoco_val.jsonl", tmp_path / "x.jsonl")
    assert [p.name for p in locate(eval_job(root=str(tmp_path)), data).eval_files] == [
        f"{s}.jsonl" for s in EIGHT_FILES
    ]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (train_job("sft"), "spec.data.train"),
        (train_job("rl", train=["nowhere.json"]), "spec.data.train: no such file"),
        (train_job("rl"), "spec.data: a job of method rl"),
        (train_job("sft", train=["gs://bucket/x.json"]), r"spec\.data\.train\[0\]: gs://bucket/x.json: unknown scheme"),
        (train_job("sft", train=["file://host/a.json"]), "another machine"),
        (eval_job(root="nowhere"), "spec.data.files: no such file"),
        (eval_job(images=["nowhere"]), "spec.data.images: no such file"),
    ],
)
def test_what_is_absent_or_elsewhere_is_named(job: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        materialise(job, tmp_path)


def test_what_lies_in_a_store_is_looked_for_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EGM_PVC_ROOT", "/claims")
    job = train_job("sft", train=["s3://b/x/sft.json"], images=["hf://datasets/o/d@v1/coco.tar", "pvc://c/images"])
    found = locate(job, tmp_path / "data")
    assert found.sft_rows == tmp_path / "cache/s3/b/x/sft.json"
    assert found.images == (tmp_path / "cache/hf/datasets/o/d@v1/coco.tar", Path("/claims/c/images"))
    evaluation = eval_job(root="s3://b/eval/", files=["refcoco_val", "/own.jsonl", "hf://o/d/x.json"], images=[])
    assert locate(evaluation, tmp_path).eval_files == (
        tmp_path / "cache/s3/b/eval/refcoco_val.jsonl",
        Path("/own.jsonl"),
        tmp_path / "cache/hf/o/d/x.json",
    )
    ready = locate(train_job("rl", prepared="s3://b/ready"), tmp_path)
    assert ready.train_parquet == tmp_path / "cache/s3/b/ready/train.parquet"
    assert not (tmp_path / "cache").exists(), "looking at the data must not download anything"


def test_each_role_asks_for_what_it_reads(tmp_path: Path) -> None:
    rl = train_job("rl", train=["s3://b/rl.json"], validation=["s3://b/v.jsonl"], images=["s3://b/coco.tar"])
    assert [s for s, _ in sources(rl, prepares=True)] == ["s3://b/rl.json", "s3://b/v.jsonl", "s3://b/coco.tar"]
    assert sources(rl, prepares=False) == [], (
        "expected no sources, because RL reads the copies that the preparation made"
    )
    sft = train_job("sft", train=["s3://b/1.json", "s3://b/2.json"], images=["i"])
    assert [f for _, f in sources(sft, prepares=True)][:2] == ["spec.data.train[0]", "spec.data.train[1]"]
    assert [s for s, _ in sources(sft, prepares=False)] == ["i"], (
        "expected only the images, because the preparation merges the files of rows"
    )
    assert [s for s, _ in sources(train_job("rl", prepared="s3://b/p/train.parquet"), prepares=False)] == [
        "s3://b/p/train.parquet",
        "s3://b/p/val.parquet",
    ]
    resolved = train_job("rl", prepared="s3://b/p/train.parquet", images=["s3://b/coco.tar"])
    assert len(sources(resolved, prepares=True)) == 3 and sources(resolved, prepares=False) == []
    assert sources(eval_job(shapes=SHAPES), prepares=True) == []


def test_a_split_tar_is_named_as_a_whole(tmp_path: Path) -> None:
    for name in ("coco.tar.part_aa", "coco.tar.part_ab", "a.json"):
        (tmp_path / name).write_bytes(b"[1]")
    job = train_job("sft", train=[str(tmp_path / "a.json")], images=[str(tmp_path / "coco.tar")])
    assert materialise(job, tmp_path / "data").images == (tmp_path / "coco.tar",)


def test_prepared_data_that_a_power_cut_has_emptied_is_made_again(tmp_path: Path) -> None:
    job = train_job("rl", shapes=SHAPES)
    made = materialise(job, tmp_path)
    assert made.train_parquet is not None and made.val_parquet is not None
    whole = made.val_parquet.read_bytes()
    set_folder = next(tmp_path.glob("shapes-*"))
    picture = next((set_folder / "images/train").iterdir())
    drawn = picture.read_bytes()
    made.val_parquet.write_bytes(b"")
    picture.write_bytes(b"")
    assert materialise(job, tmp_path) == made
    assert made.val_parquet.read_bytes() == whole and picture.read_bytes() == drawn


def _same_size_and_time(path: Path, data: bytes) -> None:
    """Replace a file's content but keep its size and modification time, so that only the bytes and the kernel's change time differ."""
    before = path.stat()
    assert before.st_size == len(data)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_content_decides_whether_data_is_prepared_again(tmp_path: Path) -> None:
    """A touched file does not count as changed; changed rows, and pictures in a tar, are noticed even if size and time are equal."""
    data = own_data(tmp_path, [[100.0 + i, 200.0, 700.0, 800.0] for i in range(5)])
    with tarfile.open(tmp_path / "img.tar", "w") as tar:
        tar.add(tmp_path / "img/a.png", "a.png")
    data |= {"images": [str(tmp_path / "img.tar")], "validation": [str(tmp_path / "refcoco_val.jsonl")]}
    job, rows = train_job("rl", **data), tmp_path / "rl.json"
    located = materialise(job, tmp_path / "data")
    assert located.train_parquet is not None
    folder = located.train_parquet.parent
    done = orjson.loads((folder / "done.json").read_bytes())
    assert set(done["inputs"]) == {str(rows), str(tmp_path / "refcoco_val.jsonl"), str(tmp_path / "img.tar")}
    assert done["inputs"][str(rows)] == sha256_of(rows)
    before = times(folder)
    os.utime(rows)
    materialise(job, tmp_path / "data")
    assert times(folder) == before

    _same_size_and_time(rows, rows.read_bytes().replace(b"x 4", b"y 4"))
    materialise(job, tmp_path / "data")
    sent = [row["prompt"][0]["content"] for row in pq.read_table(located.train_parquet).to_pylist()]
    assert "y 4" in sent[4] and times(folder) != before
    assert orjson.loads((folder / "done.json").read_bytes())["digest"] != done["digest"]

    other = bytearray((tmp_path / "img.tar").read_bytes())
    picture = (tmp_path / "img/a.png").read_bytes()
    noise = bytearray(picture)
    noise[-20] ^= 1  # a bit in the checksum at the end of the image data: other content, the same size
    at = bytes(other).index(picture)
    other[at : at + len(picture)] = noise
    _same_size_and_time(tmp_path / "img.tar", bytes(other))
    assert (folder / "images/a.png").read_bytes() == picture
    materialise(job, tmp_path / "data")
    assert (folder / "images/a.png").read_bytes() == bytes(noise)


def test_a_picture_between_the_samples_of_a_large_tar_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobdata, "WHOLE", 1000)
    monkeypatch.setattr(files, "WHOLE", 1000)
    monkeypatch.setattr(files, "_SAMPLES", 2)
    tar = tmp_path / "img.tar"
    tar.write_bytes(bytes(1 << 20))
    before = jobdata._Made.of([], [tar]).digest
    assert jobdata._Made.of([], [tar]).digest == before
    data = bytearray(1 << 20)
    data[1 << 19] = 1
    fingerprint = files.fingerprint(tar)
    _same_size_and_time(tar, bytes(data))
    assert files.fingerprint(tar) == fingerprint, "the fingerprint must not change, because the samples are the same"
    assert jobdata._Made.of([], [tar]).digest != before


def own_data(tmp_path: Path, boxes: list[list[float]], tag: str = "<box>{}</box>") -> dict[str, Any]:
    (tmp_path / "img").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "img/a.png")
    rows = [
        {"id": i, "image": "a.png", "sent": f"x {i}", "width": 640, "height": 480}
        | {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": tag.format(b)}]}
        for i, b in enumerate(boxes)
    ]
    question = {"image": "a.png", "sent": "y", "bbox": [1, 1, 630, 470], "width": 640, "height": 480}
    (tmp_path / "rl.json").write_bytes(orjson.dumps(rows))
    (tmp_path / "refcoco_val.jsonl").write_bytes(orjson.dumps(question))
    return {"train": [str(tmp_path / "rl.json")], "images": [str(tmp_path / "img")]}


PIXELS = [[10.0 + 10 * i, 20.0 + 10 * i, 300.0 + 10 * i, 150.0 + 10 * i] for i in range(30)]


def test_a_job_refuses_training_rows_in_pixels_and_converts_them_if_its_truth_says_so(tmp_path: Path) -> None:
    data = own_data(tmp_path, PIXELS) | {"validation": [str(tmp_path / "refcoco_val.jsonl")]}
    with pytest.raises(UserError, match="look like pixels") as caught:
        materialise(train_job("rl", **data), tmp_path / "data")
    assert "spec.data.truth: xyxy" in caught.value.hint
    located = materialise(train_job("rl", **data, truth="xyxy"), tmp_path / "data")
    assert located != locate(train_job("rl", **data), tmp_path / "data")
    first = pq.read_table(located.train_parquet).to_pylist()[0]["reward_model"]["ground_truth"]
    assert first == pytest.approx([10 / 0.64, 20 / 0.48, 300 / 0.64, 150 / 0.48])


def test_a_job_leaves_out_as_many_broken_rows_as_it_says(tmp_path: Path) -> None:
    data = own_data(tmp_path, [[1, 1, 900 + i, 990] for i in range(9)] + [[5, 5, 5, 9]])
    data |= {"validation": [str(tmp_path / "refcoco_val.jsonl")]}
    with pytest.raises(UserError, match="1 rows cannot be used"):
        materialise(train_job("rl", **data), tmp_path / "data")
    located = materialise(train_job("rl", **data, skip_broken=1), tmp_path / "data")
    assert pq.read_metadata(located.train_parquet).num_rows == 9


def test_sft_answers_in_pixels_or_fractions_are_refused(tmp_path: Path) -> None:
    data = own_data(tmp_path, PIXELS, '[{{"bbox_2d": {}}}]')
    with pytest.raises(UserError, match=r"rl\.json:1: of 30 boxes none reaches") as caught:
        materialise(train_job("sft", **data), tmp_path / "data")
    assert "spec.data.truth: relative" in caught.value.hint
    materialise(train_job("sft", **data, truth="relative"), tmp_path / "data")


def test_prepared_truths_in_fractions_are_refused(tmp_path: Path) -> None:
    data = own_data(tmp_path, [[1, 1, 900, 990]])
    rows = [
        {"prompt": [], "images": [str(tmp_path / "img/a.png")]}
        | {"reward_model": {"ground_truth": [0.1, 0.1, 0.5 + i / 30, 0.9]}, "extra_info": {"width": 640, "height": 480}}
        for i in range(9)
    ]
    for name in ("train", "val"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    prepared = {"prepared": str(tmp_path), "images": data["images"]}
    with pytest.raises(UserError, match=r"train\.parquet:1: reward_model: all 9 boxes are in 0\.\.1"):
        materialise(train_job("rl", **prepared), tmp_path / "data")
    materialise(train_job("rl", **prepared, truth="relative"), tmp_path / "data")


def test_validation_sets_are_named_in_the_rows_of_rl_and_kept_apart_for_sft(tmp_path: Path) -> None:
    root = materialise(train_job("rl", shapes=SHAPES), tmp_path / "a").images[0].parent
    val, test = (str(root / f"eval_data/refcoco_{part}.jsonl") for part in ("val", "testA"))
    files = {"train": [str(root / "train_data/rl.json")], "images": [str(root / "images")]}
    sets = {"v": [val], "t": [test]}
    named = materialise(train_job("rl", validation_sets=sets, **files), tmp_path / "b")
    rows = pq.read_table(named.val_parquet, columns=["data_source"]).column(0).to_pylist()
    assert set(rows) == {"grounding:v", "grounding:t"}
    plain = materialise(train_job("rl", validation=[val, test], **files), tmp_path / "b")
    assert plain.val_parquet != named.val_parquet
    sft_file = str(root / "train_data/sft.json")
    job = train_job("sft", train=[sft_file], images=files["images"], validation_sets={"v": [sft_file]})
    assert materialise(job, tmp_path / "c").sft_validation == (("v", Path(sft_file)),)
    with pytest.raises(UserError, match="no such file"):
        materialise(train_job("sft", train=[sft_file], validation=[val + "x"]), tmp_path / "d")


def test_sft_s_mixture_is_a_file_of_its_own_and_another_seed_makes_another(tmp_path: Path) -> None:
    file = tmp_path / "sft.json"
    turns = [{"from": "human", "value": "<image>where"}, {"from": "gpt", "value": "there"}]
    file.write_text(json.dumps([{"image": f"{n}.png", "conversations": turns} for n in range(40)]))
    job = train_job("sft", train=[str(file)], weights=[1.5])
    rows = materialise(job, tmp_path / "data").sft_rows
    assert rows is not None and rows != file and len(json.loads(rows.read_text())) == 60
    job.spec.seed = 43
    other = materialise(job, tmp_path / "data").sft_rows
    assert other is not None and other.read_bytes() != rows.read_bytes()
