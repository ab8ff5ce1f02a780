"""URIs, names and local stores; S3 is in tests/s3."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.storage import ProgressLogger, destination, fetch, in_words, is_remote, locate
from grounding.storage.base import clean


def test_what_uris_name(monkeypatch):
    monkeypatch.setenv("EGM_PVC_ROOT", "/mnt/claims")
    assert locate("a/b").path == "a/b" and not is_remote("a/b")
    assert locate("file:///a/b%20c").path == "/a/b c"
    assert locate("pvc://claim/x/y").path == "/mnt/claims/claim/x/y" and not is_remote("pvc://claim/x")
    assert (locate("s3://bucket//x//y/").root, locate("s3://bucket//x//y/").path) == ("bucket", "x/y")
    assert (locate("hf://o/n/sub").root, locate("hf://o/n/sub").path) == ("o/n", "sub")
    data = locate("hf://datasets/o/n@main/a/b.json")
    assert (data.root, data.path) == ("datasets/o/n@main", "a/b.json")
    for bad in (
        "hf://datasets/o",
        "file://host/x",
        "gs://b/x",
        "s3:///x",
        "s3://b/../x",
        "hf://o",
        "s3://b/x?y",
        "s3://user@b/x",
    ):
        with pytest.raises(UserError):
            locate(bad)


@given(st.text())
def test_no_name_leads_out_of_a_store(name):
    try:
        good = clean(name)
    except UserError:
        return
    assert os.path.normpath(f"/root/{good}").startswith("/root/")


def test_what_is_here_already_is_not_moved(tmp_path):
    (tmp_path / "m").mkdir()
    assert fetch(f"file://{tmp_path}/m") == tmp_path / "m"
    with pytest.raises(UserError, match="no such file"):
        fetch(tmp_path / "absent")


def test_where_a_job_s_folder_is_copied_to():
    assert destination("s3://b/x/", {}) == "s3://b/x" and destination(None, {}) == ""
    assert destination("s3://b/x", {"EGM_OUTPUT": "s3://b/y"}) == "s3://b/y", (
        "EGM_OUTPUT, which the operator sets, takes precedence"
    )
    assert destination("pvc://claim/x", {}) == "", (
        "expected no destination, because the claim is mounted as the job's folder"
    )
    assert destination("file:///x", {"EGM_OUTPUT": ""}) == "file:///x"


def test_progress_is_told_now_and_then():
    said = []
    logger = ProgressLogger("fetching x", said.append, every_s=0.0)
    logger(2_500_000)
    logger.end()
    assert said[0].startswith("fetching x: 2.5 MB so far") and said[1].startswith("fetching x: 2.5 MB in")
    quiet = ProgressLogger("x", said.append)
    quiet(1)
    ProgressLogger("nothing", said.append).end()
    assert len(said) == 2
    assert [in_words(n) for n in (0, 999, 12_345, 3.2e9, 1e15)] == [
        "0 bytes",
        "999 bytes",
        "12.3 kB",
        "3.2 GB",
        "1000 TB",
    ]
