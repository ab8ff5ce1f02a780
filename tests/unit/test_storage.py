"""URIs, names and local stores; S3 is in tests/s3."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.storage import fetch, is_remote, locate
from grounding.storage.base import clean


def test_what_uris_name(monkeypatch):
    monkeypatch.setenv("EGM_PVC_ROOT", "/mnt/claims")
    assert locate("a/b").path == "a/b" and not is_remote("a/b")
    assert locate("file:///a/b%20c").path == "/a/b c"
    assert locate("pvc://claim/x/y").path == "/mnt/claims/claim/x/y" and not is_remote("pvc://claim/x")
    assert (locate("s3://bucket//x//y/").root, locate("s3://bucket//x//y/").path) == ("bucket", "x/y")
    assert (locate("hf://o/n/sub").root, locate("hf://o/n/sub").path) == ("o/n", "sub")
    for bad in ("file://host/x", "gs://b/x", "s3:///x", "s3://b/../x", "hf://o", "s3://b/x?y", "s3://user@b/x"):
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
