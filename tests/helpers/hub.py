"""A server on loopback with the Hub's API that `huggingface_hub` uses: revisions, trees, files with ranges. It can simulate faults."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files`: repository (`owner/name`, `datasets/owner/name`) -> path -> content. Files of `lfs_from` bytes or more are in LFS, with a SHA-256.

    `cut_after`: the first `cuts` answers with a file's content end after this many bytes. `down`: every request gets 503.
    `damaged`: paths whose content has one byte changed. `asked`: (method, path, range) of every request for a file.
    """

    def __init__(self, files, lfs_from=10_000):
        self.files, self.lfs_from = files, lfs_from
        self.cut_after, self.cuts, self.down, self.damaged, self.asked = 0, 0, False, set(), []
        self.server = None
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub._answer(self, head=True)

            def do_GET(self):
                hub._answer(self, head=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        """Close the port; `start` opens the same one again."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    # ---- answers of the Hub ----
    def _answer(self, request, head):
        path = unquote(urlsplit(request.path).path).strip("/")
        if self.down:
            return self._send(request, 503, b"", {}, head)
        if path.startswith("api/"):
            return self._api(request, path.removeprefix("api/"), head)
        repository, _, rest = path.partition("/resolve/")
        _, _, name = rest.partition("/")
        data = self.files.get(repository, {}).get(name)
        if data is None:
            return self._missing(request, "EntryNotFound", head)
        span = request.headers.get("Range", "")
        self.asked.append((request.command, name, span))
        headers = {"ETag": f'"{self._digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name in self.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, whole = 200, len(data)
        if span:
            start, end = span.removeprefix("bytes=").split("-")
            start, end = int(start), int(end or whole - 1)
            data, status = data[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{whole}"
        return self._send(request, status, data, headers, head)

    def _api(self, request, path, head):
        kind, _, rest = path.partition("/")
        repository, _, what = rest.partition("/revision/")
        if not what:
            repository, _, what = rest.partition("/tree/")
        known = self.files.get(repository if kind == "models" else f"{kind}/{repository}")
        if known is None:
            return self._missing(request, "RepoNotFound", head)
        if "/tree/" in path:
            body = [self._entry(name, data) for name, data in sorted(known.items())]
        elif what not in ("", "main", COMMIT):
            return self._missing(request, "RevisionNotFound", head)
        else:
            body = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in sorted(known)]}
        return self._send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"}, head)

    def _entry(self, name, data):
        entry = {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
        if len(data) >= self.lfs_from:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _digest(self, data):
        return hashlib.sha256(data).hexdigest() if len(data) >= self.lfs_from else _git(data)

    def _missing(self, request, code, head):
        self._send(request, 404, b"", {"X-Error-Code": code, "X-Error-Message": "not there"}, head)

    def _send(self, request, status, body, headers, head):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if head:
            return
        if self.cut_after and self.cuts and len(body) > self.cut_after:
            self.cuts -= 1
            request.wfile.write(body[: self.cut_after])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        request.wfile.write(body)


def _git(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
