"""A server on loopback that sends exactly the given bytes: one connection handler that uses sockets directly."""

import asyncio
import json
from collections import Counter

from looped import LoopedServer

RESET, HANG, CLOSE = "reset", "hang", "close"
"""Ends of an exchange: the connection is reset, stays open without data, or is closed normally"""


def question_of(asked):
    return asked["messages"][-1]["content"][1]["text"]


def head(status=200, length=None, kind="application/json", *more):
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", *more]
    return "\r\n".join([*lines, *([] if length is None else [f"Content-Length: {length}"])]).encode() + b"\r\n\r\n"


def http(body, status=200, kind="application/json", *more):
    """Return an HTTP response; `body` is bytes, text, or a value that becomes JSON."""
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    return head(status, len(raw), kind, *more) + raw


class OddServer(LoopedServer):
    """`plan(question, n)` returns the reply to the n-th request (from 0) of a question: bytes, or steps.

    Steps are bytes, seconds to wait, and RESET, HANG or CLOSE as the last one. `pages`: path -> answer to a GET; other paths get 404.
    """

    def __init__(self, plan):
        self.plan, self.asked, self.bodies, self.pages = plan, Counter(), [], {}
        super().__init__()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader, writer):
        try:
            while True:
                asked = await reader.readuntil(b"\r\n\r\n")
                if asked.startswith(b"GET"):
                    page = self.pages.get(asked.split()[1].decode())
                    writer.write(http("no", 404) if page is None else http(page))
                    continue
                length = int(asked.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                question = question_of(body)
                self.bodies.append(body)
                n, self.asked[question] = self.asked[question], self.asked[question] + 1
                steps = self.plan(question, n)
                for step in [steps] if isinstance(steps, bytes) else steps:
                    if isinstance(step, bytes):
                        writer.write(step)
                        await writer.drain()
                    elif step == HANG:
                        await asyncio.sleep(60)
                    elif step == RESET:
                        await asyncio.sleep(0.02)  # wait until earlier bytes are sent
                        writer.transport.abort()
                        return
                    elif step == CLOSE:
                        return
                    else:
                        await asyncio.sleep(step)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
