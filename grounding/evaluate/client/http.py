"""A lean HTTP/1.1 client for one kind of request: a large POST over a kept connection, with a small answer. It measures how long that
takes.

It exists because the client is the bottleneck of an evaluation over many servers: a general library spends three quarters of a request's
CPU time on features that are not needed here (docs/benchmarks.md). llhttp (`httptools`) parses messages, and asyncio provides connections
and TLS; this module adds the pool, the deadline and the clock. Bodies are lists of byte pieces, which are written as the socket accepts
them and never joined, so that many questions share one encoded image. They are released once they are sent, so that no request holds an
image while it waits for its answer. A latency runs from the first byte written to the last byte read. The end is noted when it is read, so
answers that wait for their turn in this process do not look slow.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools

LARGEST_ANSWER = 64 << 20
"""Maximum size of an answer in bytes; a larger one is treated as broken"""
_CHUNK = 1 << 18
_AT_ONCE = 8
"""Number of answers that are processed before the sockets are read again"""
_STALE_S = 1.0


class Unreachable(Exception):
    """No connection was made: it was refused, the name is unknown, or TLS failed."""


class Broken(Exception):
    """The connection ended before the answer was complete, or the data is not HTTP."""


class _Stale(Broken):
    """The server had already closed a kept connection when it was used again."""


class _Ours(Exception):
    """Connecting failed because of this machine, such as its limit of open files."""

    def __init__(self, error: OSError) -> None:
        self.error = error


Body = Callable[[], Awaitable[Sequence[bytes]]]
"""Returns the pieces of a body, the first one small. It is called again if a kept connection turns out to be closed"""


def _nothing() -> None:
    return None


class Answer(NamedTuple):
    """A complete response."""

    status: int
    headers: dict[bytes, bytes]
    """The header fields; names are in lower case"""
    body: bytes
    latency_s: float


class FairQueue:
    """Resumes waiting tasks a few at a time, so that the event loop can read arrived data in between."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting = deque[tuple[asyncio.Future[Answer], Answer]]()

    def add(self, future: asyncio.Future[Answer], answer: Answer) -> None:
        """Queue an answer; `future` gets it as its result when its turn comes."""
        if not self._waiting:
            self._loop.call_soon(self._next)
        self._waiting.append((future, answer))

    def _next(self) -> None:
        for _ in range(min(_AT_ONCE, len(self._waiting))):
            future, answer = self._waiting.popleft()
            if not future.done():
                future.set_result(answer)
        if self._waiting:
            self._loop.call_soon(self._next)


class Connection(asyncio.Protocol):
    """A connection, which carries one exchange at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = pool.loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._future: asyncio.Future[Answer] | None = None
        self._unsent = deque[memoryview]()
        self._sent: Callable[[], None] | None = None
        self._paused, self._reused, self._got = False, False, 0
        self._start = 0.0
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._headed = self._lasts = False

    async def exchange(self, unsent: deque[memoryview], deadline: float, sent: Callable[[], None] = _nothing) -> Answer:
        """Send a request and return its answer. `unsent` is empty afterwards. `deadline` is a time of the event loop.

        `sent` is called once the whole request has been sent. Raises `Broken`, or `TimeoutError` at the deadline.
        """
        if self._transport is None or self._transport.is_closing():
            raise _Stale("the connection was closed")
        self._reset()
        self._got = 0
        self._future = future = self._loop.create_future()
        timer = self._loop.call_at(deadline, self._too_late)
        self._start = perf_counter()
        self._unsent, self._sent = unsent, sent
        self._push()
        try:
            answer: Answer = await future
        except BaseException:
            self.close()  # later data belongs to no request
            raise
        finally:
            timer.cancel()
            self._future = self._sent = None
        if not self.closed:
            if self._unsent or self._transport.get_write_buffer_size() or not self._lasts:
                self.close()
            else:
                self._reused = True
                self._pool.keep(self)
        return answer

    def close(self) -> None:
        """Close at once, even during an exchange."""
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    @property
    def closed(self) -> bool:
        """Return whether the connection is closed or about to close."""
        return self._transport is None or self._transport.is_closing()

    def _push(self) -> None:
        while self._unsent and not self._paused and self._transport is not None:
            piece = self._unsent.popleft()
            # asyncio copies the data that the socket does not accept, so offer only about as much as it accepts
            if len(piece) > _CHUNK:
                self._unsent.appendleft(piece[_CHUNK:])
                piece = piece[:_CHUNK]
            self._transport.write(piece)
        if self._sent is not None and not self._unsent and not self._paused:
            sent, self._sent = self._sent, None
            sent()

    def _fail(self, error: Exception) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)

    def _too_late(self) -> None:
        self._fail(TimeoutError())

    def _complete(self) -> None:
        seconds = perf_counter() - self._start
        answer = Answer(self._parser.get_status_code(), self._headers, b"".join(self._body), seconds)
        future, self._future = self._future, None  # later events of the connection must not change the result
        if future is not None and not future.done():
            self._pool.fair_queue.add(future, answer)

    # ---- asyncio.Protocol ----
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(1, 0)  # so that `resume_writing` is called when everything has been sent

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._push()

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._future is None or self._got > LARGEST_ANSWER:  # no request is open, or the answer never ends
            self._fail(Broken(f"an answer of more than {LARGEST_ANSWER >> 20} MiB"))
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(Broken("the server wants to switch to another protocol"))
            self.close()
        except httptools.HttpParserError as error:
            self._fail(Broken(f"not HTTP: {error or data[:60]!r}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.lost(self)
        self._transport = None
        if self._future is None:
            return
        if self._headed and not error and not {b"content-length", b"transfer-encoding"} & self._headers.keys():
            self._complete()  # without a length, the message ends with the connection
        elif not self._got and self._reused and perf_counter() - self._start < _STALE_S:
            self._fail(_Stale("the connection was closed"))
        else:
            after = f"after {self._got} bytes of the answer" if self._got else "before an answer"
            self._fail(Broken(f"the connection was closed {after}" + (f" ({error})" if error else "")))

    # ---- llhttp ----
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._headed = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # statuses such as 100 Continue precede the answer
            self._reset()
        else:
            self._lasts = self._parser.should_keep_alive()  # llhttp does not know this earlier
            self._complete()


class Pool:
    """The connections to one server. Create it inside a running event loop; `url` is the URL of all requests.

    The pool itself sets no limit: there are as many connections as concurrent exchanges.
    """

    def __init__(
        self,
        url: str,
        fair_queue: FairQueue,
        headers: Mapping[str, str] | None = None,
        connect_s: float = 5.0,
        context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        parts = urlsplit(url)
        self.loop, self.fair_queue, self._connect_s = asyncio.get_running_loop(), fair_queue, connect_s
        self._host, secure = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if secure else 80)
        self._tls = context() if secure else None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fixed = {"Host": parts.netloc, "Accept": "application/json", "Content-Type": "application/json"} | dict(
            headers or {}
        )
        self._head = f"POST {target} HTTP/1.1\r\n".encode() + _lines(fixed)
        self._idle: list[Connection] = []
        self._all = set[Connection]()
        self._addresses: asyncio.Future[list[Any]] | None = None
        self._resolved = 0.0

    async def post(
        self, body: Body, headers: Mapping[str, str], timeout_s: float, sent: Callable[[], None] = _nothing
    ) -> Answer:
        """Post a JSON body and return the answer. `sent` is called once the whole request has been sent.

        Raises `Unreachable`, `Broken`, or `TimeoutError` if everything after the making of the body takes longer than `timeout_s`.
        """
        unsent = self._request(await body(), headers)
        deadline = self.loop.time() + timeout_s
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                try:
                    return await connection.exchange(unsent, deadline, sent)
                # servers close connections after some idle seconds, so others of the pool may be closed too
                except _Stale:
                    unsent = self._request(await body(), headers)
                    break
        connection = await self._connect(deadline)
        return await connection.exchange(unsent, deadline, sent)

    def _request(self, pieces: Sequence[bytes], headers: Mapping[str, str]) -> deque[memoryview]:
        """Return the pieces of a whole request, including the head."""
        head = b"%s%sContent-Length: %d\r\n\r\n" % (self._head, _lines(headers), sum(map(len, pieces)))
        return deque(memoryview(piece) for piece in (head + pieces[0], *pieces[1:]))

    async def _connect(self, deadline: float) -> Connection:
        last: Exception = Unreachable(f"no address is known for {self._host}")
        try:
            async with asyncio.timeout_at(min(deadline, self.loop.time() + self._connect_s)):
                for family, _, _, _, address in await self._resolve():
                    try:
                        _, connection = await self.loop.create_connection(
                            lambda: Connection(self),
                            address[0],
                            self._port,
                            family=family,
                            ssl=self._tls,
                            server_hostname=self._host if self._tls else None,
                        )
                    except OSError as error:
                        if error.errno in (errno.EMFILE, errno.ENFILE):
                            raise _Ours(error) from None
                        last = error
                        continue
                    self._all.add(connection)
                    return connection
        except _Ours as ours:
            raise ours.error from None
        except TimeoutError:
            raise Unreachable(f"no connection to {self._host}:{self._port} in {self._connect_s:g} s") from None
        except OSError as error:  # the host's name cannot be resolved
            last = error
        named = isinstance(last, OSError) and (last.errno or 0) > 0 and not isinstance(last, ssl.SSLError)
        problem = os.strerror(last.errno or 0) if named and isinstance(last, OSError) else str(last)
        raise Unreachable(f"{self._host}:{self._port}: {problem}") from last

    async def _resolve(self) -> list[Any]:
        """Return the addresses of the host. Concurrent calls share one lookup, which is repeated after some seconds, because a restarted
        pod has another address.
        """
        if self._addresses is None or (self._addresses.done() and self.loop.time() > self._resolved + 5.0):
            self._resolved = self.loop.time()
            lookup = self.loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._addresses = asyncio.ensure_future(lookup)
        return await asyncio.shield(self._addresses)

    def keep(self, connection: Connection) -> None:
        """Put a connection back for further use. The connection used last is used next."""
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._all):
            connection.close()


def _lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
