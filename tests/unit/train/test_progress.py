"""One line a step, whatever was trained again."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.train.progress import ProgressWriter, new_lines, parse_lines, read_progress


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
