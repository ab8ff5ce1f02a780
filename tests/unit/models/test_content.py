"""Models with the same name are distinguished by their manifest, by the store's listing, or by their files."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from grounding import storage
from grounding.errors import Failure, UserError
from grounding.files import MANIFEST, publish
from grounding.models import content
from grounding.models.content import content_of, model_digest
from grounding.storage import Entry
from grounding.storage.base import FolderStore

fetching = importlib.import_module("grounding.storage.fetch")  # `storage` also has a function called fetch


def _published(folder: Path, weights: bytes) -> Path:
    with publish(folder) as made:
        (made / "config.json").write_text("{}")
        (made / "model.safetensors").write_bytes(weights)
    return folder


def test_a_file_swapped_below_a_manifest_is_refused_even_if_it_has_the_same_size_and_time(tmp_path: Path) -> None:
    folder = _published(tmp_path / "model", b"a" * 1000)
    first = model_digest(str(folder))
    weights = folder / "model.safetensors"
    before = weights.stat()
    weights.write_bytes(b"b" * 1000)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    for look in (model_digest, content_of):
        with pytest.raises(UserError, match=r"model\.safetensors is not the file that the folder's manifest names"):
            look(str(folder))
    (folder / MANIFEST).unlink()
    assert model_digest(str(folder)) != first


class _Bucket(FolderStore):
    """A store whose files have tags, as in S3 and on the hub."""

    def entries(self, prefix: str = ""):  # type: ignore[no-untyped-def]
        for entry in super().entries(prefix):
            yield Entry(entry.name, entry.size, f'"{hash((self.folder / entry.name).read_bytes())}"')


@pytest.mark.parametrize("uri", ["s3://bucket/models/m", "hf://owner/m"])
def test_a_model_in_a_store_is_known_by_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    at = tmp_path / uri.partition("://")[2].partition("/")[2] if uri.startswith("s3") else tmp_path
    at.mkdir(parents=True, exist_ok=True)
    (at / "model.safetensors").write_bytes(b"one")
    (at / "README.md").write_bytes(b"read me")
    monkeypatch.setattr(fetching, "_source", lambda *_: _Bucket(tmp_path))
    monkeypatch.setattr(content, "open_store", lambda *_: _Bucket(at))
    first = content_of(uri)
    assert first.startswith("listing:") and content_of(uri) == first
    (at / "README.md").write_bytes(b"other words")
    assert content_of(uri) == first
    (at / "model.safetensors").write_bytes(b"two")
    assert content_of(uri) not in ("", first)
    if uri.startswith("s3"):
        for old in at.iterdir():
            old.unlink()
        _published(at, b"three")
        assert content_of(uri) == content_of(str(at)), "expected the same content in the store and in the folder"


def test_without_network_what_was_fetched_before_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_bytes(b"{}")
    monkeypatch.setenv("EGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_source", lambda *_: _Bucket(tmp_path / "hub"))
    assert storage.fetch("hf://owner/m").is_dir()
    online = content_of("hf://owner/m")

    def offline(*_: object) -> None:
        raise Failure("no network")

    monkeypatch.setattr(fetching, "_source", offline)
    assert content_of("hf://owner/m") == online
    assert content_of("hf://owner/other") == "", "expected no digest of a model that was never downloaded"
