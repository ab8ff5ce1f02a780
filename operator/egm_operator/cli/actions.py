"""Users' actions on a cluster: list, submit, read, cancel. Every call makes one or two requests."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kubernetes.aio import config
from rich.console import Console
from rich.live import Live
from ruamel.yaml import YAML

from egm_operator.cli import screen
from egm_operator.controller.progress_poller import reporter
from egm_operator.kinds import JOBS, POD, TRAIN_JOB
from egm_operator.kube.client import LOG, Api, ApiError, missing_kubeconfig
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Manifest, Raw, entries, labels, section, text
from egm_operator.kube.objects import pod as parse_pod
from egm_operator.manifests import own_reward
from egm_operator.names import LABEL_JOB, LABEL_KIND, LABEL_ROLE, PREPARE
from grounding.api import load
from grounding.api.status import Phase
from grounding.errors import Failure, UserError

FIELD_MANAGER = "egm"
LEFTOVER_S = 60
"""Seconds to wait until the ConfigMap of a deleted job with the same name is gone"""
T = TypeVar("T")


@asynccontextmanager
async def connected() -> AsyncIterator[Cluster]:
    """Open a connection with the current kubeconfig. Raises `UserError` if there is none."""
    try:
        cluster = Cluster(await Api.connect())
    except Exception as error:  # the client raises many kinds of errors
        raise UserError(
            f"cannot connect to a cluster: {error}", hint="Set KUBECONFIG, or use `egm run` on this machine."
        ) from None
    try:
        yield cluster
    except ApiError as error:
        raise _as_egm_error(error) from None
    finally:
        await cluster.api.close()


def _as_egm_error(error: ApiError) -> UserError | Failure:
    """Return the error for the user: `UserError` if the request was at fault."""
    if error.status in (401, 403):
        return UserError(
            f"the API server refuses the request: {error.message}",
            hint="Ask the administrator of the namespace for the role `edit`.",
        )
    if error.status in (400, 409, 422):
        return UserError(error.message)
    return Failure(str(error))


def here() -> str:
    """Return the namespace of the current context; `default` if it has none."""
    if missing_kubeconfig():
        return "default"
    try:
        _, active = config.list_kube_config_contexts()
        return text(section(active, "context"), "namespace") or "default"
    except config.ConfigException:
        return "default"


async def jobs(cluster: Cluster, namespace: str) -> list[Raw]:
    """Return the jobs of both kinds; in all namespaces if `namespace` is empty. Raises `UserError` if the cluster does not know the
    kinds.
    """
    found: list[Raw] = []
    for kind in JOBS:
        try:
            page = await cluster.request("GET", cluster.path(kind, namespace))
        except ApiError as error:
            if error.status == 404:
                hint = "Install the chart: helm install egm charts/egm --namespace egm --create-namespace."
                raise UserError(f"the cluster does not know {kind}", hint=hint) from None
            raise
        found += [{"kind": kind, **item} for item in entries(page, "items")]
    return found


async def find(cluster: Cluster, namespace: str, name: str, kind: str = "") -> Raw:
    """Return one job by name. Raises `UserError` if there is none, or if a training and an evaluation have that name and `kind` is
    empty.
    """
    found = [
        j
        for j in await jobs(cluster, namespace)
        if j["metadata"]["name"] == name and kind in ("", JOBS[j["kind"]].short)
    ]
    if not found:
        raise UserError(
            f"no job {name!r} in namespace {namespace}", hint="`egm top` lists the jobs; -n selects another namespace."
        )
    if len(found) > 1:
        raise UserError(
            f"both a training and an evaluation are called {name!r}", hint="Choose one: --kind train or --kind eval."
        )
    return found[0]


async def top(cluster: Cluster, namespace: str, *, ended: bool, once: bool, every_s: float, console: Console) -> None:
    """Show a table of jobs and update it continuously; print it once if the output is not a terminal."""

    async def look() -> Any:
        found = screen.lines(await jobs(cluster, namespace), time.time(), ended)
        rows = None if once or not console.is_terminal else max(1, console.height - 4)
        return screen.table(found, namespaces=not namespace, width=console.width, rows=rows)

    if once or not console.is_terminal:
        console.print(await look())
        return
    with Live(await look(), console=console, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(every_s)
            try:
                live.update(await look(), refresh=True)
            except ApiError as error:
                if error.status in (401, 403):
                    raise  # on a terminal, try again in the next round


async def follow(cluster: Cluster, namespace: str, take: Callable[[list[Raw]], None], every_s: float) -> None:
    """Call `take` with the jobs every `every_s` seconds until cancelled."""
    while True:
        take(await jobs(cluster, namespace))
        await asyncio.sleep(every_s)


def manifests(file: Path) -> list[Raw]:
    """Return the documents of a valid manifest. Raises `ManifestError` like `egm validate`."""
    load(file)
    return [d for d in YAML(typ="safe").load_all(file.read_text(encoding="utf-8")) if d]


async def submit(
    cluster: Cluster, file: Path, namespace: str, say: Callable[[str], None]
) -> list[tuple[str, str, str]]:
    """Apply a manifest's jobs in order, and return (kind, namespace, name) of each. In a job that exists, only fields that may change are
    changed.
    """
    made = []
    for doc in manifests(file):
        kind, meta = doc["kind"], {**doc["metadata"]}
        meta["namespace"] = where = str(meta.get("namespace") or namespace)
        body = {**doc, "metadata": meta}
        body.pop("status", None)
        body, config = _with_reward(body)
        old = await cluster.get(kind, where, meta["name"])
        query = {"fieldManager": FIELD_MANAGER, "force": "true", "fieldValidation": "Strict"}
        path = cluster.path(kind, where, meta["name"])
        send = partial(cluster.request, "PATCH", path, body=body, content="application/apply-patch+yaml")
        if config is not None:
            # do not create other objects for a job that the API server refuses
            await send(query={**query, "dryRun": "All"})
            await _place(cluster, config, old)
        new = await send(query=query)
        if config is not None:
            await _give(cluster, config, new)
        change = "created" if old is None else "unchanged" if _generation(old) == _generation(new) else "changed"
        say(f"{kind.lower()}/{meta['name']} {change} in {where}")
        made.append((kind, where, str(meta["name"])))
    return made


def _with_reward(body: Raw) -> tuple[Raw, Manifest | None]:
    """Return a job for submission, and the ConfigMap for its reward if the reward is a local file. Raises `UserError`."""
    meta, reward = body["metadata"], section(body, "spec", "reward")
    source = reward.get("file")
    file = own_reward.file_here(source) if body["kind"] == TRAIN_JOB.name else None
    if file is None:
        return body, None
    made = own_reward.config_map(meta["name"], meta["namespace"], file)
    sent = {k: v for k, v in reward.items() if k != "file"}
    sent["configMap"] = {"name": made["metadata"]["name"], "key": own_reward.KEY}
    return {**body, "spec": {**body["spec"], "reward": sent}}, made


async def _place(cluster: Cluster, config: Manifest, job: Raw | None) -> None:
    """Create the ConfigMap of a job before its submission; `job`: the existing object. Raises `UserError` if the name is taken."""
    meta = config["metadata"]
    key = (config["kind"], meta["namespace"], meta["name"])
    mine = set() if job is None else {job["metadata"]["uid"]}
    for _ in range(LEFTOVER_S):
        there = await cluster.get(*key)
        if there is None:
            query = {"fieldManager": FIELD_MANAGER}
            await cluster.request("POST", cluster.path(*key[:2]), body=config, query=query)
            return
        if any(labels(there).get(name) != meta["labels"][name] for name in (LABEL_JOB, LABEL_KIND)):
            hint = "Delete it, or give the job another name."
            raise UserError(f"ConfigMap {meta['name']} already exists and does not belong to this job", hint=hint)
        owners = {owner.get("uid") for owner in entries(there, "metadata", "ownerReferences")}
        if owners <= mine and not there["metadata"].get("deletionTimestamp"):
            return  # its name contains the digest, so it contains the same file
        await asyncio.sleep(1)  # it belongs to an earlier job; the cluster deletes it after the job
    raise UserError(
        f"ConfigMap {meta['name']} of an earlier job has not been deleted yet", hint="Submit the job again later."
    )


async def _give(cluster: Cluster, config: Manifest, job: Raw) -> None:
    """Make the job the owner of its ConfigMap, so that both are deleted together."""
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"]} | {k: job["metadata"][k] for k in ("name", "uid")}
    meta = config["metadata"]
    await cluster.patch(config["kind"], meta["namespace"], meta["name"], {"metadata": {"ownerReferences": [owner]}})


def _generation(raw: Raw) -> int:
    return int(raw["metadata"].get("generation", 0))


async def wait(
    cluster: Cluster, wanted: list[tuple[str, str, str]], say: Callable[[str], None], every_s: float = 2.0
) -> bool:
    """Wait until all jobs have ended, printing each change of phase. Return whether all have succeeded."""
    seen: dict[tuple[str, str, str], str] = {}
    while True:
        for key in wanted:
            raw = await cluster.get(*key)
            if raw is None:
                raise UserError(f"{key[0].lower()}/{key[2]} was deleted")
            one = screen.line({"kind": key[0], **raw}, time.time())
            if seen.get(key) != one.phase:
                say(f"{key[2]}: {one.phase}" + (f" ({one.message})" if one.message else ""))
            seen[key] = one.phase
        if all(p in (Phase.SUCCEEDED, Phase.FAILED) for p in seen.values()):
            return all(p == Phase.SUCCEEDED for p in seen.values())
        await asyncio.sleep(every_s)


async def cancel(cluster: Cluster, raw: Raw, *, pause: bool) -> str:
    """Delete a job, or suspend it if `pause`. Return a sentence about what was done and what is kept."""
    meta = raw["metadata"]
    kind, namespace, name = raw["kind"], meta["namespace"], meta["name"]
    if pause:
        await cluster.patch(kind, namespace, name, {"metadata": {"uid": meta["uid"]}, "spec": {"suspend": True}})
        return f"{name} is being suspended; `spec.suspend: false` resumes it"
    await cluster.delete(kind, namespace, name, meta["uid"])
    output = section(raw, "spec").get("output")
    kept = f"; its output is kept in {output}" if output else ""
    return f"{name} is deleted{kept}. Submit the same manifest again to continue from there."


async def pods(cluster: Cluster, raw: Raw, role: str = "") -> list[Raw]:
    """Return a job's pods, oldest first."""
    meta = raw["metadata"]
    wanted = {LABEL_JOB: meta["name"], LABEL_KIND: JOBS[raw["kind"]].short} | ({LABEL_ROLE: role} if role else {})
    query = {"labelSelector": ",".join(f"{k}={v}" for k, v in wanted.items())}
    page = await cluster.request("GET", cluster.path("Pod", meta["namespace"]), query=query)
    found = [{"kind": POD.name, **p} for p in entries(page, "items")]
    return sorted(found, key=lambda p: (p["metadata"]["creationTimestamp"], p["metadata"]["name"]))


async def logs(
    cluster: Cluster,
    raw: Raw,
    role: str,
    *,
    everything: bool,
    follow: bool,
    lines: int,
    out: Callable[[str], Any] = sys.stdout.write,
) -> None:
    """Print logs of the pod that reports (rank 0, or the client), of all pods of a role, or of all pods if `everything`."""
    found, preparation = await pods(cluster, raw, role), False
    if not found and role == PREPARE:  # each pod prepares its own data, without a separate Job
        found, preparation = [p for p in await pods(cluster, raw) if _prepares(p)], True
    if not found:
        hint = (
            "It has no pods yet, or they have been deleted."
            if not role
            else f"Roles: {', '.join(sorted({_role(p) for p in await pods(cluster, raw)}))}."
        )
        raise UserError(f"no pod of {raw['metadata']['name']}" + (f" has the role {role!r}" if role else ""), hint=hint)
    if not (everything or role):
        speaker = reporter(map(parse_pod, found))
        found = [next((p for p in found if speaker is not None and p["metadata"]["name"] == speaker.name), found[-1])]
    many = len(found) > 1

    async def one(pod: Raw) -> None:
        name, mark = pod["metadata"]["name"], f"[{pod['metadata']['name']}] " if many else ""
        path = cluster.path("Pod", pod["metadata"]["namespace"], name, "log")
        query = {"tailLines": str(lines)} | ({"follow": "true"} if follow else {})
        state = parse_pod(pod)
        if preparation or state.preparing or state.failed_to_prepare:  # the main container has not started
            query["container"] = PREPARE
        try:
            async for line in cluster.api.lines(path, query, LOG):
                out(mark + line.decode(errors="replace") + "\n")
        except ApiError as error:
            out(f"{mark}no log: {error.message}\n")

    await asyncio.gather(*(one(p) for p in found))


def _prepares(pod: Raw) -> bool:
    return any(c["name"] == PREPARE for c in entries(pod, "spec", "initContainers"))


def _role(pod: Raw) -> str:
    return text(labels(pod), LABEL_ROLE)


def run(work: Callable[[Cluster], Awaitable[T]]) -> T:
    """Connect to the cluster, call a function with the connection, and return its result."""

    async def whole() -> T:
        async with connected() as cluster:
            return await work(cluster)

    return asyncio.run(whole())


__all__ = ["cancel", "find", "follow", "here", "jobs", "logs", "run", "submit", "top", "wait"]
