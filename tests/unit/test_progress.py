"""There is one line per step, even if steps were trained again."""

from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.progress import ProgressWriter, new_lines, parse_lines, progress_line, read_progress, stitch, validated
from grounding.train.rl.resume import history


def test_lines_of_steps_trained_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    first = ProgressWriter(path, "rl", 6, 0, clock=lambda: 1.0)
    for step in range(1, 6):
        first.step(step, {"score": step / 10})
    first.close()
    second = ProgressWriter(path, "rl", 6, 3, clock=lambda: 2.0)
    assert [line["step"] for line in read_progress(path)] == [1, 2, 3]
    for step in range(4, 7):
        second.step(step, {"score": 1.0, "loss": float("nan")})
    second.close()
    lines = read_progress(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1] == {
        "time": 2.0,
        "stage": "rl",
        "step": 6,
        "totalSteps": 6,
        "metrics": {"score": 1.0, "loss": None},
    }


def test_a_line_cut_short_by_a_crash_is_not_read_and_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b'{"step": 1, "metrics": {}}\n{"step": 2, "met')
    assert [line["step"] for line in read_progress(path)] == [1]
    writer = ProgressWriter(path, "sft", 9, 1)
    writer.step(2, {})
    writer.close()
    assert [line["step"] for line in read_progress(path)] == [1, 2]


@pytest.mark.parametrize("field", ["time", "stage", "totalSteps", "metrics"])
@pytest.mark.parametrize("value", [None, "many", [1], {"loss": "low"}, {"loss": True}])
def test_a_field_of_a_wrong_type_is_left_out_and_the_rest_is_read(field: str, value: object) -> None:
    line = progress_line(1.0, "rl", 3, 9, {"score": 0.5})
    if field == "metrics" and isinstance(value, dict):
        [found] = validated([{**line, "metrics": {"score": 0.5, **value}}])
        assert found == line
    elif field == "stage" and value == "many":
        assert list(validated([{**line, "stage": value}])) == [{**line, "stage": "many"}]
    else:
        [found] = validated([{**line, field: value}])
        assert found == {name: kept for name, kept in line.items() if name != field}


@pytest.mark.parametrize("step", [None, "last", 1.5, [1], {}])
def test_a_line_without_a_step_is_no_line(tmp_path: Path, step: object) -> None:
    path = tmp_path / "progress.jsonl"
    lines = [{"step": step}, {"metrics": {}}, {"step": 2.0}, {"step": 1, "future": [1]}]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    assert read_progress(path) == [{"step": 1, "future": [1]}, {"step": 2}]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.binary(max_size=20).filter(lambda b: b"\n" not in b and b"\r" not in b), max_size=10), st.integers(1, 7)
)
def test_new_lines_gives_every_whole_line_once(tmp_path_factory, lines: list[bytes], chunk: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "log"
    data = b"".join(line + b"\n" for line in lines) + b"unfinished"
    path.write_bytes(b"")
    offset, got = 0, []
    for start in range(0, len(data), chunk):
        with path.open("ab") as f:
            f.write(data[start : start + chunk])
        offset, more = new_lines(path, offset)
        got += more
    assert got == [part for line in lines for part in (line + b"\n").splitlines()]


def test_parse_lines_skips_what_is_not_an_object() -> None:
    assert list(parse_lines([b'{"step": 1}', b"[1]", b"Traceback", b""])) == [{"step": 1}]


def test_a_step_that_only_the_trainer_s_file_knows_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    ProgressWriter(path, "rl", 9, 0, clock=lambda: 1.0).step(1, {"score": 0.1})
    known = [progress_line(1.0, "rl", step, 9, {"score": 9.0}) for step in (1, 2, 3)]
    ProgressWriter(path, "rl", 9, 2, clock=lambda: 2.0, known=known).step(3, {"score": 0.3})
    lines = read_progress(path)
    assert [(line["step"], line["metrics"]["score"]) for line in lines] == [(1, 0.1), (2, 9.0), (3, 0.3)]


def test_what_several_know_of_a_step_becomes_one_line(tmp_path: Path) -> None:
    """The checkpoint has the step's metrics, the file has the step's time, and the next run begins with the validation."""
    path = tmp_path / "progress.jsonl"
    ProgressWriter(path, "rl", 9, 0, clock=lambda: 1.0).step(1, {"score": 0.1})
    carried = [progress_line(2.0, "rl", 2, 9, {"score": 0.2, "loss": 0.3})]
    writer = ProgressWriter(path, "rl", 9, 2, clock=lambda: 3.0, known=carried)
    assert [line["step"] for line in read_progress(path)] == [1, 2]
    writer.step(2, {"valAccuracy": 0.5})
    writer.step(3, {"score": 0.4})
    assert [(line["step"], line["metrics"]) for line in map(orjson.loads, path.read_bytes().splitlines())] == [
        (1, {"score": 0.1}),
        (2, {"score": 0.2, "loss": 0.3, "valAccuracy": 0.5}),
        (3, {"score": 0.4}),
    ]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=6))
def test_stitched_steps_are_in_order_once_each_and_from_the_last_attempt(plan: list[tuple[int, int]]) -> None:
    attempts, reached = [], 0
    for number, (origin, steps) in enumerate(plan):
        origin = min(origin, reached)  # an attempt cannot begin behind the last step that was reached
        attempts.append((origin, [(step, number) for step in range(origin + 1, origin + steps + 1)]))
        reached = origin + steps
    history = stitch(attempts)
    assert list(history) == list(range(1, reached + 1))
    for step, number in history.items():
        assert attempts[number][0] < step
        assert not any(attempts[later][0] < step for later in range(number + 1, len(attempts)))


def test_verl_s_files_of_several_attempts(tmp_path: Path) -> None:
    def write(name: str, steps: list[tuple[int, float]]) -> None:
        rows = [orjson.dumps({"step": s, "data": {"critic/score/mean": v}}) for s, v in steps]
        (tmp_path / name).write_bytes(b"\n".join(rows) + b"\n")

    write("metrics-20260101T000000-from-0.jsonl", [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)])
    write("metrics-20260101T000100-from-2.jsonl", [(3, 0.33), (4, 0.4)])
    # the third attempt begins with the validation of step 4, which the previous attempt did not reach
    validation = orjson.dumps({"step": 4, "data": {"val-core/grounding/acc/mean@1": 0.9}})
    (tmp_path / "metrics-20260101T000200-from-4.jsonl").write_bytes(validation + b'\n{"step": 5, "da')
    found = [(line["step"], line["metrics"]["score"]) for line in history(tmp_path, 9)]
    assert found == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.33), (4, 0.4)]
    assert history(tmp_path, 9)[-1]["metrics"] == {"score": 0.4, "valAccuracy": 0.9}
