"""Results of a job are never continued for another job, not even for a model that was trained again under the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from grounding.api import parse, resolve
from grounding.errors import UserError
from grounding.evaluate import ownership
from grounding.evaluate.ownership import Owner, changes, enter, owner
from grounding.files import publish

JOB = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: eval}
spec:
  model: {trainJob: egm8b-rl}
  data: {files: [a.jsonl], images: [c.tar]}
"""


def _job(*more: str):  # type: ignore[no-untyped-def]
    return resolve(parse(JOB + "".join(f"  {line}\n" for line in more))[0])


def _model(folder: Path, weights: bytes) -> Path:
    with publish(folder) as made:
        (made / "config.json").write_text("{}")
        (made / "model.safetensors").write_bytes(weights)
    return folder


def _part(out: Path) -> None:
    (out / "results").mkdir(parents=True)
    (out / "results" / "part-00000.jsonl").write_text('{"key": "a"}\n')


def test_a_model_trained_again_under_its_name_is_refused_here_and_in_the_store(tmp_path: Path) -> None:
    out, store, model = tmp_path / "out", tmp_path / "store", tmp_path / "model"
    first = owner(_job(), str(_model(model, b"one")))
    assert first.content.startswith("manifest:") and enter(out, str(store), first) == []
    _part(out)
    enter(out, str(store), owner(_job(), str(model)))
    second = owner(_job(), str(_model(model, b"two")))
    with pytest.raises(UserError, match=r"the content of spec.model: \w{16} there, \w{16} in this job"):
        enter(out, str(store), second)
    _part(store)
    with pytest.raises(UserError, match="has results of another job") as refused:
        enter(tmp_path / "elsewhere", str(store), second)
    assert "egm run --restart" in str(refused.value)


def test_a_wish_to_start_anew_sets_the_results_aside_once(tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    enter(out, str(store), Owner({"model": "m"}, "files:1"))
    _part(out)
    _part(store)
    moved = enter(out, str(store), Owner({"model": "m"}, "files:2"), token="a")
    assert len(moved) == 2 and (out / "previous/1/results/part-00000.jsonl").is_file()
    assert (store / "previous/1/results/part-00000.jsonl").is_file() and not list((store / "results").glob("*"))
    _part(out)
    assert enter(out, str(store), Owner({"model": "m"}, "files:2"), token="a") == [], (
        "the earlier results must be set aside only once for each request"
    )


def test_other_prompt_or_sampling_is_refused_and_scoring_or_place_is_not() -> None:
    plain = owner(_job(), "")
    assert plain.content == ""
    assert changes(plain, owner(_job("scoring: vlmevalkit", "concurrency: 8", "output: s3://a/b"), "")) == []
    assert changes(plain, owner(_job("prompt: amodal"), "")) == ['spec.prompt: "qwen3" there, "amodal" in this job']
    (found,) = changes(plain, owner(_job("sampling: {temperature: 0.5}"), ""))
    assert found.startswith("spec.sampling: ")


def test_what_is_not_known_of_a_model_is_no_difference() -> None:
    known, other = Owner({"model": "m"}, "manifest:aa"), Owner({"model": "m"}, "files:bb")
    assert changes(known, other) == changes(Owner({"model": "m"}), known) == changes(known, Owner({"model": "m"})) == []
    moved = Owner({"model": "n"}, "manifest:aa")
    assert changes(known, moved) == [], "expected no change, because the content at the new place is the same"
    assert changes(Owner({"model": "m"}), Owner({"model": "n"})) == ['spec.model: "m" there, "n" in this job']


def test_results_of_an_older_version_have_no_record_and_are_continued(tmp_path: Path) -> None:
    _part(tmp_path)
    assert enter(tmp_path, "", Owner({"model": "m"})) == []
    assert Owner.parse((tmp_path / ownership.FILE).read_bytes()) == Owner({"model": "m"})
    assert Owner.parse(b"{}") is None and Owner.parse(b"[1]") is None
