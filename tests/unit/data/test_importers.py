"""Public formats of grounding data: each gives the same rows, and no code in a file is run."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.cli import run as egm
from grounding.data.importers import import_files, load_plain_pickle, recognise
from grounding.data.lint import lint
from grounding.data.prepare import prepare
from grounding.data.records import read_expressions
from grounding.errors import UserError
from grounding.train.sft.data import load_rows

SIZE = (200, 100)
ROWS = [(f"pic/{i % 2}.png", f"the dog number {i}", (10.0 + i, 20.0, 60.0 + i, 80.0)) for i in range(4)]
EXPECTED = [(image, sent, box, *SIZE) for image, sent, box in ROWS]


def xywh(box: Any) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def thousand(box: Any) -> list[float]:
    return [box[0] * 5, box[1] * 10, box[2] * 5, box[3] * 10]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "img/pic").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", SIZE, (i, 0, 0)).save(tmp_path / f"img/pic/{i}.png")
    return tmp_path / "img"


def write_lmms(root: Path) -> Path:
    rows = []
    for image, sent, box in ROWS:
        buffer = io.BytesIO()
        Image.new("RGB", SIZE).save(buffer, "PNG")
        rows.append({"question_id": "0", "image": {"bytes": buffer.getvalue(), "path": image}, "question": "",
                     "answer": [sent], "bbox": xywh(box), "iscrowd": 0, "file_name": image})  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "val-00000-of-00001.parquet")
    return root / "val-00000-of-00001.parquet"


def write_refer(root: Path) -> Path:
    folder = root / "refcoco"
    folder.mkdir()
    names = sorted({image for image, _, _ in ROWS})
    refs = [
        {"ref_id": i, "ann_id": i, "image_id": names.index(image), "split": "val", "file_name": "other.jpg",
         "sentences": [{"sent": sent, "sent_id": i, "tokens": []}]}
        for i, (image, sent, _) in enumerate(ROWS)
    ]  # fmt: skip
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    instances = {
        "images": [{"id": i, "file_name": n, "width": SIZE[0], "height": SIZE[1]} for i, n in enumerate(names)],
        "annotations": [{"id": i, "bbox": xywh(box)} for i, (_, _, box) in enumerate(ROWS)],
    }
    (folder / "instances.json").write_bytes(orjson.dumps(instances))
    return folder / "refs(unc).p"


def write_json(root: Path, name: str, rows: list[Any]) -> Path:
    (root / name).write_bytes(orjson.dumps(rows))
    return root / name


def swift(box: Any, sent: str, image: str, **objects: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>Locate <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    return {"messages": turns, "images": [image], "objects": {"ref": [sent], "bbox": [box], **objects}}


def llama(box: Any, sent: str, image: str) -> dict[str, Any]:
    (x1, y1, x2, y2), ref = box, f"<|object_ref_start|>{sent}<|object_ref_end|>"
    answer = f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    turns = [{"role": "user", "content": f"<image>find {ref}"}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": "be kind"}, *turns], "images": [image]}


def llama_json(box: Any, sent: str, image: str) -> dict[str, Any]:
    answer = f'```json\n[{{"bbox_2d": {list(box)}, "label": "x"}}]\n```'
    question = f"<image>\nLocate {sent}, output its bbox coordinates using JSON format."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "images": [image]}


FORMS: dict[str, Any] = {
    "lmms": (write_lmms, None),
    "refer": (write_refer, None),
    "vlm-r1": (lambda root: write_json(root, "a.json", [
        {"image": i, "problem": "", "normal_caption": s, "solution": list(b), "width": SIZE[0], "height": SIZE[1]} for i, s, b in ROWS]), None),
    "evaluation": (lambda root: write_json(root, "a.json", [
        {"image": i, "sent": s, "bbox": list(b), "width": SIZE[0], "height": SIZE[1]} for i, s, b in ROWS]), None),
    "evaluation xywh": (lambda root: write_json(root, "a.json", [
        {"image": i, "sent": s, "bbox": xywh(b), "width": SIZE[0], "height": SIZE[1]} for i, s, b in ROWS]), "pixels-xywh"),
    "swift": (lambda root: write_json(root, "a.json", [swift(list(b), s, i) for i, s, b in ROWS]), None),
    "swift norm1": (lambda root: write_json(root, "a.json", [
        swift([v / 1000 for v in thousand(b)], s, i, bbox_type="norm1") for i, s, b in ROWS]), None),
    "swift 0..1000": (lambda root: write_json(root, "a.json", [swift(thousand(b), s, i) for i, s, b in ROWS]), "0..1000"),
    "llama-factory": (lambda root: write_json(root, "a.json", [llama(b, s, i) for i, s, b in ROWS]), "pixels"),
    "llama-factory 0..1000": (lambda root: write_json(root, "a.json", [llama(thousand(b), s, i) for i, s, b in ROWS]), "0..1000"),
    "llama-factory json": (lambda root: write_json(root, "a.json", [llama_json(b, s, i) for i, s, b in ROWS]), "pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name: str, tmp_path: Path, pictures: Path) -> None:
    write, space = FORMS[name]
    path = write(tmp_path)
    assert recognise(path) == name.split()[0]
    made = import_files([path], [pictures], tmp_path / "out", space=space)
    (file,) = made.files
    assert made.files[file] == len(ROWS)
    found = [(e.image, e.sent, tuple(round(v, 6) for v in e.bbox), e.width, e.height) for e in read_expressions(file)]
    assert found == EXPECTED
    images = tmp_path / "out/images" if made.pictures else pictures
    assert lint([file], [images], 2) == (len(ROWS), [])
    if name == "refer":
        assert file.name == "refcoco_val.jsonl"


def test_targets_for_training(tmp_path: Path, pictures: Path) -> None:
    path = FORMS["evaluation"][0](tmp_path)
    (rl,) = import_files([path], [pictures], tmp_path / "rl", target="rl").files
    assert prepare([rl], [], [pictures], tmp_path / "out").train == len(ROWS)
    row = pq.read_table(tmp_path / "out/train.parquet").to_pylist()[0]
    assert row["reward_model"]["ground_truth"] == thousand(ROWS[0][2])
    (sft,) = import_files([path], [pictures], tmp_path / "sft", target="sft").files
    answer = load_rows(sft)[0].gpt
    assert answer == '```json\n[\n\t{"bbox_2d": [50, 200, 300, 800], "label": "the dog number 0"}\n]\n```'


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/egm-was-here",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"ref_id": Evil()}], protocol=protocol))
    with pytest.raises(UserError, match=r"plain values(.|\n)*can run code"):
        load_plain_pickle(path)
    for value in (b"", b"garbage", pickle.dumps([1])[:-1], b"cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(value)
        with pytest.raises(UserError):
            load_plain_pickle(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(value=plain, protocol=st.integers(0, 5))
def test_plain_values_come_back(value: Any, protocol: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert load_plain_pickle(path) == value


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": 1}, "the format of these rows is unknown"),
        (swift([1, 2, 3], "dog", "pic/0.png"), r"a.json:1: objects.bbox: expected four numbers"),
        (swift([1, 2, 3, 4], "dog", "pic/9.png"), r"a.json:1: image: no image"),
        (swift([1, 2, 3, 4], "dog", "pic/0.png", bbox_type="odd"), "objects.bbox_type"),
        (swift([500, 200, 900, 800], "dog", "pic/0.png"), r"outside the picture of 200 x 100(.|\n)*--boxes"),
        (llama([1, 2, 3, 4], "dog", "pic/0.png"), r"--boxes: these rows do not say"),
        ({"image": "pic/0.png", "sent": "dog"}, "expected the image's width"),
    ],
)
def test_mistakes_are_named(row: Any, words: str, tmp_path: Path, pictures: Path) -> None:
    path = write_json(tmp_path, "a.json", [row])
    with pytest.raises(UserError, match=words):
        import_files([path], [pictures], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    path = FORMS["llama-factory"][0](tmp_path)
    command = ["data", "import", str(path), "--images", str(pictures), "--out", str(tmp_path / "out")]
    assert egm(command) == 2 and "--boxes" in capsys.readouterr().err
    assert egm([*command, "--boxes", "pixels"]) == 0
    assert "4 rows" in capsys.readouterr().out


def test_shards_of_a_folder_are_one_file(tmp_path: Path, pictures: Path) -> None:
    data = tmp_path / "hub/data"
    data.mkdir(parents=True)
    whole = pq.read_table(write_lmms(tmp_path))
    for number, part in enumerate((whole.slice(0, 1), whole.slice(1))):
        pq.write_table(part, data / f"val-{number:05d}-of-00002.parquet")
    pq.write_table(whole.slice(0, 2), data / "testA-00000-of-00001.parquet")
    assert egm(["data", "import", str(tmp_path / "hub"), "--out", str(tmp_path / "out")]) == 0
    found = {path.stem: [e.sent for e in read_expressions(path)] for path in sorted((tmp_path / "out").glob("*.jsonl"))}
    assert found == {"testA": [r[1] for r in ROWS[:2]], "val": [r[1] for r in ROWS]}
    with pytest.raises(UserError, match="no files of rows"):
        import_files([pictures], [], tmp_path / "none")
    with pytest.raises(UserError, match="no such file"):
        import_files([tmp_path / "absent.json"], [], tmp_path / "none")
