"""Durable files are complete or absent, even if the disk fails or is full."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.files import (
    Appender,
    atomic_write,
    complete_lines,
    damaged,
    is_published,
    publish,
    read_json,
    read_jsonl,
    read_manifest,
)


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
from grounding.errors import UserError
from grounding.files import (
    Appender,
    atomic_write,
    complete_lines,
    damaged,
    is_published,
    publish,
    read_json,
    read_jsonl,
    read_manifest,
)
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
    """On a disk with room for twelve bytes, only half of the second line fits."""
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


def _publish(folder: Path, content: bytes, names: tuple[str, ...] = ("a.bin", "sub/b.bin")) -> None:
    with publish(folder, {"by": "test"}) as target:
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)


ROWS = b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(ROWS, mtime=0), "compressed by gzip"),
        (ROWS.decode().encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04 and so on", "a zip archive"),
        (b"PAR1 and so on", "a parquet file"),
        (b'[{"a": 1}, {"a": 2}]', "ends in .json"),
        (b'{"a": "caf\xe9"}\n', "not UTF-8"),
    ],
)
def test_what_is_no_file_of_json_lines_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_jsonl(path))
    assert says in f"{error.value.message} {error.value.hint}" and "surrogates" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ROWS)
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_published_folder_is_replaced_whole_and_says_what_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    _publish(folder, b"one")
    _publish(folder, b"two", ("a.bin",))
    manifest = read_manifest(folder)
    assert manifest is not None and set(manifest.files) == {"a.bin"} and manifest.facts == {"by": "test"}
    assert is_published(folder) and sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    (folder / "a.bin").write_bytes(b"tw0")  # only the content differs, not the size
    assert is_published(folder) and damaged(folder) == ["a.bin"]
    (folder / "a.bin").write_bytes(b"")
    assert not is_published(folder)


@pytest.mark.parametrize("name", ["precious.txt", ".hidden", "sub/precious.txt", "empty/"])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_publish_has_not_written_is_never_deleted(tmp_path: Path, name: str, earlier: bool) -> None:
    folder = tmp_path / "out"
    if earlier:
        _publish(folder, b"one")
    path = folder / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=name.split("/")[0]):
        _publish(folder, b"two")
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


PUBLISH = """
import sys
from pathlib import Path
from grounding.files import publish
with publish(Path(sys.argv[1])) as folder:
    (folder / "a.bin").write_bytes(b"two")
"""


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("place", ["written", "synced", "manifest", "rename", "renamed"])
def test_killed_between_any_two_writes_there_is_the_old_folder_or_the_new(
    tmp_path: Path, place: str, earlier: bool
) -> None:
    folder = tmp_path / "model"
    if earlier:
        _publish(folder, b"one")
    env = {**os.environ, "EGM_FAILPOINTS": f"publish.{place}:model=kill"}
    if place == "synced":
        env["EGM_FAILPOINTS"] = "publish.synced=kill"
    done = subprocess.run([sys.executable, "-c", PUBLISH, str(folder)], env=env, check=False)
    assert done.returncode == -9
    if folder.exists():
        assert is_published(folder) and not damaged(folder)
        assert (folder / "a.bin").read_bytes() == (b"two" if place == "renamed" else b"one")
    _publish(folder, b"three")
    assert not damaged(folder) and [p.name for p in tmp_path.iterdir()] == ["model"]
