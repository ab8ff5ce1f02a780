"""Combine the steps of a check: needs of the jobs, facts about the machine, answers of the hub and stores, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from grounding import api
from grounding.api.places import is_placeholder
from grounding.local.command import Order, chosen, planned_jobs
from grounding.local.runs import read_state
from grounding.local.scheduler import LocalRun, PlannedJob, digest, ordered
from grounding.local.serve import Serving
from grounding.preflight import judge, probe
from grounding.preflight.needs import Needs, needs_of
from grounding.runtime import environment
from grounding.runtime.verdicts import Verdict, raise_failures
from grounding.storage import locate

SERVE_PORT = 30000
HINT = "`egm doctor -f {file}` shows all checks."


def unfinished(run_dir: Path, jobs: Sequence[PlannedJob]) -> list[PlannedJob]:
    """Return the jobs that a run would execute: those that are neither suspended nor finished with the same specification."""
    left, identities = [], {}
    for planned in ordered(jobs):
        state = read_state(run_dir / planned.name)
        identities[planned.name] = state.id if state else ""
        want = digest(planned, [identities.get(name, "") for name in planned.upstream])
        done = state is not None and state.phase == "Succeeded" and state.digest == want
        if not done and not planned.suspended:
            left.append(planned)
    return left


def needs(manifest: Path, jobs: Sequence[PlannedJob], run_dir: Path) -> list[Needs]:
    """Return the needs of `jobs`, which are jobs of the manifest."""
    by_name = {job.metadata.name: job for job in api.load(manifest)}
    layouts = LocalRun(run_dir, jobs, gpu_ids=())
    return [needs_of(by_name[job.name], tuple(job.plan(layouts.layout(job)))) for job in jobs]


def examine(
    wanted: Sequence[Needs], runs: Path, ports: Sequence[int] = (), *, serves: bool = False, ask: bool = True
) -> list[Verdict]:
    """Return all verdicts about this machine for jobs with these needs. The hub and stores are only asked if `ask` is true."""
    found = probe.machine(wanted, judge.NAMES, ports, runs)
    least = environment.of_process().shm_min_bytes
    verdicts = judge.local(found, wanted, serves=serves, shm_least=least)
    if not ask:
        return verdicts
    if wanted:
        return verdicts + judge.remotes(probe.network(wanted), found.disks)
    hub, s3 = probe.hub(), probe.s3()
    return [
        *verdicts,
        judge.reachable(hub, "hub", f"{hub.uri} answers"),
        judge.reachable(s3, "S3", "there are credentials"),
    ]


def _refuse(wanted: Sequence[Needs], runs: Path, what: str, hint: str, ports: Sequence[int], *, serves: bool) -> None:
    """Raise an error that lists what is missing: first from the machine's state, then from the hub and stores. `what`: subject of the message."""
    found = probe.machine(wanted, judge.NAMES, ports, runs)
    least = environment.of_process().shm_min_bytes
    raise_failures(judge.local(found, wanted, serves=serves, shm_least=least), what, hint)
    if any(locate(s.uri).scheme != "file" for n in wanted for s in n.sources) or any(n.output for n in wanted):
        raise_failures(judge.remotes(probe.network(wanted), found.disks), what, hint)


def before_run(order: Order, jobs: Sequence[PlannedJob]) -> None:
    """Check the machine before `egm run` starts anything. Raises `UserError` or `Failure` that lists all that is missing, with cures."""
    todo = chosen(jobs, order.only)
    left = todo if order.restart else unfinished(order.run_dir, jobs)
    left = [job for job in left if job in todo and not job.suspended]
    if left:
        file = order.manifest
        _refuse(needs(file, left, order.run_dir), order.runs, str(file), HINT.format(file=file), (), serves=False)


def before_serving(what: Path | str, job: api.ResolvedEvalJob, serving: Serving, runs: Path) -> None:
    """Check the machine before a server is started, like `before_run`. `what`: the manifest, or a description of a server without one."""
    wanted = needs_of(job, (serving.role,), data=False)
    ports = [serving.port + i for i in range(serving.role.replicas)] if serving.port else []
    hint = HINT.format(file=what) if isinstance(what, Path) else "`egm doctor` shows what this machine has."
    _refuse([wanted], runs, str(what), hint, ports, serves=True)


def doctor(manifests: Sequence[Path], runs: Path, *, ask: bool) -> list[Verdict]:
    """Return the verdicts of `egm doctor`: about the machine in general, or for the jobs of the manifests."""
    wanted: list[Needs] = []
    unset: list[Verdict] = []
    for manifest in manifests:
        order = Order(manifest, runs)
        for found in needs(manifest, planned_jobs(manifest, writes=False), order.run_dir):
            written = not is_placeholder(found.output)
            if not written:
                unset.append(judge.output_unset(manifest, found.output))
            wanted.append(found if written else replace(found, output=""))
    return [*dict.fromkeys(unset), *examine(wanted, runs, (SERVE_PORT,), ask=ask)]
