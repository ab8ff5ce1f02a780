from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from grounding.data.jobdata import locate, materialise, sources
from grounding.data.shapes import EIGHT_FILES
from grounding.errors import UserError

SHAPES = SimpleNamespace(seed=7, train=12, per_file=10, size=64)


def train_job(method: str, **data: Any) -> Any:
    fields = {"train": [], "validation": [], "images": [], "prepared": None, "prompt": "qwen3", "shapes": None}
    spec = SimpleNamespace(method=method, seed=42, data=SimpleNamespace(**{**fields, **data}))
    return SimpleNamespace(kind="GroundingTrainJob", spec=spec)


def eval_job(**data: Any) -> Any:
    fields = {"files": [], "root": None, "images": [], "shapes": None}
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
    other = SimpleNamespace(seed=8, train=12, per_file=10, size=64)
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
    for name in ("a.json", "b.json", "train.parquet", "val.parquet", "refcoco_val.jsonl", "x.jsonl"):
        (tmp_path / name).write_text("[1]")
    (tmp_path / "img").mkdir()
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
    assert not (tmp_path / "cache").exists(), "nothing is fetched by looking"


def test_each_role_asks_for_what_it_reads(tmp_path: Path) -> None:
    rl = train_job("rl", train=["s3://b/rl.json"], validation=["s3://b/v.jsonl"], images=["s3://b/coco.tar"])
    assert [s for s, _ in sources(rl, prepares=True)] == ["s3://b/rl.json", "s3://b/v.jsonl", "s3://b/coco.tar"]
    assert sources(rl, prepares=False) == [], "RL reads the copies that preparation has made"
    sft = train_job("sft", train=["s3://b/1.json", "s3://b/2.json"], images=["i"])
    assert [f for _, f in sources(sft, prepares=True)][:2] == ["spec.data.train[0]", "spec.data.train[1]"]
    assert [s for s, _ in sources(sft, prepares=False)] == ["i"], "several files were merged into one"
    assert [s for s, _ in sources(train_job("rl", prepared="s3://b/p/train.parquet"), prepares=False)] == [
        "s3://b/p/train.parquet",
        "s3://b/p/val.parquet",
    ]
    assert sources(eval_job(shapes=SHAPES), prepares=True) == []


def test_a_split_tar_is_named_as_a_whole(tmp_path: Path) -> None:
    for name in ("coco.tar.part_aa", "coco.tar.part_ab", "a.json"):
        (tmp_path / name).write_bytes(b"[1]")
    job = train_job("sft", train=[str(tmp_path / "a.json")], images=[str(tmp_path / "coco.tar")])
    assert materialise(job, tmp_path / "data").images == (tmp_path / "coco.tar",)
