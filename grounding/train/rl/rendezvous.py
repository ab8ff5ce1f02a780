"""The rendezvous of a job's pods, in addition to Ray: which pods have joined, where Ray's head is, and how the run ended.

Ray's own worker command ends with an error whenever the head ends, even after success. So rank 0 answers over HTTP on MASTER_PORT, and each
worker asks for the state every second. From the answers, a worker knows when to end and with which exit code. From the requests, rank 0
knows which workers are missing or silent. Requests contain the job's token.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

from grounding.errors import UserError
from grounding.runtime.endpoint import QuietHandler, server_on, serving
from grounding.runtime.environment import Environment

State = Literal["starting", "running", "succeeded", "failed", "stopped"]
FINAL: tuple[State, ...] = ("succeeded", "failed", "stopped")
LONGEST_MESSAGE = 1 << 16
"""Bytes of a worker's message that rank 0 reads"""


@dataclass(frozen=True)
class Pods:
    """A pod's position in its job: `rank` of `nodes`, rank 0's address, the ports of the rendezvous and of Ray, the job's token."""

    rank: int
    nodes: int
    master: str
    port: int
    ray_port: int
    token: str = field(repr=False)
    ip: str = ""
    content: str = field(default="", repr=False)
    """What this pod trains, as text that rank 0 compares; empty if the pods share a folder"""

    @property
    def every_address(self) -> str:
        """Return the address on which rank 0 listens: all interfaces, those of IPv6 too if the pod has such an address."""
        return "::" if ":" in self.ip else ""

    @property
    def ray_address(self) -> str:
        """Return the address of the Ray node on this pod."""
        return address_of(self.ip, self.ray_port)


def from_environment(env: Mapping[str, str]) -> Pods | None:
    """Read this pod's position from the gang's variables; return None for a job of one pod. Raises `UserError` if one is missing or invalid.

    `RAY_AUTH_TOKEN`, or the file at `RAY_AUTH_TOKEN_PATH`, contains the token (a key of a Secret). `EGM_NODE_IP` is this pod's address
    if it cannot be detected, and `EGM_RAY_PORT` is Ray's port (6379).
    """
    given = Environment.from_environ(env)
    nodes = _number(env, "WORLD_SIZE", 1)
    if nodes <= 1:
        return None
    rank, port = _number(env, "RANK", None), _number(env, "MASTER_PORT", 23456)
    if not 0 <= rank < nodes:
        raise UserError(f"RANK is {rank}, but must be 0 to {nodes - 1}", field="RANK")
    master = env.get("MASTER_ADDR", "")
    if not master:
        raise UserError(
            "MASTER_ADDR, the address of rank 0, is missing",
            field="MASTER_ADDR",
            hint="The owner of the pods sets it: PyTorchJob, or the operator with an Indexed Job.",
        )
    token = env.get("RAY_AUTH_TOKEN", "").strip()
    if not token and (path := env.get("RAY_AUTH_TOKEN_PATH")):
        token = Path(path).read_text().strip()
    if len(token) < 16:
        raise UserError(
            "a job of several nodes needs a token of at least 16 characters: without one, anyone who can reach the pods can run code in them",
            field="RAY_AUTH_TOKEN",
            hint="Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a mounted Secret, to the same value on all pods.",
        )
    # `own_address` finds only addresses of IPv4
    own = given.node_ip or (given.pod_ip if ":" in given.pod_ip else "")
    return Pods(rank, nodes, master, port, given.ray_port, token, own)


def _number(env: Mapping[str, str], name: str, default: int | None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit():
        raise UserError(f"expected a whole number, found {text!r}", field=name)
    return int(text)


def address_of(host: str, port: int) -> str:
    """Return host and port as one text, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_address(master: str) -> str:
    """Return this pod's address on the route to `master`; on rank 0, which may resolve its own name to localhost, on any route."""
    for target in (master, "192.0.2.1"):  # an address for documentation; connecting a datagram socket sends nothing
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((target, 9))
            found = str(s.getsockname()[0])
            if not found.startswith("127.") or target == "192.0.2.1":
                return found
    return socket.gethostbyname(socket.gethostname())


@dataclass
class Member:
    """Rank 0's record of a worker. `seen`: time of its last message, by a monotonic clock."""

    host: str
    ip: str
    seen: float
    told: State | None = None
    left: str = ""
    content: str = ""


class Answer(TypedDict):
    """Rank 0's answer: the state of the run, the address of Ray's head (empty until it runs), and the checkpoint from which the run continues.

    `resume` is for pods that share no folder: a text that rank 0 wrote, empty if the run begins at step 0.
    """

    state: str
    ray: str
    resume: str


class Membership:
    """Rank 0's record of all workers. Thread-safe; `clock` must be monotonic."""

    def __init__(self, nodes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.nodes, self._clock, self._lock = nodes, clock, threading.Lock()
        self.state: State = "starting"
        self.ray, self.resume = "", ""
        self.members: dict[int, Member] = {}
        self.on_stop: Callable[[], object] = lambda: None
        """Called when a worker reports that it was asked to stop."""

    def heartbeat(
        self, rank: int, host: str, ip: str, left: str = "", stopping: bool = False, content: str = ""
    ) -> Answer:
        """Record a worker's message and return rank 0's answer."""
        if stopping:
            self.on_stop()
        with self._lock:
            self.members[rank] = Member(host, ip, self._clock(), self.state, left, content)
            return {"state": self.state, "ray": self.ray, "resume": self.resume}

    def contents(self) -> list[str]:
        """Return what each worker trains, by rank."""
        with self._lock:
            return [member.content for _, member in sorted(self.members.items())]

    def wait_until_notified(self, patience_s: float) -> bool:
        """Wait at most `patience_s` seconds until all workers are notified (`all_notified`). Return whether they are."""
        until = time.monotonic() + patience_s
        while not self.all_notified():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def missing(self) -> list[int]:
        """Return the ranks that have not joined yet."""
        with self._lock:
            return [r for r in range(1, self.nodes) if r not in self.members]

    def lost(self, patience_s: float) -> str:
        """Return a description of the first worker that has left or become silent; empty if there is none."""
        with self._lock:
            for rank, member in sorted(self.members.items()):
                if member.left:
                    return f"worker {rank} ({member.host}) has left: {member.left}"
                silent = self._clock() - member.seen
                if silent > patience_s:
                    return f"worker {rank} ({member.host}) has sent no heartbeat for {silent:.0f} s"
        return ""

    def all_notified(self) -> bool:
        """Return whether every remaining worker has been notified of how the run ended."""
        with self._lock:
            return all(m.told in FINAL or m.left or self._clock() - m.seen > 15.0 for m in self.members.values())


@contextlib.contextmanager
def meet(pods: Pods, membership: Membership) -> Iterator[int]:
    """Answer the workers while the block runs, and yield the port. Raises `OSError` if the port is in use."""

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                given = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), pods.token.encode()):
                    return self.send_error(403)
                try:
                    length = min(int(self.headers.get("Content-Length", "0")), LONGEST_MESSAGE)
                    said = json.loads(self.rfile.read(length))
                    rank = int(said["rank"])
                    if not 1 <= rank < pods.nodes:
                        raise ValueError
                    answer = membership.heartbeat(
                        rank,
                        str(said["host"])[:253],
                        str(said["ip"])[:64],
                        str(said.get("left", ""))[:500],
                        said.get("stopping") is True,
                        str(said.get("content", "")),
                    )
                except (ValueError, KeyError, TypeError):
                    return self.send_error(400)
                self.send(200, "application/json", json.dumps(answer).encode())
            return None

    with serving(server_on(pods.every_address, pods.port, Handler)) as port:
        yield port


def dismiss(pods: Pods, patience_s: float) -> None:
    """Answer workers for `patience_s` seconds that the run succeeded; used if rank 0 has nothing left to train."""
    membership = Membership(pods.nodes)
    membership.state = "succeeded"
    with meet(pods, membership):
        until = time.monotonic() + patience_s
        while membership.missing() and time.monotonic() < until:
            time.sleep(0.1)


def environment_of_jobs(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` without the variables that would make torch treat a process as a rank; verl sets those of Ray's workers."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in env.items() if k not in ranks and not k.startswith("PET_")}


def say(pods: Pods, left: str = "", timeout_s: float = 5.0, *, stopping: bool = False) -> Answer | None:
    """Send a worker's message to rank 0, and return the answer, or None if there is none. Raises `UserError` if the token is refused."""
    said = {"rank": pods.rank, "host": os.uname().nodename, "ip": pods.ip, "left": left, "stopping": stopping}
    if pods.content:
        said["content"] = pods.content
    request = urllib.request.Request(
        f"http://{address_of(pods.master, pods.port)}/",
        data=json.dumps(said).encode(),
        headers={"Authorization": f"Bearer {pods.token}"},
        method="POST",
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            found = json.loads(answer.read(4096))
            if not isinstance(found, dict):
                return None
            return Answer(
                state=str(found.get("state", "")), ray=str(found.get("ray", "")), resume=str(found.get("resume", ""))
            )
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise UserError(
                f"rank 0 at {pods.master}:{pods.port} refuses this pod's token",
                field="RAY_AUTH_TOKEN",
                hint="All pods need the same token.",
            ) from None
        return None
    except (OSError, ValueError):
        return None
