"""Start the operator: settings, logs, connections, watches, health, leadership. Stop it in an orderly way."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import kopf
from aiohttp import web

from egm_operator.controller import handlers
from egm_operator.controller.admissions_reader import AdmissionsReader
from egm_operator.controller.progress_poller import Poller
from egm_operator.controller.reconciler import Reconciler
from egm_operator.controller.warnings_reader import WarningsReader
from egm_operator.controller.work_queue import WorkQueue
from egm_operator.kinds import WATCHED
from egm_operator.kube.cache import Key, Store, slim
from egm_operator.kube.client import Api, ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.leader import Lease, lead
from egm_operator.kube.objects import Raw
from egm_operator.metrics.exposition import Exposition
from egm_operator.metrics.meters import Meters
from egm_operator.settings import Settings, load
from grounding.errors import EgmError, Failure, UserError
from grounding.runtime import logs

_log = logging.getLogger("egm_operator")
_LEAVING_S, _LEAVING_AT_ONCE = 10.0, 20
_ABSENT_S = 10.0
_PAUSE_S = 0.2  # short enough that no one notices, longer than a sequence of events
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def set_up_logs(settings: Settings) -> None:
    """Log to stderr in the configured format."""
    handler = logging.StreamHandler(sys.stderr)
    json = logs.Json({}, ("job", "kind", "lease", "requests"))
    handler.setFormatter(json if settings.log_format == "json" else logs.Text("job", "operator"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for chatty in ("kopf", "aiohttp.access", "kubernetes"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


class Operator:
    """All parts of a running operator."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self.cluster, self.settings = cluster, settings
        self.meters = Meters()
        self.queue: WorkQueue[Key] = WorkQueue(waited=self.meters.waited, pause=_PAUSE_S)
        cluster.api.requested = self.meters.asked
        self.leads = False
        self.store = Store(self._woken)
        self.poller = Poller(self.store, cluster, settings, self._woken, cluster.api.clock)
        self.warnings = WarningsReader(self.store, cluster, settings, self._woken)
        self.admissions = AdmissionsReader(self.store, cluster, self._woken)
        self.absent: set[str] = set()
        """Kinds that the cluster lacks, as last observed"""
        self.reconciler = Reconciler(
            cluster,
            self.store,
            self.queue,
            self.poller,
            settings,
            cluster.api.clock,
            meters=self.meters,
            warnings=self.warnings,
            absent=self.absent,
            admissions=self.admissions,
        )
        self.watching, self.stop_watching = threading.Event(), threading.Event()
        self.listed = asyncio.Event()
        self.refused: frozenset[tuple[str, str]] = frozenset()
        """Kinds and namespaces that the API server refuses to list; an empty namespace means the whole cluster"""

    def _woken(self, key: Key) -> None:
        if self.leads:  # a follower must not fill its queue
            self.queue.add(key)

    @property
    def namespace(self) -> str:
        """Return the namespace of the Lease."""
        if self.settings.lease_namespace:
            return self.settings.lease_namespace
        try:
            return _NAMESPACE_FILE.read_text().strip()
        except OSError:
            return "default"

    async def watch(self) -> None:
        """Run kopf until `stop_watching` is set. kopf has a separate thread and event loop, because when it ends, it cancels every task of its
        loop that did not exist when it started; in our loop, these would be our workers.
        """
        registry, settings = kopf.OperatorRegistry(), kopf.OperatorSettings()
        loop = asyncio.get_running_loop()

        def seen(gone: bool, obj: Raw) -> None:
            # reduce the object before it waits, because a backlog of complete objects would take tens of megabytes
            loop.call_soon_threadsafe(self.store.drop if gone else self.store.put, slim(obj))

        def listed() -> None:
            loop.call_soon_threadsafe(self.listed.set)

        handlers.register(registry, seen, listed)
        handlers.configure(settings, namespaced=bool(self.settings.namespaces))

        def run() -> None:
            kopf.run(
                registry=registry,
                settings=settings,
                ready_flag=self.watching,
                stop_flag=self.stop_watching,
                namespaces=list(self.settings.namespaces),
                clusterwide=not self.settings.namespaces,
            )

        await asyncio.to_thread(run)

    async def resync(self) -> None:
        """List all objects, to make up for missed watch events, and plan every job once.

        A kind or namespace whose listing is refused is skipped and reported, so that the others are still served. Raises `ApiError` if
        nothing can be listed.
        """
        self.listed.clear()
        refused: dict[tuple[str, str], ApiError] = {}
        namespaces = self.settings.namespaces if self.settings.namespaces else ("",)
        places = [(kind.name, namespace) for kind in WATCHED for namespace in namespaces]
        for kind, namespace in places:
            found: set[Key] = set()
            try:
                at = await self.cluster.list(kind, namespace, lambda obj, found=found: found.add(self.store.put(obj)))  # type: ignore[misc]
            except ApiError as error:
                if error.status not in (401, 403):
                    raise
                refused[kind, namespace] = error
                continue
            self.store.keep(kind, found, at, namespace)
            self._note(kind, there=at > 0)
        self._report_refused(refused)
        if len(refused) == len(places):
            raise next(iter(refused.values()))
        for key in self.store.jobs():
            self._woken(key)

    def _note(self, kind: str, there: bool) -> None:
        """Record whether the cluster has a kind. If kopf cannot watch definitions, it never watches a kind that is added later: keep it absent."""
        if there and kind in self.absent and not self.settings.namespaces:
            self.absent.discard(kind)
            _log.info("the cluster now has %s", kind)
        elif not there and kind not in self.absent:
            self.absent.add(kind)
            _log.info("the cluster has no %s", kind)

    def _report_refused(self, refused: Mapping[tuple[str, str], ApiError]) -> None:
        """Log which kinds and namespaces are newly refused or served again."""
        for (kind, namespace), error in refused.items():
            if (kind, namespace) not in self.refused:
                _log.error("does not serve %s in %s: %s", kind, namespace or "the cluster", error)
        for kind, namespace in self.refused - refused.keys():
            _log.info("serves %s in %s again", kind, namespace or "the cluster")
        self.refused = frozenset(refused)

    async def work(self) -> None:
        """Do the leader's work until cancelled."""
        while True:  # list again, to see all writes of the previous leader
            try:
                await self.resync()
                break
            except ApiError as error:
                _log.warning("cannot list: %s", error)
                await asyncio.sleep(1)
        self.leads = True
        for key in self.store.jobs():
            self.queue.add(key)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.reconciler.run())
                group.create_task(self.poller.run())
                group.create_task(self.warnings.run())
                group.create_task(self.admissions.run())
                group.create_task(self._resync_now_and_then())
                group.create_task(self._ask_after_the_leaving())
                group.create_task(self._ask_after_the_absent())
        finally:
            self.leads = False
            self.queue.clear()

    async def _resync_now_and_then(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self.listed.wait(), self.settings.resync_seconds)
                await asyncio.sleep(1)  # a listing causes many events
            except TimeoutError:
                pass
            try:
                await self.resync()
            except ApiError as error:
                _log.warning("cannot list: %s", error)

    async def _ask_after_the_leaving(self) -> None:
        """Query objects that have been in deletion for two rounds, a few per round.

        A watch that begins after a deletion never reports it, and kopf does not report an empty listing. Without this query, the job would wait for
        the next resync.
        """
        before: set[Key] = set()
        while True:
            await asyncio.sleep(_LEAVING_S)
            now = self.store.leaving()
            still = sorted(now & before)
            random.shuffle(still)  # slow deletions must not block the others
            for identity in still[:_LEAVING_AT_ONCE]:
                known = self.store.get(*identity)
                try:
                    there = await self.cluster.get(*identity)
                except ApiError:
                    continue
                if there is not None:
                    self.store.put({"kind": identity[0], **there})
                elif known is not None:
                    self.store.drop(known)
            before = now

    async def _ask_after_the_absent(self) -> None:
        """Check periodically for absent kinds, because no event reports a new definition before its first object, and jobs may wait for it."""

        def take(obj: Raw) -> None:
            self.store.put(obj)

        while True:
            await asyncio.sleep(_ABSENT_S)
            for kind in [] if self.settings.namespaces else sorted(self.absent):
                try:
                    self._note(kind, there=await self.cluster.list(kind, "", take) > 0)
                except ApiError:
                    continue
                if kind not in self.absent:
                    for key in self.store.jobs():
                        self._woken(key)

    async def health(self) -> web.AppRunner | None:
        """Serve /healthz, /readyz and /metrics."""
        if not self.settings.health_port:
            return None

        async def healthz(_: web.Request) -> web.Response:
            return web.Response(text="ok\n")

        async def readyz(_: web.Request) -> web.Response:
            if not self.watching.is_set():
                return web.Response(text="the watches have not begun\n", status=503)
            # report ready: a restart would not help the namespaces that are not served, and would interrupt the others
            lines = [
                f"not served: {kind} in {namespace or 'the cluster'}\n" for kind, namespace in sorted(self.refused)
            ]
            return web.Response(text="".join(["ok\n", *lines]))

        app = web.Application()
        app.router.add_get("/healthz", healthz)
        app.router.add_get("/readyz", readyz)
        metrics = Exposition(
            self.store,
            self.queue,
            self.meters,
            lambda: self.leads,
            self.watching.is_set,
            self.settings.metrics_jobs,
            lambda: len(self.refused),
        )
        app.router.add_get("/metrics", metrics.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            host = self.settings.health_host if self.settings.health_host else None  # None: all, IPv4 and IPv6
            await web.TCPSite(runner, host, self.settings.health_port).start()
        except OSError as error:
            raise UserError(
                f"port {self.settings.health_port} cannot be opened: {error.strerror}", field="EGM_OPERATOR_HEALTH_PORT"
            ) from None
        return runner


async def serve(settings: Settings) -> None:
    """Run the operator until SIGTERM or SIGINT. Then finish the current reconciles and release the Lease."""
    try:
        cluster = Cluster(await Api.connect())
    except Exception as error:  # the client raises many kinds of errors
        raise UserError(
            f"cannot connect to a cluster: {error}", hint="Set KUBECONFIG, or run in a pod with a service account."
        ) from None
    operator = Operator(cluster, settings)
    runner = None
    tasks: list[asyncio.Task[None]] = []
    watching: asyncio.Task[None] | None = None
    try:
        runner = await operator.health()
        watching = asyncio.create_task(operator.watch(), name="watch")
        if settings.leader_elect:
            working = asyncio.create_task(
                lead(Lease(cluster, operator.namespace, settings), operator.work), name="lead"
            )
        else:
            working = asyncio.create_task(operator.work(), name="work")
        stopping = asyncio.create_task(_signal(), name="signal")
        tasks = [working, stopping]
        _log.info("started; serving %s", ", ".join(settings.namespaces) or "all namespaces")
        await asyncio.wait([watching, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, working):
            if task.done() and not task.cancelled():
                why = task.exception()
                raise Failure(f"the operator stops: {why or task.get_name() + ' has ended'}") from why
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        operator.stop_watching.set()  # a thread cannot be cancelled
        if watching is not None:
            await asyncio.wait([watching], timeout=10)
        if runner is not None:
            await runner.cleanup()
        await cluster.api.close()
        _log.info("stopped", extra={"requests": dict(cluster.api.requests)})


async def _signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()
    _log.info("asked to stop")


def main() -> None:
    """Run the program and exit with its code."""
    try:
        settings = load(os.environ)
        set_up_logs(settings)
        asyncio.run(serve(settings))
    except EgmError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
