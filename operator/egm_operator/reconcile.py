"""Observe, plan, act: one job at a time, many jobs at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from egm_operator.api import ApiError
from egm_operator.cluster import WATCHED, Cluster
from egm_operator.metrics.meters import Meters
from egm_operator.names import LABEL_UID
from egm_operator.observe import Observed
from egm_operator.plan import Plan, plan
from egm_operator.progress import Poller
from egm_operator.queue import WorkQueue
from egm_operator.settings import Settings
from egm_operator.status import Condition, Draft, Phase, Reason, difference
from egm_operator.store import Key, Raw, Store

_log = logging.getLogger("egm_operator")


class Reconciler:
    """Takes keys from the queue. Only the leader runs one."""

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        queue: WorkQueue[Key],
        poller: Poller,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        meters: Meters | None = None,
    ) -> None:
        self.cluster, self.store, self.queue, self.poller = cluster, store, queue, poller
        self.settings, self.clock, self.meters = settings, clock, meters or Meters()
        self.reconciles = self.failures = 0

    async def run(self) -> None:
        """Work until cancelled; each worker finishes what it has begun."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.workers):
                group.create_task(self._worker())

    async def _worker(self) -> None:
        while True:
            key = await self.queue.get()
            try:
                # a reconcile that has begun is finished: between two writes nothing is wrong, but nothing is gained either
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
                # somebody else has written; look at what is there now
                if (fresh := await self._fresh(key)) is not None:
                    self.store.put(fresh)
                self.queue.retry(key)
                return
            delay = self.queue.retry(key, error.after)
            _log.warning("%s; tried again in %.1f s", error, delay, extra=extra)
        except Exception:
            self.failures += 1
            delay = self.queue.retry(key)
            _log.exception("reconcile failed; tried again in %.1f s", delay, extra=extra)
        finally:
            self.meters.reconciled(key[0], result, time.perf_counter() - begun)

    async def _fresh(self, key: Key) -> Raw | None:
        try:
            return await self.cluster.get(*key)
        except ApiError:
            return None

    def observe(self, key: Key) -> Observed | None:
        """The job and its world, or None when it is gone."""
        raw = self.store.get(*key)
        if raw is None:
            return None
        upstream = None
        if wanted := (raw["spec"].get("model") or {}).get("trainJob"):
            upstream = self.store.get("GroundingTrainJob", key[1], wanted)
        children = [c for c in self.store.children(key) if _belongs(c, raw)]
        return Observed(raw, children, upstream, self.poller.report(children))

    async def reconcile(self, key: Key) -> None:
        """Look at one job and do what its plan says. Raises `ApiError`."""
        seen = self.observe(key)
        if seen is None:
            return
        now = self.clock()
        todo = plan(seen, self.settings, now)
        await self._act(key, seen, todo, now)
        if todo.at is not None:
            self.queue.after(key, todo.at - self.clock() + 0.05)

    async def _act(self, key: Key, seen: Observed, todo: Plan, now: float) -> None:
        namespace = key[1]
        try:
            for obj in todo.create:
                made = await self.cluster.create(obj)
                if made is not None and obj["kind"] in WATCHED:
                    self.store.put({"apiVersion": obj["apiVersion"], "kind": obj["kind"], **made})
                _log.info("created %s %s", obj["kind"], obj["metadata"]["name"], extra={"job": f"{namespace}/{key[2]}"})
        except ApiError as error:
            await self._not_made(key, seen, error, now)
            raise
        for change in todo.patch:
            body = {**change.body, "metadata": {"uid": change.uid}}
            self.store.put({"kind": change.kind, **await self.cluster.patch(change.kind, namespace, change.name, body)})
        for event in todo.events:
            attempt = int((todo.status or {}).get("attempt") or 0)
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
        for target in todo.delete:
            await self.cluster.delete(target.kind, namespace, target.name, target.uid)
            _log.info("deleted %s %s", target.kind, target.name, extra={"job": f"{namespace}/{key[2]}"})
            self.store.mark_deleting(target.kind, namespace, target.name, target.uid, now)

    async def _write_status(self, key: Key, seen: Observed, status: Raw) -> None:
        patch = difference(seen.raw.get("status") or {}, status)
        # the version is a precondition: a status planned from an old view is not written
        body = {"metadata": {"resourceVersion": seen.meta["resourceVersion"], "uid": seen.meta["uid"]}, "status": patch}
        try:
            self.store.put({"kind": key[0], **await self.cluster.patch(*key, body, sub="status")})
            self.meters.status_written(seen.raw, status, self.clock())
        except ApiError as error:
            if error.status != 404:  # gone meanwhile
                raise

    async def _not_made(self, key: Key, seen: Observed, error: ApiError, now: float) -> None:
        """An object that the API server refuses is the user's business (a pod template, a policy, a quota, a name): say so where he looks."""
        draft = Draft(seen.raw.get("status"), int(seen.meta.get("generation") or 0), now)
        phase = Phase(draft.new.get("phase") or Phase.PENDING)
        if error.reason == "Leftover":
            draft.phase(phase, Reason.STOPPING, f"Waits: {error.message}")
        elif error.final:
            draft.phase(phase, Reason.REFUSED, f"The API server refuses an object of this job: {error.message}")
            if draft.get(Condition.RUNNING) and not draft.is_true(Condition.RUNNING):
                draft.condition(Condition.RUNNING, False, Reason.REFUSED, error.message)
        else:
            return
        if (status := draft.build()) is None:
            return
        if error.final:
            await self.cluster.event(seen.raw, str(Reason.REFUSED), draft.new["message"], True, now, draft.attempt)
        await self._write_status(key, seen, status)


def _belongs(child: Raw, job: Raw) -> bool:
    """Whether a labelled object is of this job and not of one that had its name before."""
    return bool((child["metadata"].get("labels") or {}).get(LABEL_UID) == job["metadata"]["uid"])
