"""A server on loopback that uses sockets directly, so that it can do what no web framework would."""

import asyncio
import json
import time
from collections import Counter

from looped import LoopedServer

ROWS, CONCURRENCY = 400, 8
"""Number of rows, and of requests at a time, in the tests that interrupt an `egm eval`"""

ANSWER = json.dumps(
    {
        "choices": [
            {
                "message": {"role": "assistant", "content": '[{"bbox_2d": [100, 100, 500, 600]}]'},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5},
    }
).encode()
BROKEN = json.dumps({"choices": []}).encode()


def response(status, body, *headers):
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


GOOD = response(200, ANSWER)
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (ANSWER[:7], ANSWER[7:90], ANSWER[90:]))
    + b"0\r\n\r\n"
)
BYTES = {
    "good": GOOD,
    "chunked": CHUNKED,
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
    "says close": response(200, ANSWER, "Connection: close"),
    "garbage": response(200, b"<html>hello</html>"),
    "no choice": response(200, BROKEN),
    "not http": b"\x00\x01\x02 what is this\r\n\r\n" * 5,
    "429": response(429, b"busy", "Retry-After: 0.05"),
    "500": response(500, b"no"),
    "503": response(503, b"starting"),
    "404": response(404, b"no such model"),
}
THEN_CLOSE = {
    "to the end": b"HTTP/1.1 200 OK\r\n\r\n" + ANSWER,
    "half": response(200, ANSWER)[:-30],
    "half chunked": CHUNKED[:-40],
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "closes": b"",
    "answers, then closes": GOOD,
}


class Misbehaving(LoopedServer):
    """`plan(n, question)` names the treatment of request n: a key of the tables above, "reset", "hang" or "drip"."""

    def __init__(self, plan=lambda n, question: "good", port=0):
        self.plan, self.count, self.delay = plan, 0, 0.0
        self.asked, self.images, self.good, self.at = Counter(), set(), Counter(), []
        self.connections = 0
        self.answer = lambda question: GOOD
        self._writers = set()
        super().__init__(port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):  # the server has no metrics
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                content = body["messages"][0]["content"]
                question, n, self.count = content[1]["text"], self.count, self.count + 1
                self.asked[question] += 1
                self.images.add(content[0]["image_url"]["url"])
                self.at.append(time.monotonic())
                if self.delay:
                    await asyncio.sleep(self.delay)
                name = self.plan(n, question)
                self.good[question] += name == "good"
                if name == "reset":
                    writer.transport.abort()
                elif name == "hang":
                    await asyncio.sleep(60)
                elif name == "drip":
                    for byte in GOOD:
                        writer.write(bytes([byte]))
                        await asyncio.sleep(0.1)
                elif name in THEN_CLOSE:
                    writer.write(THEN_CLOSE[name])
                    await writer.drain()
                    break
                else:
                    writer.write(self.answer(question) if name == "good" else BYTES[name])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    def kill(self):
        """Behave like a process that dies: no listener, all connections reset."""

        async def now():
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()

        self._call(now())


def steady(summary):
    """Return the summary without the fields that depend on the clock."""
    left_out = ("requests_per_second", "wall_seconds", "servers", "costs")
    files = [{k: v for k, v in f.items() if not k.startswith("latency")} for f in summary["files"]]
    return {k: v for k, v in summary.items() if k not in left_out} | {"files": files}
