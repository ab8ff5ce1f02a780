"""The reason why an S3 server refuses is reported for every request, although the reply to HEAD has no body."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from grounding.errors import UserError
from grounding.storage import Transfer, open_store

REFUSAL = '<?xml version="1.0"?><Error><Code>{}</Code><Message>The provided token is not accepted.</Message></Error>'


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """Start a server that refuses every request; return the function that sets its status and code."""
    answer: list[Any] = [400, "ExpiredToken"]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = REFUSAL.format(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def refuse(status: int, code: str) -> None:
        answer[:] = [status, code]

    yield refuse
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "ExpiredToken", "the S3 credentials have expired"),
        (403, "ExpiredToken", "the S3 credentials have expired"),
        (403, "InvalidAccessKeyId", r"access is denied \(InvalidAccessKeyId\)"),
    ],
)
def test_every_request_says_why_it_is_refused(
    refusing: Callable[[int, str], None], tmp_path: Path, status: int, code: str, words: str
) -> None:
    refusing(status, code)
    (tmp_path / "a").write_bytes(b"a")
    store = open_store("s3://bucket/run", Transfer(patience_s=0.5))
    calls: list[Callable[[], object]] = [
        store.check,
        lambda: store.find("a"),
        lambda: list(store.entries()),
        lambda: store.read("a"),
        lambda: store.write("a", b"a"),
        lambda: store.upload(tmp_path / "a", "a"),
        lambda: store.download("a", tmp_path / "b"),
        lambda: store.delete("a"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=words):
            call()
