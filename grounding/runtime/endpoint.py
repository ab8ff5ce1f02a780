"""Serve `/progress`, `/metrics` and `/healthz` of a role over HTTP.

The endpoint is off unless `$EGM_PROGRESS_PORT` is set. In a pod it listens on all interfaces, because the operator and Prometheus
connect from other pods; otherwise it only listens on this machine's loopback address. It only returns measurements, and the path
is its only input.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from grounding.jsontypes import Document
from grounding.runtime import environment

_log = logging.getLogger(__name__)


class Reader(Protocol):
    """What a role reports. The server's threads call both methods."""

    def answer(self) -> Document:
        """Return the document of `/progress`."""

    def collect(self) -> Iterable[Any]:
        """Return the same values as metric families (prometheus_client's protocol for collectors)."""


CONNECTIONS = 256
"""Connections that a server keeps open at once, more than the pods of a training or the scrapers of a cluster need"""


class BoundedServer(ThreadingHTTPServer):
    """A server whose clients cannot use up the threads and open files of the role.

    Each connection is for one request. If there are more than `CONNECTIONS`, the server ends the oldest, which is that of a client
    that is slow or sends nothing: a request takes milliseconds.
    """

    request_queue_size = 128
    """Connections that wait to be accepted; with 5, the default, the kernel drops those of further clients, which try again after seconds"""

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        """Listen on an address. Raises `OSError` if the port is in use."""
        self._open: dict[Any, None] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a separate thread."""
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > CONNECTIONS else None
            if oldest is not None:
                del self._open[oldest]
        if oldest is not None:
            with contextlib.suppress(OSError):  # its thread may have closed it at this moment
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)


class _IPv6Server(BoundedServer):
    """A server on `::`, which IPv4 clients can also reach on Linux."""

    address_family = socket.AF_INET6


def server_on(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> BoundedServer:
    """Return a server that listens on an address of either kind. Raises `OSError` if the port is in use."""
    return (_IPv6Server if ":" in host else BoundedServer)((host, port), handler)


@contextlib.contextmanager
def listen(reader: Reader) -> Iterator[int]:
    """Serve while the block runs; yield the port, or 0 if no port is configured.

    If the port is in use, log a warning and continue without an endpoint: telemetry must not stop a job.
    """
    server: BoundedServer | None = None
    variables = environment.of_process()
    wanted = variables.progress_port
    if wanted is not None:
        host = variables.every_address if os.environ.get("KUBERNETES_SERVICE_HOST") else "127.0.0.1"
        try:
            server = server_on(host, wanted, _handler(reader))
        except OSError as error:
            _log.warning("cannot serve /progress on port %s: %s", wanted, error)
    if server is None:
        yield 0
        return
    with serving(server) as port:
        yield port


class QuietHandler(BaseHTTPRequestHandler):
    """A handler that sends complete bodies and does not log requests."""

    timeout = 10  # a client that sends nothing must not hold a thread

    def send(self, status: int, kind: str, body: bytes) -> None:
        """Send a response with a body of the content type `kind`."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Write nothing: a line per request would fill the role's log."""


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[int]:
    """Answer requests in threads while the block runs; yield the port."""
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def _handler(reader: Reader) -> type[BaseHTTPRequestHandler]:
    class Handler(QuietHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            try:
                if path == "/healthz":
                    self.send(200, "text/plain; charset=utf-8", b"ok\n")
                elif path == "/progress":
                    self.send(200, "application/json", json.dumps(reader.answer()).encode())
                elif path == "/metrics":
                    self.send(200, *_exposition(reader))
                else:
                    self.send(404, "text/plain; charset=utf-8", b"not here; try /progress, /metrics, /healthz\n")
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                pass
            except Exception:
                _log.exception("telemetry: %s could not be answered", path)
                with contextlib.suppress(OSError):
                    self.send(500, "text/plain; charset=utf-8", b"see the log of this process\n")

    return Handler


def _exposition(reader: Reader) -> tuple[str, bytes]:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

    registry = CollectorRegistry(auto_describe=False)
    registry.register(reader)
    return str(CONTENT_TYPE_PLAIN_0_0_4), bytes(generate_latest(registry))
