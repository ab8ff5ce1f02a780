"""Observe, plan, act: one worker per job, with many jobs at the same time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from egm_operator.controller.admissions_reader import AdmissionsReader
from egm_operator.controller.progress_poller import Poller
from egm_operator.controller.warnings_reader import WarningsReader
from egm_operator.controller.work_queue import WorkQueue
from egm_operator.kinds import KINDS
from egm_operator.kube.cache import Key, Store
from egm_operator.kube.client import ApiError
from egm_operator.kube.cluster import Cluster
from egm_operator.kube.objects import Manifest, Raw, awaited, section
from egm_operator.metrics.meters import Meters
from egm_operator.plan import Plan, plan
from egm_operator.settings import Settings
from egm_operator.snapshot import Observed, divided
from egm_operator.status import ConditionType, Reason, StatusBuilder, difference, status_of
from grounding.jsontypes import Document

_log = logging.getLogger("egm_operator")
_MADE_LATELY_S = 30.0
"""Seconds for which an unwatched object is assumed to exist after this process has created it. Every plan of a job contains such objects
until the job's pods exist. If they were created again each time and the API server refused one request in three, the job would not progress.
"""
_SAID_AFTER = 3
"""Number of consecutive failures of a job after which its status reports them, because most pass with the next try"""


class Reconciler:
    """Takes keys from the queue and reconciles their jobs. Only the leader runs one."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        queue: WorkQueue[Key],
        poller: Poller,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        meters: Meters | None = None,
        warnings: WarningsReader | None = None,
        absent: set[str] | None = None,
        admissions: AdmissionsReader | None = None,
    ) -> None:
        """`absent`: kinds that the cluster lacks; a failed creation may add one."""
        self.cluster, self.store, self.queue, self.poller = cluster, store, queue, poller
        self.absent: set[str] = set() if absent is None else absent
        self.warnings, self.admissions = warnings, admissions
        self._made: dict[tuple[str, str, str], float] = {}
        """(uid of the job, kind, name) of an unwatched object -> when it was created"""
        self._refused: dict[Key, str] = {}
        """Job -> why the API server has last refused an object without which the job continues"""
        self.settings, self.clock, self.meters = settings, clock, meters or Meters()
        self.reconciles = self.failures = 0

    async def run(self) -> None:
        """Run the workers until cancelled; each worker finishes its current reconcile."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.workers):
                group.create_task(self._worker())

    async def _worker(self) -> None:
        while True:
            key = await self.queue.get()
            try:
                # finish the current reconcile: stopping between two writes is safe, but has no advantage
                begun = asyncio.ensure_future(self._once(key))
                try:
                    await asyncio.shield(begun)
                except asyncio.CancelledError:
                    await asyncio.wait([begun], timeout=10)
                    raise
            finally:
                self.queue.done(key)

    async def _once(self, key: Key) -> None:
        self.reconciles += 1
        extra = {"job": f"{key[1]}/{key[2]}", "kind": key[0]}
        begun, result = time.perf_counter(), "error"
        try:
            await self.reconcile(key)
            self.queue.forget(key)
            result = "ok"
        except ApiError as error:
            self.failures += 1
            if error.status == 409:
                result = "conflict"
                # another writer was faster: read the current state
                if (fresh := await self._fresh(key)) is not None:
                    self.store.put(fresh)
                self.queue.retry(key)
                return
            delay = self.queue.retry(key, error.after)
            _log.warning("%s; trying again in %.1f s", error, delay, extra=extra)
        except Exception as error:
            self.failures += 1
            delay = self.queue.retry(key)
            _log.exception("reconcile failed; trying again in %.1f s", delay, extra=extra)
            await self._report_fault(key, error)
        finally:
            self.meters.reconciled(key[0], result, time.perf_counter() - begun)

    async def _report_fault(self, key: Key, error: Exception) -> None:
        """Report in a job's status that the operator's own code fails for it. Otherwise the job would stop silently. Running pods continue."""
        raw = self.store.get(*key)
        if raw is None:
            return
        try:
            seen = Observed(raw)
            status = StatusBuilder(status_of(raw), seen.generation, self.clock())
            if status.ended:
                return
            text = (
                f"The operator fails to process this job and tries again (see its log): {type(error).__name__}: {error}"
            )
            status.phase(status.current_phase, Reason.INVALID_SPEC, text)
            if (written := status.build()) is not None:
                await self._write_status(key, seen, written)
        except Exception:  # the status may be unreadable or unwritable for the same reason
            _log.warning(
                "the fault could not be written to the status",
                exc_info=True,
                extra={"job": f"{key[1]}/{key[2]}", "kind": key[0]},
            )

    async def _fresh(self, key: Key) -> Raw | None:
        try:
            return await self.cluster.get(*key)
        except ApiError:
            return None

    def observe(self, key: Key) -> Observed | None:
        """Return the job and all objects that it owns; None if the job has been deleted."""
        raw = self.store.get(*key)
        if raw is None:
            return None
        upstream = None
        if wanted := awaited(raw):
            upstream = self.store.get("GroundingTrainJob", key[1], wanted)
        children, earlier = divided(self.store.children(key), raw)
        warnings = () if self.warnings is None else self.warnings.of(children)
        admissions = {} if self.admissions is None else self.admissions.known(children)
        report = self.poller.report(children)
        refused = self._refused.get(key, "")
        absent = frozenset(self.absent)
        return Observed(raw, children, upstream, report, warnings, absent, admissions, refused, earlier)

    async def reconcile(self, key: Key) -> None:
        """Reconcile one job. Raises `ApiError`."""
        seen = self.observe(key)
        if seen is None:
            self._refused.pop(key, None)
            return
        now = self.clock()
        todo = plan(seen, self.settings, now)
        await self._act(key, seen, todo, now)
        if todo.at is not None:
            self.queue.after(key, todo.at - self.clock() + 0.05)

    async def _act(self, key: Key, seen: Observed, todo: Plan, now: float) -> None:
        """Carry out a plan.

        Every write that the next reconcile need not repeat resets the back-off, so the back-off only grows if no write succeeds. Otherwise, if a
        busy server refused one request in three, a job with ten writes would wait minutes.
        """
        namespace = key[1]
        try:
            self._forget_made(now)
            for obj in todo.create:
                await self._create(key, seen, obj, now)
        except ApiError as error:
            await self._not_made(key, seen, error, now)
            raise
        for change in todo.patch:
            body = {**change.body, "metadata": {**section(change.body, "metadata"), "uid": change.uid}}
            self.store.put({"kind": change.kind, **await self.cluster.patch(change.kind, namespace, change.name, body)})
            self.queue.forget(key)
        for event in todo.events:
            said = None if todo.status is None else todo.status.get("attempt")
            attempt = said if isinstance(said, int) else 0
            await self.cluster.event(seen.raw, event.reason, event.message, event.warning, now, attempt)
            _log.log(
                logging.WARNING if event.warning else logging.INFO,
                "%s: %s",
                event.reason,
                event.message,
                extra={"job": f"{namespace}/{key[2]}"},
            )
        if todo.status is not None:
            await self._write_status(key, seen, todo.status)
            self.queue.forget(key)
        for target in todo.delete:
            await self.cluster.delete(target.kind, namespace, target.name, target.uid, force=target.force)
            _log.info("deleted %s %s", target.kind, target.name, extra={"job": f"{namespace}/{key[2]}"})
            self.store.mark_deleting(target.kind, namespace, target.name, target.uid, now)
        await self._create_further(key, seen, todo.further, now)

    async def _create(self, key: Key, seen: Observed, obj: Manifest, now: float) -> None:
        """Create an object, unless it is known to exist. Raises `ApiError`."""
        what = (str(seen.meta.get("uid")), str(obj["kind"]), str(obj["metadata"]["name"]))
        if what in self._made:
            return
        try:
            made = await self.cluster.create(obj)
        except ApiError as error:
            if error.unknown_kind:  # the next plan does without this kind
                self.absent.add(str(obj["kind"]))
            raise
        if not KINDS[obj["kind"]].watched:
            self._made[what] = now
        elif made is not None:
            self.store.put({"apiVersion": obj["apiVersion"], "kind": obj["kind"], **made})
        self.queue.forget(key)
        _log.info("created %s %s", obj["kind"], obj["metadata"]["name"], extra={"job": f"{key[1]}/{key[2]}"})

    async def _create_further(self, key: Key, seen: Observed, objects: Sequence[Manifest], now: float) -> None:
        """Create objects without which the job continues. Let the next plan report a refusal, and post it as an Event. Raises `ApiError`."""
        try:
            for obj in objects:
                await self._create(key, seen, obj, now)
        except ApiError as error:
            text = _refusal(error)
            if self._lasts(key, error) and self._refused.get(key) != text:
                self._refused[key] = text
                await self.cluster.event(seen.raw, str(Reason.REFUSED), text, True, now, 0)
            raise
        self._refused.pop(key, None)

    def _lasts(self, key: Key, error: ApiError) -> bool:
        """Return whether a failed creation is worth reporting, because it will not pass with the next try."""
        return error.final or self.queue.failed(key) >= _SAID_AFTER

    def _forget_made(self, now: float) -> None:
        """Forget unwatched objects whose time has expired; they are stored oldest first."""
        while self._made and now - self._made[first := next(iter(self._made))] >= _MADE_LATELY_S:
            del self._made[first]

    async def _write_status(self, key: Key, seen: Observed, status: Document) -> None:
        patch = difference(section(seen.raw, "status"), status)
        # the version is a precondition, so that a status planned from outdated data is not written
        body = {"metadata": {"resourceVersion": seen.meta["resourceVersion"], "uid": seen.meta["uid"]}, "status": patch}
        try:
            self.store.put({"kind": key[0], **await self.cluster.patch(*key, body, sub="status")})
            self.meters.status_written(seen.raw, status, self.clock())
        except ApiError as error:
            if error.status != 404:  # the job was deleted meanwhile
                raise

    async def _not_made(self, key: Key, seen: Observed, error: ApiError, now: float) -> None:
        """Report in the job's status that an object could not be created, because users look there.

        The user has to resolve a refusal (a pod template, a policy, a quota, a name), and the administrator a webhook that does not answer. If the
        cluster lacks the kind, the plan reports it instead.
        """
        status = StatusBuilder(status_of(seen.raw), seen.generation, now)
        if error.unknown_kind:
            return
        if error.reason == "Leftover":
            status.phase(status.current_phase, Reason.STOPPING, f"Waits: {error.message}")
        elif self._lasts(key, error):
            status.phase(status.current_phase, Reason.REFUSED, _refusal(error))
            if status.is_false(ConditionType.RUNNING):
                status.condition(ConditionType.RUNNING, False, Reason.REFUSED, error.message)
        else:
            return
        if (written := status.build()) is None:
            return
        if written.get("reason") == Reason.REFUSED:
            await self.cluster.event(seen.raw, str(Reason.REFUSED), str(written["message"]), True, now, status.attempt)
        await self._write_status(key, seen, written)


def _refusal(error: ApiError) -> str:
    words = "refuses to create an object of this job" if error.final else "has not created an object of this job yet"
    return f"The API server {words}: {error.message}"
