"""Processes of the local back end: roles and their supervisors, ports, readiness, and leftovers of an earlier run."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shlex
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grounding.errors import Failure, UserError, from_os_error
from grounding.local.runs import RoleState, tail
from grounding.roles import Probe
from grounding.runtime import grace as grace_period
from grounding.runtime import processes
from grounding.runtime.environment import Environment

TOKEN = Environment.variable("role_token")
SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True)
class Found:
    """A process in /proc: `ticks` is its start time, `session` the id of its session's leader."""

    pid: int
    ticks: int
    session: int
    tokens: frozenset[str] = frozenset()


def machine() -> str:
    """Return the scope in which process ids and start times are valid: boot and pid namespace. Empty if /proc does not show it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def start_ticks(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); 0 if the process has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


def all_processes() -> list[Found]:
    """Return the processes whose environment this user may read in /proc, each with the role tokens in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            environ = (entry / "environ").read_bytes().split(b"\0")
            prefix = f"{TOKEN}=".encode()
            tokens = frozenset(v[len(prefix) :].decode(errors="replace") for v in environ if v.startswith(prefix))
            if fields[0] != "Z":
                found.append(Found(int(entry.name), int(fields[19]), int(fields[3]), tokens))
    return found


def survivors(roles: Iterable[RoleState], processes: Sequence[Found], here: str) -> list[int]:
    """Return the `processes` that were started for `roles`. Pure.

    These are the recorded process (same id and start time), all processes with the role's token, and the members of its session if the
    session's leader has ended.

    A process id is not enough, because the kernel reuses ids. Ids and start times are only compared if they were recorded on `here`
    (see `machine`), because the folder may be a copy, or shared with another host or container.
    """
    by_pid = {p.pid: p for p in processes}
    result: list[int] = []
    for role in roles:
        if not role.pid:
            continue
        leader = by_pid.get(role.pid)
        for p in processes:
            known = bool(role.machine) and role.machine == here
            same = known and p.pid == role.pid and p.ticks == role.ticks
            marked = bool(role.token) and role.token in p.tokens
            orphan = known and leader is None and p.session == role.pid and p.ticks >= role.ticks > 0
            if (same or marked or orphan) and p.pid not in result:
                result.append(p.pid)
    return result


def stop_survivors(roles: Sequence[RoleState], grace: float = grace_period.DEFAULT_S) -> int:
    """Stop the processes of an earlier run that was killed; return their number."""
    return processes.stop(
        lambda: survivors(roles, all_processes(), machine()), grace, grace, "processes of an earlier run"
    )


_handed_out: set[int] = set()


def free_port() -> int:
    """Return a free TCP port on 127.0.0.1, a different one for each call.

    It is between 12,000 and 22,000: a server may bind it minutes later, and the system does not give ports below 32,768 to others that ask for
    any port. SGLang also uses the port 10,000 above it.
    """
    while True:
        port = 12_000 + secrets.randbelow(10_000)
        if port in _handed_out:
            continue
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            _handed_out.add(port)
            return port


def listener(port: int) -> str:
    """Return the process that listens on TCP `port`, as `command (process 12)`; empty if /proc does not show it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{columns[9]}]")
    for entry in Path("/proc").iterdir():
        if inodes and entry.name.isdigit():
            with suppress(OSError):
                if any(fd.readlink().name in inodes for fd in (entry / "fd").iterdir()):
                    return f"{(entry / 'comm').read_text().strip()} (process {entry.name})"
    return ""


def claim_port(port: int, role: str) -> int:
    """Return the port for a server: `port`, or a free one for 0. If it is in use, raise a `UserError` that names the process."""
    if port == 0:
        return free_port()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise UserError(f"port {port} cannot be used: {e.strerror}", field=role) from None
            holder = listener(port)
            raise UserError(
                f"port {port} is already in use" + (f" by {holder}" if holder else ""),
                field=role,
                hint="Choose another port (0 means any free port), or stop the process that listens on it.",
            ) from None
    return port


def command(argv: Sequence[str]) -> list[str]:
    """Return the command of a role, with the leading `egm` replaced by the path of this installation."""
    return [sys.executable, "-m", "grounding.cli", *argv[1:]] if argv and argv[0] == "egm" else list(argv)


class Child:
    """A running process of a role: its supervisor, its log, and its entry in the job's state."""

    def __init__(self, state: RoleState, log: Path, process: asyncio.subprocess.Process) -> None:
        self.state, self.log, self.process = state, log, process

    @classmethod
    async def start(
        cls, state: RoleState, argv: Sequence[str], env: Mapping[str, str], log: Path, attempt: int, grace: float
    ) -> Child:
        """Start `argv`. Its output is appended to `log`, after a line with the attempt's number."""
        state.token = uuid.uuid4().hex
        log.parent.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        mine = Environment(role_token=state.token, grace_seconds=grace_period.for_role(grace)).as_environ()
        given = {**Environment(attempt=attempt).as_environ(), **env}
        full = {**os.environ, "PYTHONUNBUFFERED": "1", **given, **mine}
        supervisor = [sys.executable, "-P", "-S", str(SUPERVISOR), str(os.getpid()), str(grace), "--"]
        try:
            with log.open("ab") as out:
                out.write(f"--- attempt {attempt}, {stamp}: {shlex.join(argv)}\n".encode())
                out.flush()
                # A separate session, so that Ctrl-C only reaches `egm run`, which then stops roles in order.
                process = await asyncio.create_subprocess_exec(
                    *supervisor,
                    *command(argv),
                    env=full,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
        except OSError as e:
            raise from_os_error(e) from None
        state.pid, state.ticks, state.machine = process.pid, start_ticks(process.pid), machine()
        state.started_at, state.finished_at, state.exit_code = time.time(), 0.0, None
        return cls(state, log, process)

    async def wait(self) -> int:
        """Return the exit code of the role; 128 + n if signal n ended it."""
        code = await self.process.wait()
        code = 128 - code if code < 0 else code
        self.state.exit_code, self.state.finished_at = code, time.time()
        return code

    def signal(self) -> None:
        """Ask the supervisor to stop the role. The second call makes the supervisor kill the role."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.terminate()

    async def stop(self, grace: float) -> int:
        """Stop the role and all its descendants, first with SIGTERM. A cancellation is delayed until they have ended."""
        self.signal()
        ended = asyncio.ensure_future(self._ended(grace))
        cancelled = False
        while not ended.done():
            try:
                await asyncio.shield(ended)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        return ended.result()

    async def _ended(self, grace: float) -> int:
        try:
            return await asyncio.wait_for(self.wait(), grace + 10)
        except TimeoutError:  # the supervisor itself hangs: kill everything below it
            stop_survivors([self.state], grace=1)
            return await self.wait()

    def log_tail(self, lines: int = 12) -> str:
        """Return the end of the role's log, indented, for an error message."""
        return "\n".join(f"  | {line[:300]}" for line in tail(self.log, lines) if not line.startswith("--- attempt"))


async def until_ready(child: Child, url: str, probe: Probe) -> None:
    """Wait until GET `url` answers 200. If the server ends first or never answers, raise a `Failure` with the end of its log."""
    import aiohttp

    deadline = time.monotonic() + probe.timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5), trust_env=False) as session:
        while child.process.returncode is None:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            if time.monotonic() > deadline:
                raise Failure(
                    f"the server did not answer {url} within {probe.timeout_s:.0f} s. The end of its log:\n"
                    + child.log_tail(),
                    hint=f"Whole log: {child.log}",
                )
            await asyncio.sleep(0.2)
    raise died(child, await child.wait(), "before it was ready")


class ServerDied(Failure):
    """A server role ended while it was needed. Errors of its clients are only a consequence."""


def died(child: Child, code: int, when: str) -> ServerDied:
    """Return the error for a server that ended without being asked to."""
    how = f"signal {signal_name(code)}" if code > 128 else f"exit code {code}"
    return ServerDied(
        f"the server ended {when} ({how}). The end of its log:\n{child.log_tail()}",
        hint=f"Whole log: {child.log}",
    )


def signal_name(code: int) -> str:
    """Return the name of the signal in exit code 128 + n, with its usual cause if there is one."""
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return str(code - 128)
    return f"{name}, usually because memory ran out" if name == "SIGKILL" else name
