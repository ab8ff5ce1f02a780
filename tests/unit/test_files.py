"""Durable files: whole or not at all, whatever happens to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.files import Appender, atomic_write, complete_lines, read_json, read_jsonl


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as f:
        f.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        with atomic_write(pipe) as f:
            f.write(b"through")
        assert reader.communicate()[0] == b"through"
    assert pipe.is_fifo()


def test_a_full_disk_is_named() -> None:
    with pytest.raises(OSError) as caught, atomic_write("/dev/full") as f:
        f.write(b"x")
    assert caught.value.filename == "/dev/full" and not Path("/dev/full").is_file()


FULL = """
import resource, sys
from grounding.files import Appender
a = Appender(sys.argv[1])
a.write({"n": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (12, resource.RLIM_INFINITY))
try:
    a.write({"n": 2})
except OSError as e:
    assert e.filename == sys.argv[1]
else:
    raise SystemExit("wrote beyond the limit")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
a.write({"n": 3})
a.close()
"""


def test_a_line_that_did_not_fit_is_taken_back(tmp_path: Path) -> None:
    """Twelve bytes: the second line fits by half, as on a disk that fills up."""
    part = tmp_path / "part.jsonl"
    subprocess.run([sys.executable, "-c", FULL, str(part)], check=True)
    assert part.read_bytes() == b'{"n":1}\n{"n":3}\n'


@given(st.lists(st.dictionaries(st.text(), st.integers(0, 9))), st.integers(0, 400))
def test_a_part_cut_anywhere_goes_on(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, int]], cut: int
) -> None:
    part = tmp_path_factory.mktemp("p") / "part.jsonl"
    data = b"".join(orjson.dumps(r) + b"\n" for r in rows)
    part.write_bytes(data[: max(0, len(data) - cut)])
    whole = list(complete_lines(part))
    assert whole == rows[: len(whole)]
    with Appender(part) as a:
        a.write({"last": 1})
    after = list(complete_lines(part))
    assert after[: len(whole)] == whole and after[-1] == {"last": 1}


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(Exception, match=r"a\.jsonl:3: not valid JSON"):
        list(read_jsonl(path))
    path.write_text("[1,")
    with pytest.raises(Exception, match=r"a\.jsonl:1: not valid JSON"):
        read_json(path)
