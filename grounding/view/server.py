"""The HTTP server of the live page. By default it listens on loopback only.

The path of every address contains a secret, and `Host` must be a name of this machine. Other web pages therefore cannot read the page: they do
not know the secret, and a host name of theirs that resolves to this machine (DNS rebinding) is refused. Addresses never contain file paths;
a picture is identified by its number in the server's list.
"""

from __future__ import annotations

import hmac
import secrets
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import orjson

from grounding.errors import EgmError, UserError
from grounding.report import build_scaling, page, text_of
from grounding.view.shown import Pages

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"


class Server(ThreadingHTTPServer):
    """Serves the live page of the runs in a folder. Raises `UserError` for the command's `option` if the port cannot be used."""

    daemon_threads = True

    def __init__(
        self, root: Path, host: str = "127.0.0.1", port: int = 0, token: str = "", option: str = "--port"
    ) -> None:
        self.token = token or secrets.token_urlsafe(16)
        self.pages = Pages(root)
        self.hosts = frozenset((*LOOPBACK, host.lower()))
        self.freezing = threading.Lock()
        self.stopped = False
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            hint = f"Choose another port, or leave out {option}; then a free port is chosen." if port else ""
            raise UserError(
                f"port {port} of {host} cannot be used: {error.strerror}", field=option, hint=hint
            ) from None

    @property
    def url(self) -> str:
        """Return the address of the page with its secret."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/{self.token}/"

    def url_of(self, run: str) -> str:
        """Return the address of the page that shows one run."""
        return f"{self.url}?{urlencode({'run': run}, quote_via=quote)}"

    def start(self) -> None:
        """Serve in threads that end with the process."""
        threading.Thread(target=self.pages.follow, daemon=True, name="egm-view-follow").start()
        threading.Thread(target=self.serve_forever, daemon=True, name="egm-view").start()

    def stop(self) -> None:
        """Stop the server and close open connections; safe to call twice."""
        if self.stopped:
            return
        self.stopped = True
        self.pages.stop()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing, because a browser may close a connection at any time."""


def host_of(header: str) -> str:
    """Return the name in a `Host` header, without its port. Pure."""
    with suppress(ValueError):
        return (urlsplit(f"//{header}").hostname or "").lower()
    return ""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "egm", ""
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """Answer one request."""
        if self.server.stopped:
            self.close_connection = True
            return
        if host_of(self.headers.get("Host", "")) not in self.server.hosts:
            self._text(HTTPStatus.FORBIDDEN, "The Host header must be a name of this machine.\n")
            return
        url = urlsplit(self.path)
        token, _, rest = url.path.lstrip("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._text(HTTPStatus.NOT_FOUND, "Open the address that egm view has printed.\n")
            return
        query = parse_qs(url.query)
        pages = self.server.pages
        pages.requested()
        runs = pages.chosen(query.get("run", []))
        try:
            if rest == "":
                self._send(HTML, self._page(runs))
            elif rest == "news":
                since = query.get("since", ["0"])[-1]
                news = pages.news(runs, int(since) if since.isdigit() else 0, query.get("shown", []))
                self._send(JSON, orjson.dumps(asdict(news)))
                pages.sent(runs, news)
            elif rest.startswith("picture/"):
                self._picture(rest.removeprefix("picture/"), large="large" in query)
            elif rest == "report":
                with self.server.freezing:
                    self._send(HTML, text_of(pages.frozen(runs)).encode("utf-8", "replace"))
            elif rest.endswith(".html"):
                self._sweep(unquote(rest.removesuffix(".html")), runs)
            else:
                self._text(HTTPStatus.NOT_FOUND, "There is no such page.\n")
        except EgmError as error:
            self._text(HTTPStatus.NOT_FOUND, f"{error}\n")

    do_HEAD = do_GET

    def _page(self, chosen: tuple[str, ...]) -> bytes:
        pages = self.server.pages
        query = "?" + urlencode([("run", name) for name in chosen], quote_via=quote) if chosen else ""
        runs = list(dict.fromkeys((*pages.runs(), *chosen)))
        return page.live(" and ".join(chosen) or "No run yet", {"runs": runs, "chosen": chosen, "query": query}).encode(
            "utf-8", "replace"
        )

    def _picture(self, number: str, *, large: bool) -> None:
        found = (
            self.server.pages.pictures.read(int(number), large=large)
            if number.isdecimal() and len(number) < 10
            else None
        )
        if found is None:
            self._text(HTTPStatus.NOT_FOUND, "There is no such picture.\n")
        else:
            self._send(found[0], found[1], cached=True)

    def _sweep(self, name: str, runs: tuple[str, ...]) -> None:
        """Send the page of a sweep, if a sweep with this name exists."""
        known = self.server.pages.runs()
        folders = {f.name: f for f in self.server.pages.frozen(runs or tuple(known)).sweeps}
        if name not in folders:
            self._text(HTTPStatus.NOT_FOUND, "There is no such sweep.\n")
            return
        with self.server.freezing, tempfile.TemporaryDirectory() as place:
            self._send(HTML, build_scaling([folders[name]], Path(place) / "page.html").read_bytes())

    def _text(self, status: HTTPStatus, text: str) -> None:
        self._send(TEXT, text.encode(), status)

    def _send(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK, *, cached: bool = False) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "private, max-age=3600" if cached else "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
