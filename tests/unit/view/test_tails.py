"""Growing files are read once, line by line, even if they are replaced or truncated."""

from __future__ import annotations

from pathlib import Path

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.view.tails import Tail


def test_only_new_complete_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert list(tail.objects()) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert list(tail.objects()) == [{"a": 1}]
    with path.open("ab") as f:
        f.write(b"}\nno json\n[1]\n")
    read = tail.bytes_read
    assert list(tail.objects()) == [{"a": 2}] and list(tail.objects()) == []
    assert tail.bytes_read - read < 40  # only the incomplete line was read a second time
    assert not tail.replaced()


def test_a_file_that_was_replaced_or_shortened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    tail = Tail(path)
    list(tail.lines())
    path.write_bytes(b'{"a": 1}\n')
    assert tail.replaced()
    tail.reset()
    assert list(tail.objects()) == [{"a": 1}]
    (tmp_path / "b").write_bytes(b'{"a": 1}\n{"b": 5}\n')
    (tmp_path / "b").replace(path)
    assert tail.replaced()
    path.unlink()
    assert tail.replaced()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=30), st.lists(st.integers(1, 40), max_size=60))
def test_pieces_of_any_size_give_every_line_once(values: list[int], sizes: list[int]) -> None:
    import tempfile

    text = b"".join(orjson.dumps({"v": v}) + b"\n" for v in values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        tail, found, at = Tail(path), [], 0
        for size in [*sizes, len(text)]:
            with path.open("ab") as f:
                f.write(text[at : at + size])
            at += size
            found += list(tail.objects())
        assert [o["v"] for o in found] == values
