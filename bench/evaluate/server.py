"""A chat completion server that needs almost no CPU time, so that a benchmark measures the client.

    python bench/evaluate/server.py [--delay 0.7] [--encode 0.1] [--slots 64] [--cache 2000]

It answers every request after `delay` seconds. `--encode` models a server's image cache: the first request of an image takes that many seconds
longer. `--slots` limits the number of requests that are processed at the same time; the others wait. It prints its ports. `GET /stats` returns
its observations: requests, cache hits, and its own latency (from a request's first byte to its answer) as mean, p50 and p90, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import sys
import time
import zlib
from collections import OrderedDict, deque

ANSWER = json.dumps(
    {
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {
                    "role": "assistant",
                    "content": '```json\n[{"bbox_2d": [100, 100, 500, 600], "label": "x"}]\n```',
                },
            }
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 24, "total_tokens": 324},
    }
).encode()
_SAMPLE = (2048, 3072)
"""Range of bytes in a body that identifies its image; it begins after the header that all JPEGs share"""
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER


class State:
    """The state that all connections share: slots, the image cache, measurements."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.delay, self.encode, self.slots = arguments.delay, arguments.encode, arguments.slots
        self.skip = arguments.skip
        self.cache_size, self.cache = arguments.cache, OrderedDict[int, None]()
        self.busy, self.waiting = 0, deque[tuple[Connection, int, float]]()
        self.requests = self.hits = 0
        self.latencies: list[float] = []

    def submit(self, connection: Connection, image: int, start: float) -> None:
        self.requests += 1
        if self.slots and self.busy >= self.slots:
            self.waiting.append((connection, image, start))
        else:
            self.work(connection, image, start)

    def work(self, connection: Connection, image: int, start: float) -> None:
        self.busy += 1
        seconds = self.delay
        if self.encode:
            if image in self.cache:
                self.hits += 1
                self.cache.move_to_end(image)
            else:
                seconds += self.encode
                self.cache[image] = None
                if len(self.cache) > self.cache_size:
                    self.cache.popitem(last=False)
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self.answer, connection, start)
        else:
            self.answer(connection, start)

    def answer(self, connection: Connection, start: float) -> None:
        self.busy -= 1
        connection.send(REPLY)
        self.latencies.append(time.perf_counter() - start)
        if self.waiting:
            self.work(*self.waiting.popleft())

    def stats(self) -> dict[str, float]:
        seen = sorted(self.latencies[self.skip :] or self.latencies)
        self.latencies = []
        return {
            "requests": self.requests,
            "hits": self.hits,
            "latency_mean": sum(seen) / len(seen) if seen else 0.0,
            "latency_p50": seen[len(seen) // 2] if seen else 0.0,
            "latency_p90": seen[int(len(seen) * 0.9)] if seen else 0.0,
        }


class Connection(asyncio.BufferedProtocol):
    """A keep-alive connection. It reads heads and bodies, and examines only a few bytes of the image."""

    shared = bytearray(1 << 20)

    def __init__(self, state: State) -> None:
        self.state, self.head, self.left, self.length, self.image, self.start = state, b"", 0, 0, 0, 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.shared

    def buffer_updated(self, nbytes: int) -> None:
        data = memoryview(self.shared)[:nbytes]
        while len(data):
            if self.left:
                taken, at = min(self.left, len(data)), self.length - self.left
                low, high = max(0, _SAMPLE[0] - at), min(taken, _SAMPLE[1] - at)
                if low < high:
                    self.image = zlib.crc32(data[low:high], self.image)
                self.left -= taken
                data = data[taken:]
                if not self.left:
                    self.state.submit(self, self.image, self.start)
                continue
            if not self.head:
                self.start = time.perf_counter()
            self.head += bytes(data[:65536])
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            used = end + 4 - (len(self.head) - min(len(data), 65536))
            head, self.head = self.head[: end + 4], b""
            data = data[used:]
            if head.startswith(b"GET"):
                body = json.dumps(self.state.stats()).encode()
                self.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                continue
            lower = head.lower()
            at = lower.find(b"content-length:") + 15
            self.length = self.left = int(lower[at : lower.find(b"\r\n", at)])
            self.image = 0

    def send(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)


async def main(arguments: argparse.Namespace) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    state, loop = State(arguments), asyncio.get_running_loop()
    for number in range(arguments.ports):
        listener = socket.create_server(("127.0.0.1", arguments.port if number == 0 else 0), backlog=4096)
        await loop.create_server(lambda: Connection(state), sock=listener, backlog=4096)
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--ports", type=int, default=1, help="number of ports to listen on; each is a separate endpoint"
    )
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--encode", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--cache", type=int, default=2000)
    parser.add_argument(
        "--skip", type=int, default=0, help="number of first requests to leave out of the latencies, each time"
    )
    try:
        asyncio.run(main(parser.parse_args()))
    except KeyboardInterrupt:
        pass
