"""Compute a digest of a model's content, which distinguishes models that have the same name."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grounding.errors import EgmError, UserError
from grounding.files import MANIFEST, Manifest, damaged, digest_of, fingerprint, is_published, read_manifest
from grounding.storage import Transfer, is_remote, listing, locate, open_store

_BRIEF = Transfer(patience_s=15.0)


def _of_files(files: Mapping[str, tuple[int, str]]) -> str:
    return digest_of({name: sha for name, (_, sha) in files.items() if not name.endswith(".md")})


def model_digest(source: str) -> str:
    """Return a digest of a model's content, or of its name if it is not a folder on this machine.

    Raises `UserError` if files of a published model differ from those in its manifest.
    """
    folder = Path(source)
    if "://" in source or not folder.is_dir():
        return digest_of(["name", source])
    manifest = read_manifest(folder)
    if manifest is not None and is_published(folder):
        if bad := damaged(folder):
            raise UserError(
                f"{bad[0]} is not the file that the folder's manifest names: it was changed, or it is damaged",
                file=folder,
                field="spec.model",
                hint=f"Restore the folder. If the change is meant, remove {MANIFEST} there.",
            )
        return _of_files(manifest.files)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".md" and p.name != MANIFEST]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    with ThreadPoolExecutor(8) as pool:
        prints = list(pool.map(fingerprint, files))
    return digest_of({p.relative_to(folder).as_posix(): found for p, found in zip(files, prints, strict=True)})


def content_of(model: str) -> str:
    """Return an identifier of the content at a model's path or URI, without fetching it; empty if nothing is known.

    The part before the colon says where it comes from: the manifest of a published folder, the digests with which a store or the hub lists
    its files, or the files themselves. Values from different sources cannot be compared. Raises `UserError` as `model_digest` does.
    """
    if not model or model.startswith("tiny://"):
        return ""
    if is_remote(model):
        try:
            if model.startswith("s3://"):
                store = open_store(model, _BRIEF)
                manifest = Manifest.parse(store.read(MANIFEST)) if store.find(MANIFEST) is not None else None
                if manifest is not None:
                    return f"manifest:{_of_files(manifest.files)}"
            found = {name: tag for name, tag in listing(model, _BRIEF).items() if not name.endswith(".md")}
        except (EgmError, OSError):
            return ""
        return f"listing:{digest_of(found)}" if found else ""
    folder = locate(model).folder
    if not folder.is_dir():
        return ""
    return f"{'manifest' if is_published(folder) else 'files'}:{model_digest(str(folder))}"
