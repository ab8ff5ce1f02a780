"""Old work is moved once per request, completely and to one place, even if a process is killed meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grounding.storage import open_store
from grounding.storage.aside import RECORD, set_aside, set_aside_folder

WORK = ("checkpoints", "model", "progress.jsonl")
CHILD = """
import sys
from pathlib import Path
from grounding.storage import open_store
from grounding.storage.aside import set_aside, set_aside_folder
work = ("checkpoints", "model", "progress.jsonl")
if sys.argv[1] == "store":
    set_aside(open_store(sys.argv[2]), "wish", work, lambda name: name.endswith("marker"))
else:
    set_aside_folder(Path(sys.argv[2]), "wish", work)
"""


def _fill(folder: Path) -> dict[str, bytes]:
    files = {
        "checkpoints/a/x": b"1",
        "checkpoints/a/marker": b"2",
        "checkpoints/a/.metadata": b"6",
        "model/w": b"3",
        "progress.jsonl": b"4",
        "other": b"5",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def _files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != RECORD}


@pytest.mark.parametrize("kind", ["store", "folder"])
@pytest.mark.parametrize("visit", [1, 2, 3])
def test_a_kill_halfway_is_finished_at_the_same_place(tmp_path: Path, kind: str, visit: int) -> None:
    files = _fill(tmp_path)
    rule = {"EGM_FAILPOINTS": f"aside.moved@{visit}=kill"}
    child = [sys.executable, "-c", CHILD, kind, str(tmp_path)]
    assert subprocess.run(child, env={**os.environ, **rule}, check=False).returncode == -9
    subprocess.run(child, check=True)
    wanted = {name if name == "other" else f"previous/1/{name}": data for name, data in files.items()}
    assert _files(tmp_path) == wanted


def test_each_wish_moves_once_and_another_goes_to_the_next_place(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    _fill(tmp_path)
    assert set_aside(store, "a", WORK) == f"{store.uri}/previous/1"
    _fill(tmp_path)
    assert set_aside(store, "a", WORK) == "", "expected no move, because this request was carried out before"
    assert (tmp_path / "model/w").is_file()
    assert set_aside_folder(tmp_path, "b", WORK) == str(tmp_path / "previous/2")
    (tmp_path / RECORD).write_text("[]")
    assert set_aside_folder(tmp_path, "b", WORK) == "", "expected no move, because the folder holds no work"


def test_a_record_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    _fill(tmp_path / "job")
    (tmp_path / "job" / RECORD).write_text('{"token": "a", "target": "../away", "done": false}')
    assert set_aside_folder(tmp_path / "job", "a", WORK) == str(tmp_path / "job/previous/1")
    assert not (tmp_path / "away").exists()
