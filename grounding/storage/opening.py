"""Open the store of a URI."""

from __future__ import annotations

from pathlib import Path

from grounding.errors import UserError
from grounding.storage.base import FolderStore, Store, Transfer, locate


def open_store(uri: str | Path, transfer: Transfer | None = None, field: str = "") -> Store:
    """Return the store of a URI. Sends no request; `Store.check` does. Raises `UserError` if the URI cannot be a store."""
    place = locate(uri, field)
    if place.scheme == "file":
        return FolderStore(place.folder)
    if place.scheme == "s3":
        from grounding.storage.s3 import S3Store  # boto3 takes half a second to import

        return S3Store(place.root, place.path, transfer or Transfer())
    raise UserError(f"nothing can be written to {uri}", field=field, hint="Write a path or s3://bucket/path.")
