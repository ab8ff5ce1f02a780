"""A disk that fills up during an evaluation: one paragraph, exit code 1, nothing lost, and the same command continues."""

import os
import resource
import subprocess

import pytest
from misbehaving import ROWS, steady

from grounding.evaluate.results.writer import read_rows


def stops_and_goes_on(server, start, finish, out, reference, words, make_room, **limits):
    before = server.count
    child = start(out, **limits)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1 and words in errors and "Traceback" not in errors, errors
    assert "same command again" in errors and len(errors.strip().splitlines()) <= 3, errors
    kept = [r["key"] for r in read_rows(out)]
    assert 0 < len(kept) == len(set(kept)) < ROWS
    make_room()
    asked = server.count
    assert steady(finish(out)) == steady(reference)
    assert server.count - asked == ROWS - len(kept)  # answered questions are not asked again
    assert server.count - before <= ROWS + 8


def test_a_file_that_may_not_grow(data, server, start, finish):
    reference = finish(data / "reference")

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    words = "has reached the size limit"
    stops_and_goes_on(server, start, finish, data / "out", reference, words, lambda: None, preexec_fn=small)


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this test mounts a small disk, which needs more rights")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(data, server, start, finish, tiny_disk):
    reference = finish(data / "reference")

    def make_room():
        subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)

    words = "no space is left on the disk"
    stops_and_goes_on(server, start, finish, tiny_disk / "out", reference, words, make_room)
