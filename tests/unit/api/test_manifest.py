"""Every mistake in a manifest is found with its line, and no text causes a traceback."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import PRESETS, ManifestError, check_references, load, load_job, parse, resolve
from grounding.api.manifest import read
from grounding.api.resolved import defaults
from grounding.errors import UserError

JOBS = Path(__file__).parents[3] / "jobs"
GOOD = """apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata:
  name: one
spec:
  preset: tiny-rl
  model: {trainJob: zero}
  data:
    shapes: {seed: 3}
  reward:
    type: mix
  hyperparameters:
    learningRate: 1e-4
"""


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda p: p.name)
def test_the_manifests_of_the_project_are_valid(path: Path) -> None:
    jobs = load(path)
    assert jobs
    check_references(jobs)


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "words"),
    [
        (
            "learningRate: 1e-4",
            "learningRat: 1e-4",
            13,
            "spec.hyperparameters.learningRat",
            "did you mean learningRate",
        ),
        ("learningRate: 1e-4", "learningRate: fast", 13, "spec.hyperparameters.learningRate", "a number, found 'fast'"),
        ("learningRate: 1e-4", "learningRate: 3", 13, "spec.hyperparameters.learningRate", "less than 1, found 3"),
        ("type: mix", "type: mixed", 11, "spec.reward.type", "did you mean mix"),
        ("preset: tiny-rl", "preset: tiny-lr", 6, "spec.preset", "did you mean tiny-rl"),
        ("kind: GroundingTrainJob", "kind: GroundingTrainjob", 2, "kind", "did you mean GroundingTrainJob"),
        ("type: mix", "type: {mix", 12, "", "got ':' (while parsing a flow mapping that begins in line 11)"),
        ("type: mix", "type: mix: 3", 11, "", "not allowed here; quote a value that contains ': '"),
        ("type: mix", "type: @mix", 11, "", "cannot start any token; indent by spaces"),
        ("name: one", "name: One_1", 4, "metadata.name", "expected lower-case letters, digits and -"),
        ("v1alpha1", "v1", 1, "apiVersion", "expected grounding.egm.dev/v1alpha1"),
        ("name: one", "name: One_1", 4, "metadata.name", "'One_1'"),
        ("{trainJob: zero}", "{trainJob: zero, source: /m}", 7, "spec.model", "not both"),
        ("shapes: {seed: 3}", "train: [a.json]", 8, "spec.data", "data.validation"),
        ("type: mix", "type: [mix", 12, "", "not valid YAML"),
        ("  name: one", "  name: one\n  name: two", 5, "", "duplicate key"),
        ("seed: 3", "seed: -", 9, "", ""),
        ("kind: GroundingTrainJob\n", "", 1, "kind", "is missing"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: int, path: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(ManifestError) as caught:
        parse(GOOD.replace(old, new), "job.yaml")
    problem = caught.value.problems[0]
    assert (problem.line, problem.path) == (line, path) or (not path and words in problem.message)
    assert words in problem.message
    assert f"job.yaml:{problem.line}" in str(caught.value) and caught.value.exit_code == 2


def test_all_mistakes_of_a_file_at_once() -> None:
    text = GOOD.replace("type: mix", "typ: mix").replace("learningRate: 1e-4", "learningRate: no\n    rollouts: 1")
    with pytest.raises(ManifestError) as caught:
        parse(text + "---\n" + GOOD.replace("kind: G", "kind: X"), "job.yaml")
    assert [p.line for p in caught.value.problems] == [11, 13, 14, 17]


@pytest.mark.parametrize("text", ["", "\n---\n", "# only a comment\n"])
def test_a_file_without_a_job(text: str) -> None:
    with pytest.raises(UserError, match="contains no job"):
        parse(text)


@pytest.mark.parametrize(("text", "shown"), [("hello\n", "'hello'"), ("- a\n", "a list"), ("3\n", "'3'")])
def test_a_document_that_is_no_job_is_shown(text: str, shown: str) -> None:
    with pytest.raises(UserError, match=f":1: expected a job with kind, metadata and spec, found {shown}$"):
        parse(text)


def test_not_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_gives_jobs_or_a_mistake_with_a_line(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(GOOD)))
    cut = data.draw(st.integers(0, 12))
    put = data.draw(st.text(st.sampled_from(list("abz:{}[]-#&*!|>'\"%@`\n\t ,?0.")), max_size=8))
    try:
        jobs = parse(GOOD[:at] + put + GOOD[at + cut :])
    except ManifestError as error:
        assert error.problems[0].line >= 1 and not str(error).startswith(":")
    else:
        assert jobs


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_fills_and_explicit_fields_win(preset: str) -> None:
    text = GOOD.replace("tiny-rl", preset)
    if PRESETS[preset]["method"] == "sft":
        text = text.replace("  reward:\n    type: mix\n", "")
    job = resolve(parse(text)[0])
    assert job.spec.method == PRESETS[preset]["method"]
    assert job.spec.hyperparameters.learning_rate == 1e-4
    assert job.spec.hyperparameters.batch_size == defaults(job.spec.method, preset)["batchSize"]
    assert job.spec.model.train_job == "zero" and job.spec.model.source is None
    assert resolve(job) == job


def test_a_job_written_out_is_the_same_job() -> None:
    import orjson

    for path in JOBS.glob("*.yaml"):
        for job in load(path):
            written = orjson.dumps(job.model_dump(mode="json", by_alias=True, exclude_none=True)).decode()
            again = parse(written)[0]
            assert again.model_dump() == job.model_dump()


def test_references() -> None:
    with pytest.raises(UserError, match="'zero' is not a GroundingTrainJob"):
        check_references(parse(GOOD))
    ring = GOOD.replace("trainJob: zero", "trainJob: two") + "---\n" + GOOD.replace("name: one", "name: two")
    with pytest.raises(UserError, match="wait for each other"):
        check_references(parse(ring.replace("trainJob: zero", "trainJob: one")))


def test_one_job_of_several(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(GOOD + "---\n" + GOOD.replace("name: one", "name: two"))
    assert load_job(path, "two").metadata.name == "two"
    with pytest.raises(UserError, match="more than one job"):
        load_job(path)
    with pytest.raises(UserError, match="no job 'three'"):
        load_job(path, "three")
    path.write_text(GOOD + "---\n" + GOOD)
    with pytest.raises(UserError, match="name of the job in line 4"):
        load(path)


def test_aliases_that_stand_for_a_billion_values_are_refused():
    lines = ["x0: &x0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ManifestError, match="at most 100,000 values"):
        parse("\n".join(["apiVersion: grounding.egm.dev/v1alpha1", "kind: GroundingTrainJob", *lines]))


def test_a_manifest_that_contains_itself_is_refused():
    with pytest.raises(ManifestError):
        parse("kind: GroundingTrainJob\nx: &x [*x]\n")


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e300,
    "",
    "x",
    "\x1b[2J",
    "9" * 400,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    {"a": [1]},
]
WHOLE = [
    job.model_dump(mode="json", by_alias=True, exclude_none=True)
    for path in sorted(JOBS.glob("*.yaml"))
    for job in load(path)
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a job."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_in_any_place_is_a_job_or_a_mistake_that_is_named(data: st.DataObject) -> None:
    job = copy.deepcopy(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from([p for p in _places(job) if p]))
        at = job
        for step in path:
            at = at[step]
        at[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    found, mistakes = read(job)
    assert (found is None) == bool(mistakes)


@pytest.mark.parametrize("value", [True, 7, {}, "x=1"])
def test_engine_overrides_that_are_no_list(value: Any) -> None:
    job = copy.deepcopy(next(each for each in WHOLE if each["kind"] == "GroundingTrainJob"))
    job["spec"]["hyperparameters"]["engineOverrides"] = value
    _, mistakes = read(job)
    assert any("engineOverrides" in str(mistake) for mistake in mistakes), mistakes


@pytest.mark.parametrize("value", ["[]", "{}", "[tiny-rl]", "3", "{tiny-rl: 1}"])
def test_a_preset_that_is_no_name(value: str) -> None:
    with pytest.raises(ManifestError, match=r"spec\.preset"):
        parse(GOOD.replace("preset: tiny-rl", f"preset: {value}"))
