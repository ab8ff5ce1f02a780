"""Run the jobs of one manifest on this machine: order, resume, roles as processes, states on disk.

All code runs in one thread with asyncio, because the kernel's parent-death signal depends on the thread that started a child: it must be
the main thread. Pure functions (order, digest, endpoints) come first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import EgmError, Failure, UserError, from_os_error
from grounding.files import digest_of, read_json, write_json
from grounding.local import inputs
from grounding.local.gpus import Gpus, gpus_of, machine_gpus, users_of
from grounding.local.process import (
    Child,
    ServerDied,
    claim_port,
    died,
    signal_name,
    stop_survivors,
    until_ready,
)
from grounding.local.runs import JobState, RoleState, RunLock, read_state, write_state
from grounding.roles import Layout, Role
from grounding.runtime.environment import Environment
from grounding.runtime.grace import DEFAULT_S

# Fields that affect how or where a job runs, but not its result: after a change, the job continues.
OPERATIONAL = (
    "suspend",
    "maxAttempts",
    "maxDisruptions",
    "resources",
    "tracking",
    "servers",
    "gpusPerServer",
    "concurrency",
)


@dataclass(frozen=True)
class ModelSource:
    """The source of a model: the training `job` of the same run, or, if `job` is empty, the path or URI `place`."""

    job: str = ""
    place: str = ""


@dataclass(frozen=True)
class PlannedJob:
    """One job of the local back end. `document`: the resolved manifest; `sources`: the sources of its models; `plan`: function from a layout
    to roles."""

    name: str
    kind: str
    document: Mapping[str, Any]
    plan: Callable[[Layout], Sequence[Role]]
    sources: tuple[ModelSource, ...] = (ModelSource(),)
    suspended: bool = False
    begun: str = ""
    done: str = ""
    """Digests of the fields that must not change in started work and in finished work; empty: all fields"""
    inputs: tuple[str, ...] = ()
    """Paths and URIs that the job reads, in addition to the model of an upstream job"""

    @property
    def upstream(self) -> tuple[str, ...]:
        """Return the jobs whose models this job uses."""
        return tuple(source.job for source in self.sources if source.job)


def ordered(jobs: Sequence[PlannedJob]) -> list[PlannedJob]:
    """Return the jobs in the manifest's order, but each after the jobs that it depends on. Raises `UserError` for an unknown or
    circular reference. Pure."""
    by_name = {planned.name: planned for planned in jobs}
    done: dict[str, PlannedJob] = {}

    def add(planned: PlannedJob, path: tuple[str, ...]) -> None:
        if planned.name in path:
            raise UserError(
                f"the jobs wait for each other: {' -> '.join((*path, planned.name))}", field="model.trainJob"
            )
        for upstream in planned.upstream:
            if upstream not in by_name:
                raise UserError(
                    f"job {planned.name!r} needs {upstream!r}, which is not in the manifest", field="model.trainJob"
                )
        if planned.name not in done:
            for upstream in planned.upstream:
                add(by_name[upstream], (*path, planned.name))
            done[planned.name] = planned

    for planned in jobs:
        add(planned, ())
    return list(done.values())


def digest(planned: PlannedJob, upstream_ids: Sequence[str]) -> str:
    """Return a digest of everything that affects the job's result. An upstream job's id changes if that job starts from the beginning."""
    spec = {k: v for k, v in dict(planned.document.get("spec", {})).items() if k not in OPERATIONAL}
    return hashlib.sha256(
        orjson.dumps(
            [planned.kind, planned.name, spec, " ".join(upstream_ids)], option=orjson.OPT_SORT_KEYS, default=str
        )
    ).hexdigest()


@dataclass
class LocalRun:
    """A run of `jobs` in `run_dir`. `run` leaves the outcome of each job in `states`."""

    run_dir: Path
    jobs: Sequence[PlannedJob]
    parallel: int = 2
    grace: float = DEFAULT_S
    say: Callable[[str], None] = lambda _: None
    restart: str = ""
    """Token of a request to set aside the earlier work of every job, locally and in its output; a new value for each request"""
    gpu_ids: Sequence[str] = field(default_factory=machine_gpus)
    states: dict[str, JobState] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    exit_code: int = 0

    def __post_init__(self) -> None:
        self._children: set[Child] = set()
        self._plans: dict[str, Sequence[Role]] = {}

    def layout(self, planned: PlannedJob) -> Layout:
        """Return the paths of a job; they are absolute, so that a role's working folder does not matter."""
        run = self.run_dir.absolute()
        models = tuple(str(run / s.job / "model") if s.job else s.place for s in planned.sources)
        return Layout(
            job_file=str(run / planned.name / "job.yaml"),
            data=str(run / "data"),
            out=str(run / planned.name),
            model=models[0],
            models=models,
        )

    def check(self) -> None:
        """Raise `UserError` for roles that this machine cannot run."""
        for planned in self.jobs:
            roles = self._plans[planned.name] = tuple(planned.plan(self.layout(planned)))
            names = {r.name for r in roles}
            for role in roles:
                if missing := set(role.after) - names:
                    raise Failure(
                        f"role {role.name!r} waits for unknown {', '.join(sorted(missing))}", field=planned.name
                    )
                if role.kind == "task" and role.replicas > 1:
                    raise UserError(
                        f"role {role.name!r} needs {role.replicas} machines, but this is one",
                        field=f"{planned.name}: spec.resources",
                        hint="Reduce the job to one node, or submit it to a cluster.",
                    )
            if (need := gpus_of(roles)) > len(self.gpu_ids):
                raise UserError(
                    f"the job needs {need} GPUs, but this process may use {len(self.gpu_ids)}",
                    field=f"{planned.name}: spec.resources",
                    hint="Reduce the number of GPUs, set CUDA_VISIBLE_DEVICES, or submit the job to a cluster.",
                )

    def prepare_folders(self, manifest: Path) -> None:
        """Write run.json and stop leftover processes of a killed run. The caller must hold the lock."""
        path = self.run_dir / "run.json"
        old = read_json(path) if path.exists() else {}
        document = {
            "manifest": str(manifest.absolute()),
            "digest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "createdAt": old.get("createdAt") or time.time(),
            "startedAt": time.time(),
            "jobs": [
                {"name": planned.name, "kind": planned.kind, "upstream": list(planned.upstream)}
                for planned in self.jobs
            ],
        }
        write_json(path, document)
        for folder in sorted(p.parent for p in self.run_dir.glob("*/state.json")):
            state = read_state(folder)
            if state and (count := stop_survivors(state.roles, self.grace)):
                self.say(f"{folder.name}: stopped {count} processes that an earlier run had left behind")

    async def run(self, only: str = "") -> None:
        """Run all jobs, or the job `only`. Return when no further job can run. If cancelled, stop every role first."""
        self._gpus = Gpus(self.gpu_ids)
        self._slots = asyncio.Semaphore(max(1, self.parallel))
        self._preparing = asyncio.Lock()
        finished = {planned.name: asyncio.Event() for planned in self.jobs}
        order = ordered(self.jobs)
        for planned in order:
            state = self.states[planned.name] = read_state(self.run_dir / planned.name) or JobState(
                planned.name, planned.kind
            )
            if (
                only in ("", planned.name) and state.phase != "Succeeded"
            ):  # the messages of an earlier run no longer apply
                state.kind, state.phase, state.reason, state.message = planned.kind, "Pending", "", ""
                write_state(self.run_dir / planned.name, state)

        async def one(planned: PlannedJob) -> None:
            try:
                if only in ("", planned.name):
                    for upstream in [] if only else planned.upstream:
                        await finished[upstream].wait()
                    await self._job(planned)
            finally:
                finished[planned.name].set()

        async with asyncio.TaskGroup() as group:
            for planned in order:
                group.create_task(one(planned))

    def signal_children(self) -> None:
        """Ask every running role to stop. The second call kills them."""
        for child in list(self._children):
            child.signal()

    async def _job(self, planned: PlannedJob) -> None:
        """Run one job to its end and record the outcome. The failure of a job does not raise an exception."""
        folder = self.run_dir / planned.name
        state = self.states[planned.name]
        upstream = [self.states[name] for name in planned.upstream]
        if planned.suspended:
            self._end(state, "Suspended", "Suspended", "spec.suspend is true")
            return
        if missing := next((other for other in upstream if other.phase != "Succeeded"), None):
            self._end(state, "Pending", "UpstreamNotReady", f"waits for {missing.name}, which is {missing.phase}")
            self.exit_code = self.exit_code or 1
            return
        want = digest(planned, [other.id for other in upstream])
        models = [str(self.run_dir.absolute() / name / "model") for name in planned.upstream]
        now = await asyncio.to_thread(inputs.states, (*planned.inputs, *models))
        if state.phase == "Succeeded" and state.digest == want and not self.restart:
            other = inputs.changed(state.inputs, now)
            if not other:
                self.skipped.add(planned.name)
                return
            self.say(f"{planned.name}: {', '.join(other)} changed since the job succeeded; comparing the content")
        ids = [other.id for other in upstream]
        begun, done = (digest_of([text, ids]) if text else "" for text in (planned.begun, planned.done))
        before, after = (state.done, done) if state.phase == "Succeeded" else (state.begun, begun)
        # roles compare the other fields, and continue after allowed changes
        same = state.digest == want or bool(after and before == after)
        if state.digest and (not same or self.restart):
            self._set_aside(folder, planned.name)
            state = self.states[planned.name] = JobState(planned.name, planned.kind)
        roles = self._plans[planned.name]
        async with self._slots, self._gpus.take(gpus_of(roles)) as gpus:
            state.kind, state.digest, state.upstream = planned.kind, want, list(planned.upstream)
            state.id, state.inputs = state.id or uuid.uuid4().hex, now
            state.begun, state.done = begun, done
            state.attempt += 1
            state.started_at, state.finished_at = time.time(), 0.0
            state.created_at = state.created_at or state.started_at
            state.phase, state.reason, state.message, state.roles = "Running", "", "", []
            write_manifest(folder / "job.yaml", planned.document)
            write_state(folder, state)
            try:
                await self._roles(planned, state, roles, gpus)
            except asyncio.CancelledError:
                self._end(state, "Stopped", "Interrupted", "")
                raise
            except EgmError as e:
                self.exit_code = max(self.exit_code, e.exit_code)
                self._end(state, "Failed", "UserError" if e.exit_code == 2 else "RoleFailed", str(e))
            else:
                self._end(state, "Succeeded", "", "")

    def _set_aside(self, folder: Path, name: str) -> None:
        """Move the work of a job whose specification has changed to another folder, so that nothing resumes from it."""
        keep = self.run_dir / "previous"
        keep.mkdir(exist_ok=True)
        target = next(p for n in range(1, 1 << 20) if not (p := keep / f"{name}-{n}").exists())
        folder.rename(target)
        why = "" if self.restart else "its specification or its model has changed; "
        self.say(f"{name}: {why}it starts from the beginning; the earlier work is in {target}")

    def _end(self, state: JobState, phase: str, reason: str, message: str) -> None:
        state.phase, state.reason, state.message = phase, reason, message
        if phase in ("Succeeded", "Failed", "Stopped"):
            state.finished_at = time.time()
        write_state(self.run_dir / state.name, state)

    async def _roles(self, planned: PlannedJob, state: JobState, roles: Sequence[Role], gpus: Sequence[str]) -> None:
        """Run a job's roles in order. A server runs until the tasks that use it have ended. Raises `EgmError`."""
        ready = {r.name: asyncio.Event() for r in roles}
        urls: dict[str, list[str]] = {r.name: [] for r in roles}
        devices = Gpus(gpus)
        users = {r.name: users_of(r, roles) for r in roles}
        ended: set[str] = set()
        running: dict[str, asyncio.Task[None]] = {}
        key = Environment(
            api_key=secrets.token_urlsafe(32)
        ).as_environ()  # other users of this machine can also reach the port

        async def one(role: Role) -> None:
            for name in role.after:
                await ready[name].wait()
            async with devices.take(role.gpus * role.replicas) as mine:
                if role.kind == "task":
                    await task(role, mine)
                else:
                    await server(role, mine)

        async def task(role: Role, mine: Sequence[str]) -> None:
            endpoints = tuple(url for name in role.after for url in urls[name])
            env = {**Environment(endpoints=endpoints).as_environ(), **key} if endpoints else {}
            # Jobs of a run share their data: the second job waits until the first has prepared it.
            async with self._preparing if role.name == "prepare" else contextlib.nullcontext():
                restart = Environment(restart=self.restart).as_environ() if self.restart else {}
                await self._task(role, {**env, **restart, **role.env}, mine, state)
            ended.add(role.name)
            idle = [r for r in roles if r.kind == "server" and role.name in users[r.name] and users[r.name] <= ended]
            for other in idle:
                running[other.name].cancel()
            await asyncio.gather(*(running[r.name] for r in idle), return_exceptions=True)
            ready[role.name].set()

        async def server(role: Role, mine: Sequence[str]) -> None:
            waiting = [asyncio.Event() for _ in range(role.replicas)]

            async def announce() -> None:
                for event in waiting:
                    await event.wait()
                ready[role.name].set()

            async with asyncio.TaskGroup() as replicas:
                replicas.create_task(announce())
                for i, event in enumerate(waiting):
                    name = role.name if role.replicas == 1 else f"{role.name}-{i}"
                    own = mine[i * role.gpus : (i + 1) * role.gpus]
                    replicas.create_task(self._server(role, name, key, own, state, urls[role.name], event))

        try:
            async with asyncio.TaskGroup() as group:
                running |= {r.name: group.create_task(one(r)) for r in roles}
                tasks = [running[r.name] for r in roles if r.kind == "task"]
                await asyncio.wait(tasks or list(running.values()))
                for each in running.values():
                    each.cancel()
        except BaseExceptionGroup as e:
            raise first_error(e) from None

    async def _start(
        self, role: Role, name: str, env: Mapping[str, str], gpus: Sequence[str], state: JobState, port: int = 0
    ) -> Child:
        mine = RoleState(name=name, kind=role.kind, phase="Starting", port=port)
        state.roles.append(mine)
        folder = self.run_dir / state.name
        cuda = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        log = folder / "logs" / f"{name}.log"
        child = await Child.start(mine, role.argv, {**cuda, **env}, log, state.attempt, self.grace)
        self._children.add(child)
        mine.phase = "Running" if role.kind == "task" else "Starting"
        try:
            write_state(folder, state)
        except OSError:  # the disk is full: stop the process, because it is not recorded
            await child.stop(self.grace)
            raise
        return child

    async def _stop(self, child: Child, state: JobState) -> None:
        """Stop a child if it still runs, and record how it ended. Always the last call for a child."""
        if child.process.returncode is None:
            await child.stop(self.grace)
            child.state.phase = "Stopped"
        self._children.discard(child)
        write_state(self.run_dir / state.name, state)

    async def _task(self, role: Role, env: Mapping[str, str], gpus: Sequence[str], state: JobState) -> None:
        child = await self._start(role, role.name, env, gpus, state)
        try:
            code = await child.wait()
            child.state.phase = "Failed" if code else "Succeeded"
        finally:
            await self._stop(child, state)
        if code:
            kind = UserError if code == 2 else Failure
            how = f"was ended by {signal_name(code)}" if code > 128 else f"ended with exit code {code}"
            text = f"its role {role.name} {how}. The end of its log:\n{child.log_tail()}"
            raise kind(text, hint=f"Whole log: {child.log}")

    async def _server(
        self,
        role: Role,
        name: str,
        key: Mapping[str, str],
        gpus: Sequence[str],
        state: JobState,
        urls: list[str],
        ready: asyncio.Event,
    ) -> None:
        fixed = role.ports.get("http", 0)
        port = claim_port(fixed, f"{state.name}: {name}")
        url = f"http://127.0.0.1:{port}"
        env = {**role.env, **key, **Environment(port=port).as_environ()}
        child = await self._start(role, name, env, gpus, state, port)
        try:
            if role.probe:
                await until_ready(child, url + role.probe.path, role.probe)
            child.state.phase = "Running"
            write_state(self.run_dir / state.name, state)
            urls.append(url)
            ready.set()
            code = await child.wait()
            child.state.phase = "Failed"
            raise died(child, code, "while it was in use")
        finally:
            await self._stop(child, state)


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the main error of a failed group of tasks, as an error for people."""
    flat: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        e = todo.pop(0)
        if isinstance(e, BaseExceptionGroup):
            todo += e.exceptions
        else:
            flat.append(e)
    # If a server ends, its client fails too, so the server's error takes precedence.
    best = min(flat, key=lambda e: not isinstance(e, ServerDied))
    return from_os_error(best) if isinstance(best, OSError) else best


def write_manifest(path: Path, document: Mapping[str, Any]) -> None:
    """Write a job atomically as YAML that is a valid manifest. Only the owner may read it, because it may contain keys."""
    from ruamel.yaml import YAML

    from grounding.files import atomic_write

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with atomic_write(path, private=True) as f:
        yaml.dump(dict(document), f)


def locked(run_dir: Path) -> RunLock:
    """Return the lock of `run_dir`. Raises `UserError` if the folder is not writable or another run holds the lock."""
    try:
        return RunLock(run_dir)
    except OSError as e:
        raise from_os_error(e) from None
