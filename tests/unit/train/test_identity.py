"""Another job's work in a folder, a claim or a store is never used as this job's work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.api import TrainSpec, parse, resolve
from grounding.data.jobdata import JobData
from grounding.errors import Failure, UserError
from grounding.files import publish
from grounding.train import identity, rank0
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from grounding.train.identity import APPLIED, IGNORED, Identity

BASE: dict[str, Any] = {
    "seed": 42,
    "hyperparameters.batchSize": 8,
    "hyperparameters.learningRate": 3e-3,
    "hyperparameters.maxSteps": 8,
}


def _who(model: str = "m" * 64, data: str = "d" * 64, **fields: Any) -> Identity:
    return Identity({**BASE, **{f"hyperparameters.{k}": v for k, v in fields.items()}}, model, data, "code")


def _job(tmp_path: Path, output: str = "") -> Any:
    text = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: a}
spec: {preset: tiny-sft, data: {shapes: {}}}
"""
    job = resolve(parse(text)[0])
    return job.model_copy(update={"spec": job.spec.model_copy(update={"output": output})}) if output else job


def _checkpoint(out: Path, step: int) -> None:
    folder = out / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * step)
    checkpoints.mark_complete(folder)


def _finish(out: Path) -> None:
    with publish(out / "model", identity.facts(out)) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"learningRate": 1e-5}, True),
    ({"schedule": "linear"}, True),
    ({"warmupSteps": 3}, True),
    ({"maxSteps": 12}, True),
    ({"batchSize": 16}, False),
    ({"dtype": "float16"}, False),
    ({"weightDecay": 0.1}, False),
    ({"model": "x" * 64}, False),
    ({"data": "x" * 64}, False),
]


@pytest.mark.parametrize("place", ["folder", "claim", "store"])
@pytest.mark.parametrize(("change", "allowed"), CHANGES)
def test_a_changed_job_continues_only_by_the_list(
    tmp_path: Path, place: str, change: dict[str, Any], allowed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """During a training, allowed changes continue it. After its end, old results are never reported for the new job."""
    output = str(tmp_path / "store") if place == "store" else "pvc://claim/x" if place == "claim" else ""
    job, one = _job(tmp_path, output), tmp_path / "one"
    two = tmp_path / "two" if place == "store" else one  # with a store, the second attempt has an empty disk

    def attempt(out: Path, who: Identity, work: Any) -> None:
        with rank0.surrounded(job, out, 0, who=who):
            work(out)

    attempt(one, _who(), lambda out: _checkpoint(out, 4))
    if allowed:
        attempt(two, _who(**change), lambda out: None)
        said = capsys.readouterr().out
        assert "the job has changed and continues with the new value" in said and next(iter(change)) in said
        assert identity.read(two / identity.FILE) == _who(**change)
    else:
        with pytest.raises(UserError, match=r"contains the work of another job") as refused:
            attempt(two, _who(**change), lambda out: None)
        assert "--restart" in refused.value.hint and "spec.output" in refused.value.hint
        assert not (two / "model").exists()


@pytest.mark.parametrize("output", ["", "store"])
@pytest.mark.parametrize(("change", "allowed"), CHANGES)
def test_a_finished_run_is_no_other_job_s(tmp_path: Path, output: str, change: dict[str, Any], allowed: bool) -> None:
    job = _job(tmp_path, str(tmp_path / output) if output else "")
    one, two = tmp_path / "one", tmp_path / ("two" if output else "one")
    with rank0.surrounded(job, one, 0, who=_who()):
        _checkpoint(one, 8)
        _finish(one)
    with rank0.surrounded(job, two, 0, who=_who()):  # the same job must still be accepted
        assert checkpoints.peek(two / "checkpoints") is not None
    with pytest.raises(UserError, match="another job"), rank0.surrounded(job, two, 0, who=_who(**change)):
        pass


@pytest.mark.parametrize("what", ["model", "checkpoint"])
def test_a_folder_of_an_unknown_job_does_not_end_this_one(tmp_path: Path, what: str) -> None:
    if what == "model":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
    else:
        _checkpoint(tmp_path, 4)
    with (
        pytest.raises(UserError, match="no record of the job"),
        rank0.surrounded(_job(tmp_path), tmp_path, 0, who=_who()),
    ):
        pass


def test_restart_sets_the_old_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path, str(tmp_path / "store"))
    with rank0.surrounded(job, tmp_path / "one", 0, who=_who()):
        _checkpoint(tmp_path / "one", 8)
        _finish(tmp_path / "one")
    monkeypatch.setenv("EGM_RESTART", "wish-1")
    other = _who(batchSize=16)
    for attempt in (1, 2):  # the second attempt of the same request continues
        with rank0.surrounded(job, tmp_path / "one", 0, who=other):
            newest = checkpoints.peek(tmp_path / "one" / "checkpoints")
            assert (newest.step if newest else 0) == (0 if attempt == 1 else 4)
            if attempt == 1:
                _checkpoint(tmp_path / "one", 4)
    for place in ("one", "store"):
        old = tmp_path / place / "previous" / "1"
        assert (old / "model/config.json").exists() and list((old / "checkpoints").rglob("complete.json"))
    found = uploads.restore(uploads.open_store(tmp_path / "store"), tmp_path / "three")
    assert found is not None and found.step == 4


def test_steps_beyond_a_lowered_max_steps(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 8)
    newest = checkpoints.peek(tmp_path / "checkpoints")
    identity.refuse_steps_beyond(newest, 8)
    with pytest.raises(UserError, match="8 steps are already trained, but the job wants 6") as refused:
        identity.refuse_steps_beyond(newest, 6)
    assert refused.value.field == "spec.hyperparameters.maxSteps"


HOLD = """
import sys
from pathlib import Path
from grounding.train import identity
with identity.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        words = f"another process trains in this folder .process {first.pid} on"
        with pytest.raises(UserError, match=words), identity.locked(tmp_path, patience_s=0.3):
            pass
        monkeypatch.setenv("EGM_TERMINATION_LOG", str(tmp_path / "log"))
        with pytest.raises(Failure, match=words), identity.locked(tmp_path, patience_s=0.3):
            pass
        first.kill()
    with identity.locked(tmp_path, patience_s=5.0):
        assert f"process {os.getpid()}" in (tmp_path / identity.LOCK).read_text()


def test_the_content_decides_not_the_path(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, fill in ((one, b"a"), (two, b"a")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(fill * 1000)
        (folder / "config.json").write_text("{}")
    assert identity.model_digest(str(one)) == identity.model_digest(str(two))
    (two / "model.safetensors").write_bytes(b"a" * 500 + b"b" + b"a" * 499)
    assert identity.model_digest(str(one)) != identity.model_digest(str(two))


def _png(path: Path, colour: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (16, 16), colour).save(path)


def _sft(folder: Path) -> JobData:
    folder.mkdir()
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": f"{i}.png", "conversations": turns} for i in range(3)]
    (folder / "rows.json").write_bytes(orjson.dumps(rows))
    for i in range(3):
        _png(folder / "img" / f"{i}.png", 10 * i)
    return JobData(sft_rows=folder / "rows.json", images=(folder / "img",))


def _rl(folder: Path) -> JobData:
    folder.mkdir()
    for i in range(2):
        _png(folder / "img" / f"{i}.png", 10 * i)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    embedded = [{"bytes": b"picture", "path": "x.png"}]
    named = [[{"bytes": None, "path": str(folder / f"img/{i}.png")}] for i in range(2)]
    table = pa.table({"prompt": ["a", "b", "c"], "images": pa.array([*named, embedded], pa.list_(kind))})
    pq.write_table(table, folder / "train.parquet")
    return JobData(train_parquet=folder / "train.parquet")


@pytest.mark.parametrize("make", [_sft, _rl])
def test_swapped_pictures_and_rows_are_another_identity_wherever_they_are(tmp_path: Path, make: Any) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    first = identity.data_digest(one)
    assert identity.data_digest(two) == first, "the digest must not depend on the folder"
    _png(tmp_path / "one/img/not-named.png", 99)
    assert identity.data_digest(one) == first, "the digest must not depend on a picture that no row names"
    _png(tmp_path / "one/img/1.png", 77)
    assert (tmp_path / "one/img/1.png").stat().st_size == (tmp_path / "two/img/1.png").stat().st_size
    second = identity.data_digest(one)
    assert second != first
    rows = one.sft_rows or one.train_parquet
    if rows.suffix == ".json":
        rows.write_bytes(rows.read_bytes().replace(b'"a"', b'"b"'))
    else:
        table = pq.read_table(rows).to_pylist()
        table[2]["images"][0]["bytes"] = b"another"
        pq.write_table(pa.Table.from_pylist(table, pq.read_schema(rows)), rows)
    assert identity.data_digest(one) not in (first, second)


LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3)
NAMES = st.sampled_from(["a", "b", "resources", "tracking", "output"])
DOCUMENTS = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=8)


@given(spec=st.dictionaries(NAMES, DOCUMENTS, max_size=4), other=DOCUMENTS)
def test_what_does_not_decide_changes_nothing(spec: dict[str, Any], other: Any) -> None:
    changed = {**spec, "resources": other, "tracking": other}
    assert identity.deciding(spec) == identity.deciding(changed)
    assert orjson.loads(orjson.dumps(identity.deciding(spec))) == identity.deciding(spec)


@pytest.mark.parametrize(
    ("field", "value", "begun", "done"),
    [
        ("hyperparameters", {"learningRate": 1e-5}, True, False),
        ("hyperparameters", {"saveEvery": 3}, True, True),
        ("hyperparameters", {"batchSize": 3}, False, False),
        ("output", "s3://a/b", True, True),
        ("data", {"train": ["other.json"]}, False, False),
        ("data", {"validation": ["other.jsonl"]}, True, True),
        ("model", {"source": "hf://a/b"}, False, False),
    ],
)
def test_which_descriptions_are_one_job_s(field: str, value: Any, begun: bool, done: bool) -> None:
    before = {"seed": 1, "hyperparameters": {"learningRate": 1e-3, "saveEvery": 2, "batchSize": 2}}
    one = identity.description(before, finished=False), identity.description(before, finished=True)
    changed = {**before, field: {**before.get(field, {}), **value} if isinstance(value, dict) else value}  # type: ignore[dict-item]
    two = identity.description(changed, finished=False), identity.description(changed, finished=True)
    assert (one[0] == two[0], one[1] == two[1]) == (begun, done)


def test_the_lists_name_fields_that_exist() -> None:
    schema = orjson.dumps(TrainSpec.model_json_schema(by_alias=True)).decode()
    for name in (*IGNORED, *APPLIED):
        assert f'"{name.rpartition(".")[2]}"' in schema, name


def test_work_of_a_release_without_a_field_continues_with_what_that_release_trained_with() -> None:
    from grounding.train.identity import ADDED, changes

    old = _who()
    new = Identity({**old.fields, **ADDED}, old.model, old.data)
    assert changes(old, new) == []
    other = Identity({**new.fields, "hyperparameters.clipRange.high": 0.28}, old.model, old.data)
    assert [(c.field, c.old, c.new) for c in changes(old, other)] == [
        ("spec.hyperparameters.clipRange.high", 0.2, 0.28)
    ]
    assert [c.new for c in changes(other, old)] == [None] * len(changes(other, old))
