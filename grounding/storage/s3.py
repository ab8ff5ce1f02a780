"""S3 by boto3: parallel parts, retries that survive a restart of the server, resumable downloads, a SHA-256 with each object.

boto3's own retries give up after some seconds, so each call here is repeated for `Transfer.patience_s`. Large files are uploaded by boto3's
transfer manager: an upload in parts becomes visible when it is complete, and is aborted if it fails.
Downloads have their own code here, because boto3's cannot resume and do not check a digest.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import boto3
import tenacity
from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)

from grounding.errors import Failure, UserError
from grounding.failpoints import failpoint
from grounding.files import atomic_write, sha256_of
from grounding.storage.base import Entry, Progress, Store, Transfer, clean
from grounding.storage.parts import Partial

T = TypeVar("T")
_MOST_PARTS = 9000  # S3 takes 10,000
_ATTEMPTS_AT_A_PART = 10  # over about two minutes, long enough for a restart of the server
_PASSING = (
    ConnectionError,
    HTTPClientError,
    ResponseStreamingError,
    IncompleteReadError,
    FlexibleChecksumError,
)
_PASSING_CODES = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"})

_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def passes(error: BaseException) -> bool:
    """Return whether another try may succeed after `error`."""
    if isinstance(error, ClientError):
        return _status(error) >= 500 or _status(error) == 429 or _code(error) in _PASSING_CODES
    return isinstance(error, _PASSING)


def _up_to(size: int, progress: Progress) -> Callable[[int], None]:
    """Return a callback that counts each sent byte once, because the transfer manager reports the bytes of a repeated part again."""
    sent, lock = 0, threading.Lock()

    def report(count: int) -> None:
        nonlocal sent
        with lock:
            new, sent = max(0, min(count, size - sent)), min(size, sent + max(0, count))
        if new:
            progress(new)

    return report


class S3Store(Store):
    """The objects of a bucket under a prefix."""

    def __init__(self, bucket: str, prefix: str, transfer: Transfer) -> None:
        self.bucket, self.prefix, self.transfer = bucket, prefix, transfer
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._made: dict[int, Any] = {}
        """Clients, keyed by their number of attempts per request"""
        self._making = threading.Lock()
        self._begun: defaultdict[str, list[str]] = defaultdict(list)
        """The ids of the uploads in parts that were begun, in this order, keyed by the object's key"""

    @property
    def _client(self) -> Any:
        return self._client_of(attempts=2)

    @property
    def _uploading_client(self) -> Any:
        """Return the client for uploads in parts. It repeats a failed part itself; otherwise one failure would restart the whole file."""
        return self._client_of(attempts=_ATTEMPTS_AT_A_PART)

    @property
    def _once(self) -> Any:
        """Return the client for requests that are not worth a second attempt."""
        return self._client_of(attempts=1)

    def _client_of(self, attempts: int) -> Any:
        with self._making:
            if attempts not in self._made:
                config = Config(
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    connect_timeout=5,
                    read_timeout=60,
                    max_pool_connections=max(self.transfer.parallel, self.transfer.files) + 4,
                )
                # the signature contains a region; servers other than Amazon's accept any
                region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
                with self._for_people(""):
                    session = boto3.Session()
                    client = session.client(
                        "s3", config=config, region_name=region or session.region_name or "us-east-1"
                    )
                    client.meta.events.register("after-call.s3.CreateMultipartUpload", self._note_upload)
                    self._made[attempts] = client
            return self._made[attempts]

    def _note_upload(self, parsed: Mapping[str, Any], **_: object) -> None:
        """Keep the id of an upload in parts that has begun; boto3's transfer manager does not say it."""
        if "UploadId" in parsed and "Key" in parsed:
            self._begun[str(parsed["Key"])].append(str(parsed["UploadId"]))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{clean(name)}" if self.prefix else clean(name)

    @contextmanager
    def _for_people(self, name: str) -> Iterator[None]:
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError):
            raise UserError(
                "there are no S3 credentials",
                file=where,
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; on a cluster, give the pod the Secret.",
            ) from None
        except ClientError as error:
            if _code(error) in _EXPIRED or _status(error) in (401, 403):
                self._made = {}  # so that the next request reads the credentials from their source again
            raise self._refusal(error, where) from None
        except BotoCoreError as error:
            hint = (
                "Check the network and AWS_ENDPOINT_URL_S3, then run the same command again." if passes(error) else ""
            )
            raise Failure(str(error), file=where, hint=hint) from None

    def _refusal(self, error: ClientError, where: str) -> Exception:
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return UserError(f"there is no bucket {self.bucket!r}", file=where, hint="Create it, or check the name.")
        if status == 404:
            return UserError("there is no such object", file=where)
        if code in _EXPIRED:
            return UserError(
                f"the S3 credentials have expired ({code})",
                file=where,
                hint="Renew them at their source; files and pod identities are read again before the next request.",
            )
        if status in (401, 403):
            return UserError(
                f"access is denied ({code or status})",
                file=where,
                hint="Check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE) and what they allow on this bucket.",
            )
        return Failure(f"S3 answers {code or status}: {error.response.get('Error', {}).get('Message', '')}", file=where)

    def _try(self, call: Callable[[], T], name: str = "", patience_s: float | None = None) -> T:
        """Return the call's result, repeating it after a temporary failure. Any other failure is raised as an error for people."""
        patience_s = self.transfer.patience_s if patience_s is None else patience_s
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(passes),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
            stop=tenacity.stop_after_delay(patience_s),
            before_sleep=self.retried(patience_s),
            reraise=True,
        )
        with self._for_people(name):
            return retrying(call)

    def check(self) -> None:
        # not HeadBucket, because its errors have no body with the reason
        self._try(
            lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1),
            patience_s=min(10.0, self.transfer.patience_s),
        )

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        start = f"{self.prefix}/{prefix}" if self.prefix else prefix
        cut = len(self.prefix) + 1 if self.prefix else 0

        def listed() -> list[Entry]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            found = (o for page in pages for o in page.get("Contents", ()))
            return [Entry(o["Key"][cut:], o["Size"], o["ETag"]) for o in found if not o["Key"].endswith("/")]

        yield from sorted(self._try(listed))

    def find(self, name: str) -> Entry | None:
        key = self._key(name)

        def head() -> Entry | None:
            try:
                o = self._client.head_object(Bucket=self.bucket, Key=key)
            except ClientError as error:
                if _status(error) == 404:
                    return None
                # the answer to HEAD has no body; another request returns the reason
                if _code(error) == str(_status(error)):
                    self._client.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
                raise
            return Entry(name, o["ContentLength"], o["ETag"], o.get("Metadata", {}).get("sha256", ""))

        return self._try(head, name)

    def read(self, name: str) -> bytes:
        key = self._key(name)
        return self._try(lambda: bytes(self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()), name)

    def write(self, name: str, data: bytes) -> None:
        self._put(name, data, hashlib.sha256(data).hexdigest())

    def _put(self, name: str, data: bytes, digest: str) -> None:
        facts = {"Bucket": self.bucket, "Key": self._key(name), "Metadata": {"sha256": digest}}
        self._try(lambda: self._client.put_object(Body=data, **facts), name)

    def delete(self, name: str) -> None:
        key = self._key(name)
        self._try(lambda: self._client.delete_object(Bucket=self.bucket, Key=key), name)

    def rename(self, name: str, new: str) -> None:
        there = self.find(name)
        if there is None:
            raise UserError("there is no such object", file=f"{self.uri}/{name}")
        source = {"Bucket": self.bucket, "Key": self._key(name)}
        extra = {"Metadata": {"sha256": there.sha256}, "MetadataDirective": "REPLACE"} if there.sha256 else {}
        self._try(lambda: self._client.copy(source, self.bucket, self._key(new), ExtraArgs=extra), name)
        copied = self.find(new)
        if copied is None or copied.size != there.size or copied.sha256 != there.sha256:
            raise Failure(
                "its copy differs from it, so the original is kept",
                file=f"{self.uri}/{name}",
                hint="Run the same command again.",
            )
        failpoint("s3.copied", name)
        self.delete(name)

    # ---- upload ----
    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        size, digest = file.stat().st_size, sha256_of(file)
        if size <= self.transfer.part_bytes:
            self._put(name, file.read_bytes(), digest)
            if progress is not None:
                progress(size)
        else:
            self._send_in_parts(file, name, size, digest, progress)
        there = self.find(name)
        if there is None or there.size != size:
            raise Failure(
                f"{size} bytes were sent, but the server has {there.size if there else 'none'}",
                file=f"{self.uri}/{name}",
                hint="Run the same command again.",
            )

    def _send_in_parts(self, file: Path, name: str, size: int, digest: str, progress: Progress | None) -> None:
        """Upload with boto3's transfer manager, which sends several parts at a time and aborts an upload that fails."""
        config = TransferConfig(
            multipart_threshold=self.transfer.part_bytes,
            multipart_chunksize=max(self.transfer.part_bytes, -(-size // _MOST_PARTS)),
            max_concurrency=self.transfer.parallel,
        )
        watching = [] if progress is None else [ProgressCallbackInvoker(_up_to(size, progress))]

        def send() -> None:
            facts = {"Metadata": {"sha256": digest}}
            with create_transfer_manager(self._uploading_client, config) as manager:
                manager.upload(str(file), self.bucket, self._key(name), facts, watching).result()

        sent = False
        try:
            self._try(send, name)
            sent = True
        # "no such upload": either the upload was completed and the answer was lost, or it was deleted
        except UserError:
            there = self.find(name)
            if there is None or (there.size, there.sha256) != (size, digest):
                raise
        finally:
            begun = self._begun.pop(self._key(name), [])
            self._abort(name, begun[:-1] if sent else begun)

    def _abort(self, name: str, uploads: list[str]) -> None:
        """Abort uploads in parts that the transfer manager could not abort, because the server was unreachable; their parts would cost storage.

        No request is repeated, and the first failure ends the loop, so that an unreachable server costs one request's time of the grace period.
        """
        for upload in uploads:
            facts = {"Bucket": self.bucket, "Key": self._key(name), "UploadId": upload}
            try:
                self._once.abort_multipart_upload(**facts)
            except ClientError as error:
                if passes(error):
                    return
            except BotoCoreError:  # the server is still unreachable
                return

    # ---- download ----
    def download_listed(self, entry: Entry, file: Path, progress: Progress | None = None) -> None:
        """Copy a listed file. Look it up again only if it is large, or if it has changed since it was listed."""
        if entry.size > self.transfer.part_bytes or not self._download_small(entry, file):
            self.download(entry.name, file, progress)
        elif progress is not None:
            progress(entry.size)

    def _download_small(self, entry: Entry, file: Path) -> bool:
        """Copy a file in one request. Returns False if the object was replaced or deleted since it was listed."""
        place = {"Bucket": self.bucket, "Key": self._key(entry.name), "IfMatch": entry.tag}

        def get() -> tuple[bytes, str] | None:
            try:
                reply = self._client.get_object(**place)
            except ClientError as error:
                if _status(error) in (404, 412):
                    return None
                raise
            data: bytes = reply["Body"].read()
            if len(data) != entry.size:
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=entry.size)
            return data, reply.get("Metadata", {}).get("sha256", "")

        if (got := self._try(get, entry.name)) is None:
            return False
        data, digest = got
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise self._damaged(entry)
        with atomic_write(file) as f:
            f.write(data)
        return True

    def _damaged(self, entry: Entry) -> Failure:
        return Failure(
            "the downloaded file differs from the uploaded one (by its SHA-256)",
            file=f"{self.uri}/{entry.name}",
            hint="Run the same command again. If the error persists, the object is damaged: upload it again.",
        )

    def download(self, name: str, file: Path, progress: Progress | None = None) -> None:
        for _ in range(3):  # start again if the object was replaced meanwhile
            there = self.find(name)
            if there is None:
                raise UserError("there is no such object", file=f"{self.uri}/{name}")
            if self._download(there, file, progress):
                return
        raise Failure("changed during each of three downloads", file=f"{self.uri}/{name}")

    def _download(self, entry: Entry, file: Path, progress: Progress | None) -> bool:
        place = {"Bucket": self.bucket, "Key": self._key(entry.name)}

        def get(start: int, end: int) -> bytes:
            span = {"Range": f"bytes={start}-{end - 1}", "IfMatch": entry.tag}

            def body() -> bytes:
                data: bytes = self._client.get_object(**place, **span)["Body"].read()
                if len(data) != end - start:
                    raise IncompleteReadError(actual_bytes=len(data), expected_bytes=end - start)
                return data

            return self._try(body, entry.name)

        partial = Partial(entry, file, self.transfer)
        try:
            partial.fill(get, progress)
        except Failure:
            if self.find(entry.name) != entry:
                return False
            raise
        if entry.sha256 and sha256_of(partial.path) != entry.sha256:
            partial.discard()
            raise self._damaged(entry)
        partial.finish()
        return True
