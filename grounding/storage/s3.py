"""S3 by boto3: parallel parts, retries that outlive a restart of the server, downloads that resume, SHA-256 beside each object.

boto3's own retries give up after some seconds; each request here is repeated for `Transfer.patience_s`. A multipart upload appears whole when it is
completed, and is aborted when it fails.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import boto3
import tenacity
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
from grounding.storage.base import Entry, Progress, Store, Transfer, clean, sha256_of
from grounding.storage.parts import Partial, each

T = TypeVar("T")
_MOST_PARTS = 9000  # S3 takes 10,000
_PASSING = (
    ConnectionError,
    HTTPClientError,
    ResponseStreamingError,
    IncompleteReadError,
    FlexibleChecksumError,
)
_PASSING_CODES = frozenset({"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"})


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def passes(error: BaseException) -> bool:
    """Whether another try may mend it."""
    if isinstance(error, ClientError):
        return _status(error) >= 500 or _status(error) == 429 or _code(error) in _PASSING_CODES
    return isinstance(error, _PASSING)


class S3Store(Store):
    """The objects of a bucket under a prefix."""

    def __init__(self, bucket: str, prefix: str, transfer: Transfer) -> None:
        self.bucket, self.prefix, self.transfer = bucket, prefix, transfer
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._made: Any = None
        self._making = threading.Lock()

    @property
    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                config = Config(
                    retries={"mode": "standard", "total_max_attempts": 2},
                    connect_timeout=5,
                    read_timeout=60,
                    max_pool_connections=self.transfer.parallel + 4,
                )
                # a region is part of the signature; servers other than Amazon's do not care which
                region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
                with self._for_people(""):
                    session = boto3.Session()
                    self._made = session.client(
                        "s3", config=config, region_name=region or session.region_name or "us-east-1"
                    )
            return self._made

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
            raise self._refusal(error, where) from None
        except BotoCoreError as error:
            hint = (
                "Check the network and AWS_ENDPOINT_URL_S3, then run the same command again." if passes(error) else ""
            )
            raise Failure(str(error), file=where, hint=hint) from None

    def _refusal(self, error: ClientError, where: str) -> Exception:
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return UserError(f"there is no bucket {self.bucket!r}", file=where, hint="Make it, or check the name.")
        if status == 404:
            return UserError("there is no such object", file=where)
        if status in (401, 403):
            return UserError(
                f"access is denied ({code or status})",
                file=where,
                hint="Check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE) and what they allow on this bucket.",
            )
        return Failure(f"S3 answers {code or status}: {error.response.get('Error', {}).get('Message', '')}", file=where)

    def _try(self, call: Callable[[], T], name: str = "", patience_s: float | None = None) -> T:
        """The call's result, repeated while its failure may pass; anything else as an error for people."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(passes),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
            stop=tenacity.stop_after_delay(self.transfer.patience_s if patience_s is None else patience_s),
            reraise=True,
        )
        with self._for_people(name):
            return retrying(call)

    def check(self) -> None:
        # not HeadBucket: its refusals have no body that says why
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

    # ---- upload ----
    def upload(self, file: Path, name: str, progress: Progress | None = None) -> None:
        size, digest = file.stat().st_size, sha256_of(file)
        if size <= self.transfer.part_bytes:
            self._put(name, file.read_bytes(), digest)
            if progress is not None:
                progress(size)
        else:
            self._multipart(file, name, size, digest, progress)
        there = self.find(name)
        if there is None or there.size != size:
            raise Failure(
                f"was sent with {size} bytes, but the server holds {there.size if there else 'nothing'}",
                file=f"{self.uri}/{name}",
                hint="Run the same command again.",
            )

    def _multipart(self, file: Path, name: str, size: int, digest: str, progress: Progress | None) -> None:
        client, place = self._client, {"Bucket": self.bucket, "Key": self._key(name)}
        step = max(self.transfer.part_bytes, -(-size // _MOST_PARTS))
        made = self._try(lambda: client.create_multipart_upload(Metadata={"sha256": digest}, **place), name)
        place["UploadId"] = made["UploadId"]

        def send(number: int) -> dict[str, Any]:
            with file.open("rb") as f:
                f.seek((number - 1) * step)
                data = f.read(step)
            sent = self._try(lambda: client.upload_part(PartNumber=number, Body=data, **place), name)
            if progress is not None:
                progress(len(data))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            parts = each(send, range(1, -(-size // step) + 1), self.transfer.parallel)
            whole = {"Parts": parts}
            try:
                self._try(lambda: client.complete_multipart_upload(MultipartUpload=whole, **place), name)
            except UserError:  # "no such upload": the answer to an earlier try was lost, or it really is gone
                there = self.find(name)
                if there is None or (there.size, there.sha256) != (size, digest):
                    raise
        except BaseException:
            with suppress(BotoCoreError, ClientError):  # else the parts would be paid for until somebody finds them
                client.abort_multipart_upload(**place)
            raise

    # ---- download ----
    def download(self, name: str, file: Path, progress: Progress | None = None) -> None:
        for _ in range(3):  # an object that is replaced meanwhile is begun anew
            there = self.find(name)
            if there is None:
                raise UserError("there is no such object", file=f"{self.uri}/{name}")
            if self._download(there, file, progress):
                return
        raise Failure("keeps changing while it is downloaded", file=f"{self.uri}/{name}")

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
            raise Failure(
                "what was downloaded is not what was uploaded (its SHA-256 differs)",
                file=f"{self.uri}/{entry.name}",
                hint="Run the same command again; should it persist, the object is damaged and has to be uploaded anew.",
            )
        partial.finish()
        return True
