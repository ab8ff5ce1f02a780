"""A repository of the Hugging Face hub as a read-only store.

`huggingface_hub` only lists the files and their URLs. They are downloaded by the same code as files from S3, because `huggingface_hub`
restarts an interrupted file from the beginning, gives up after some seconds, and compares only sizes. Files in its own cache are
linked instead of downloaded.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from grounding.errors import Failure, UserError, from_checkout
from grounding.files import sha256_of
from grounding.storage.base import Entry, Progress, Store, Transfer, clean
from grounding.storage.parts import Partial

T = TypeVar("T")


class HubStore(Store):
    """The files of `[datasets/]owner/name[@revision]` at one commit, to which the revision is resolved at the first request."""

    def __init__(self, repository: str, transfer: Transfer) -> None:
        try:
            import huggingface_hub.errors
        except ModuleNotFoundError:
            raise UserError(
                "hf:// needs huggingface_hub, which is not installed",
                hint=from_checkout("train"),
            ) from None
        self._hub, self.transfer, self.uri = huggingface_hub, transfer, f"hf://{repository}"
        self.kind = "dataset" if repository.startswith("datasets/") else "model"
        self.name, _, self.revision = repository.removeprefix("datasets/").partition("@")
        self._files: dict[str, Entry] = {}
        self._commit = ""
        self._lock = threading.Lock()

    def _listed(self) -> dict[str, Entry]:
        with self._lock:
            if not self._commit:
                api = self._hub.HfApi()

                def ask() -> tuple[str, dict[str, Entry]]:
                    facts = api.repo_info(self.name, repo_type=self.kind, revision=self.revision or None)
                    tree = api.list_repo_tree(self.name, repo_type=self.kind, revision=facts.sha, recursive=True)
                    return facts.sha, {f.path: _entry(f) for f in tree if hasattr(f, "blob_id")}

                self._commit, self._files = self._try(ask)
            return self._files

    def _try(self, call: Callable[[], T], name: str = "") -> T:
        """Return the call's result, repeating it after a temporary failure. Any other failure is raised as an error for people."""
        import httpx

        errors = self._hub.errors
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(passes),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
            stop=tenacity.stop_after_delay(self.transfer.patience_s),
            before_sleep=self.retried(self.transfer.patience_s),
            reraise=True,
        )
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            return retrying(call)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
            raise UserError(
                "the hub has no such repository, revision or file, or you have no access to it",
                file=where,
                hint="Check the name (a data set is hf://datasets/owner/name); for a gated one set HF_TOKEN.",
            ) from None
        except errors.HFValidationError as error:
            raise UserError(str(error).splitlines()[0], file=where) from None
        except errors.OfflineModeIsEnabled:
            raise Failure("is not in the cache, and HF_HUB_OFFLINE forbids requests to the hub", file=where) from None
        except (OSError, httpx.HTTPError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            hint = "Check the network and HF_ENDPOINT, then run the same command again."
            raise Failure(f"cannot be downloaded: {text[0]}", file=where, hint=hint) from None

    def check(self) -> None:
        self._listed()

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        yield from sorted(e for name, e in self._listed().items() if name.startswith(prefix))

    def find(self, name: str) -> Entry | None:
        return self._listed().get(clean(name))

    def read(self, name: str) -> bytes:
        entry = self._need(name)
        return self._get(self._address(entry), 0, entry.size, entry.name) if entry.size else b""

    def download(self, name: str, file: Path, progress: Progress | None = None) -> None:
        entry = self._need(name)
        known = self._hub.try_to_load_from_cache(self.name, name, repo_type=self.kind, revision=self._commit)
        if isinstance(known, str) and Path(known).stat().st_size == entry.size and _is(Path(known), entry):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            file.symlink_to(Path(known).absolute())
            return
        partial, address = Partial(entry, file, self.transfer), _Once(lambda: self._address(entry))
        partial.fill(lambda start, end: self._get_again(address, start, end, name), progress)
        if not _is(partial.path, entry):
            partial.discard()
            raise Failure(
                "the downloaded file differs from the hub's (by its digest)",
                file=f"{self.uri}/{name}",
                hint="The file was removed; run the same command again.",
            )
        partial.finish()

    def _need(self, name: str) -> Entry:
        entry = self.find(name)
        if entry is None:
            raise UserError("the repository has no such file", file=f"{self.uri}/{name}")
        return entry

    def _address(self, entry: Entry) -> str:
        """Return the URL of the content; for a large file, an address of a CDN that expires."""
        url = self._hub.hf_hub_url(self.name, entry.name, repo_type=self.kind, revision=self._commit)
        location: str = self._try(lambda: self._hub.get_hf_file_metadata(url).location, entry.name)
        return location

    def _get_again(self, address: _Once, start: int, end: int, name: str) -> bytes:
        try:
            return self._get(address.value(), start, end, name)
        except UserError:  # the address has expired
            return self._get(address.value(renewed=True), start, end, name)

    def _get(self, url: str, start: int, end: int, name: str) -> bytes:
        import httpx
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        # a CDN's address is signed and needs no token
        if httpx.URL(url).host == httpx.URL(self._hub.constants.ENDPOINT).host:
            headers |= build_hf_headers()

        def body() -> bytes:
            reply = get_session().get(url, headers=headers, timeout=60.0, follow_redirects=True)
            hf_raise_for_status(reply)
            data = bytes(reply.content)
            if reply.status_code == 200:  # the server does not support ranges
                data = data[start:end]
            if len(data) != end - start:
                raise httpx.RemoteProtocolError(f"received {len(data)} of {end - start} bytes")
            return data

        return self._try(body, name)

    def write(self, name: str, data: bytes) -> None:
        raise self._read_only()

    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        raise self._read_only()

    def delete(self, name: str) -> None:
        raise self._read_only()

    def _read_only(self) -> UserError:
        return UserError(f"nothing can be written to {self.uri}", hint="Write a path or s3://bucket/path.")


class _Once:
    """A value that is created once, at the first request of any thread."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make, self._value, self._lock = make, "", threading.Lock()

    def value(self, renewed: bool = False) -> str:
        with self._lock:
            if renewed or not self._value:
                self._value = self._make()
            return self._value


def _entry(file: Any) -> Entry:
    """Convert the hub's description of a file. Large files have a SHA-256, others a git digest."""
    digest = file.lfs.sha256 if file.lfs is not None else ""
    return Entry(file.path, file.lfs.size if file.lfs is not None else file.size, digest or file.blob_id, digest)


def _is(file: Path, entry: Entry) -> bool:
    if entry.sha256:
        return sha256_of(file) == entry.sha256
    digest = hashlib.sha1(f"blob {entry.size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as f:
        while data := f.read(1 << 20):
            digest.update(data)
    return digest.hexdigest() == entry.tag


def passes(error: BaseException) -> bool:
    """Return whether another try may succeed: after a failed connection, an incomplete body, 429 or 5xx."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status == 429
    return isinstance(error, httpx.TransportError | ConnectionError)
