"""`egm serve`: run only the servers of one GroundingEvalJob on this machine, until they are asked to stop.

Each server runs under the same supervisor as in `egm run`. If a server ends unasked, the others are stopped too. A server that is asked to
stop continues to answer open requests for the grace period of its engine, and is then killed.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounding import called
from grounding.errors import Failure, UserError
from grounding.local.gpus import machine_gpus
from grounding.local.process import Child, claim_port, died, until_ready
from grounding.local.runs import RoleState
from grounding.local.scheduler import first_error, write_manifest
from grounding.roles import Layout, Role, plan
from grounding.runtime.environment import Environment

Say = Callable[[str], None]


@dataclass(frozen=True)
class Serving:
    """What to serve. `role`: the server role of a job; `port`: the first port, followed by one for each further server (0: free ports)."""

    role: Role
    folder: Path
    """Folder of the job file and the servers' logs"""
    port: int = 30000
    host: str = "127.0.0.1"
    grace_s: float = 30.0
    key: str = field(default="", repr=False)
    """API key that requests must contain; empty if none is required"""
    gpus: Sequence[str] = field(default_factory=machine_gpus)


def chosen_job(manifest: Path, name: str) -> Any:
    """Return the evaluation job of a manifest, with presets filled in. Raises `UserError` if there is none, or several and no `name`."""
    from grounding import api

    jobs = api.load(manifest)
    named = [j for j in jobs if j.kind == "GroundingEvalJob" and name in ("", j.metadata.name)]
    names = ", ".join(j.metadata.name for j in jobs if j.kind == "GroundingEvalJob")
    if not named:
        what = f"no GroundingEvalJob {name!r}" if name else "no GroundingEvalJob"
        raise UserError(f"{what} is in the manifest", file=manifest, hint=f"It has: {names}." if names else "")
    if len(named) > 1:
        raise UserError("the manifest contains several GroundingEvalJobs", file=manifest, hint=f"Add --job: {names}.")
    if several := named[0].spec.several_models:
        raise UserError(
            f"the job measures {len(several)} models, but only one can be served",
            file=manifest,
            field="spec.sweep.models",
            hint="Write a job with `model` instead, or run this one with `egm run -f`.",
        )
    return named[0]


def serving(manifest: Path, job: Any, runs: Path, **options: Any) -> Serving:
    """Write a job's file to `runs/MANIFEST/serve-JOB`, and return what to serve. Raises `UserError` if it cannot be served here."""
    spec, run = job.spec, (runs / manifest.stem).absolute()
    if spec.endpoints:
        raise UserError("the job uses servers that are already running", file=manifest, field="spec.endpoints")
    model = spec.model.source or str(run / spec.model.train_job / "model")
    if spec.model.train_job and not Path(model, "config.json").is_file():
        raise UserError(
            f"{spec.model.train_job} has not written a model yet",
            file=model,
            field="spec.model.trainJob",
            hint=f"Run it first: {called.command()} run -f {manifest} --only {spec.model.train_job}",
        )
    folder = run / f"serve-{job.metadata.name}"
    write_manifest(folder / "job.yaml", job.model_dump(mode="json", by_alias=True, exclude_none=True))
    layout = Layout(str(folder / "job.yaml"), str(run / "data"), str(folder), model)
    role = next(r for r in plan(job, layout) if r.name == "server")
    return Serving(role, folder, **options)


def require_model(job: Any) -> None:
    """Raise a `UserError` with the file and the remedy if the job's model is a local folder that cannot be served."""
    from grounding.models import folder as model_folder

    folder = model_folder.of_source(job.spec.model.source)
    if folder is not None:
        model_folder.require(folder)


class _Servers:
    def __init__(self, serving: Serving, say: Say) -> None:
        self.serving, self.say = serving, say
        self.children: list[Child] = []

    async def start(self) -> list[str]:
        """Start all servers, wait until they answer, and return their URLs."""
        role, wanted = self.serving.role, self.serving
        if (need := role.gpus * role.replicas) > len(wanted.gpus):
            raise UserError(
                f"{role.replicas} servers need {need} GPUs, but this process may use {len(wanted.gpus)}",
                field="spec.servers, spec.gpusPerServer",
                hint="Reduce the number of servers, or set CUDA_VISIBLE_DEVICES.",
            )
        ports = [claim_port(wanted.port + i if wanted.port else 0, "--port") for i in range(role.replicas)]
        for i, port in enumerate(ports):
            env = {**role.env, **Environment(port=port, host=wanted.host, api_key=wanted.key).as_environ()}
            if role.gpus:
                env["CUDA_VISIBLE_DEVICES"] = ",".join(wanted.gpus[i * role.gpus : (i + 1) * role.gpus])
            log = wanted.folder / "logs" / f"server-{i}.log"
            state = RoleState(name=f"server-{i}", kind="server", phase="Starting", port=port)
            self.children.append(await Child.start(state, role.argv, env, log, 1, wanted.grace_s))
        self.say(f"{role.replicas} starting; logs: {wanted.folder / 'logs'}")
        urls = [f"http://{'127.0.0.1' if wanted.host == '0.0.0.0' else wanted.host}:{p}" for p in ports]  # noqa: S104
        assert role.probe is not None
        try:
            async with asyncio.TaskGroup() as group:
                for child, url in zip(self.children, urls, strict=True):
                    group.create_task(until_ready(child, url + role.probe.path, role.probe))
        except BaseExceptionGroup as error:
            raise first_error(error) from None
        return urls

    async def first_end(self) -> Failure:
        """Wait until a server ends unasked, and return its failure."""
        waits = {asyncio.create_task(c.wait()): c for c in self.children}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        task = next(iter(done))
        return died(waits[task], task.result(), f"unasked ({waits[task].state.name})")

    async def stop(self) -> None:
        """Stop all servers at once, first with SIGTERM."""
        running = [c for c in self.children if c.process.returncode is None]
        if not running:
            return
        start = time.monotonic()
        await asyncio.gather(*(c.stop(self.serving.grace_s) for c in running))
        took = time.monotonic() - start
        killed = "; killed after the grace period" if took >= self.serving.grace_s else ""
        self.say(f"{len(running)} stopped in {took:.1f} s{killed}")

    def hurry(self) -> None:
        """Kill the servers that are still stopping."""
        for child in self.children:
            child.signal()


@contextmanager
def served(serving: Serving, say: Say, news_s: float = 10.0) -> Iterator[list[str]]:
    """Serve while the `with` block runs, and yield the servers' URLs when all answer. `say` is called every `news_s` seconds while they
    load.

    The servers run in a separate thread, so that this works in a notebook, whose thread already has an event loop. Raises the errors of
    `_Servers.start`.
    """
    servers = _Servers(serving, say)
    found: Future[list[str]] = Future()
    under_way: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def work() -> None:
        leave = asyncio.Event()
        under_way.set_result((asyncio.get_running_loop(), leave))
        starting = asyncio.create_task(servers.start())
        leaving = asyncio.create_task(leave.wait())
        try:
            await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                found.set_result(starting.result())
                await leaving
        except BaseException as error:
            found.set_exception(error)
        finally:
            starting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await starting
            await servers.stop()

    thread = threading.Thread(target=lambda: asyncio.run(work()), name="servers", daemon=True)
    thread.start()
    loop, leave = under_way.result()
    began = time.monotonic()
    try:
        while True:
            try:
                urls = found.result(timeout=news_s)
                break
            except TimeoutError:
                say(f"the model has been loading for {time.monotonic() - began:.0f} s; logs: {serving.folder / 'logs'}")
        yield urls
    finally:
        with suppress(RuntimeError):  # the loop has already ended
            loop.call_soon_threadsafe(leave.set)
        thread.join()


async def serve(serving: Serving, say: Say, ready: Callable[[list[str]], None]) -> int:
    """Serve until SIGINT or SIGTERM, then return 0. If a server ends unasked, raise a `Failure` with the end of its log."""
    servers, loop, told = _Servers(serving, say), asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        if told.is_set():
            say("killing")
            servers.hurry()
            return
        told.set()
        say(f"stopping: requests in flight have {serving.grace_s:.0f} s; a second signal kills the servers")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    asked = asyncio.create_task(told.wait())

    async def work() -> Failure:
        ready(await servers.start())
        return await servers.first_end()

    working = asyncio.create_task(work())
    try:
        await asyncio.wait({asked, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not told.is_set():
            raise working.result()
    finally:
        for task in (asked, working):
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working
        await servers.stop()
    return 0
