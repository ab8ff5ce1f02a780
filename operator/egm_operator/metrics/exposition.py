"""Serve `/metrics`. A snapshot of the cache is taken in the event loop and formatted in a thread, so that thousands of jobs do not delay a
reconcile.

Only the leader reports jobs, so a sum over replicas counts each job once. The content type is negotiated as in prometheus-client: OpenMetrics
if the scraper requests it, otherwise the classic text format.
"""

from __future__ import annotations

import asyncio
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Protocol

import orjson
from aiohttp import web
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from egm_operator.kube.cache import Store
from egm_operator.kube.objects import Raw
from egm_operator.metrics.jobs import Facts, MetricSpec, Row, facts, pods_with_gpus, text
from egm_operator.metrics.meters import Meters
from egm_operator.snapshot import identity

OWN_METRICS: dict[str, MetricSpec] = {
    "egm_operator_build_info": MetricSpec("Versions of this process.", ("version", "kopf", "python"), "info"),
    "egm_operator_leader": MetricSpec("1 while this replica leads."),
    "egm_operator_watching": MetricSpec("1 when the watches have started."),
    "egm_operator_refused_listings": MetricSpec(
        "Combinations of kind and namespace that the API server refuses to list; their jobs are not served."
    ),
    "egm_operator_cached_objects": MetricSpec("Objects in the cache.", ("kind",)),
    "egm_operator_queue_depth": MetricSpec("Jobs that wait for a worker."),
    "egm_operator_queue_working": MetricSpec("Jobs that a worker is processing."),
    "egm_operator_queue_delayed": MetricSpec("Jobs that will be processed again at a later time."),
    "egm_operator_queue_failing": MetricSpec("Jobs whose last reconcile has failed and will be tried again."),
}
_END = b"# EOF\n"


class Queue(Protocol):
    """The sizes of a work queue: keys that wait, are being processed, are delayed, or have failed."""

    def __len__(self) -> int: ...
    @property
    def working(self) -> int: ...
    @property
    def delayed(self) -> int: ...
    @property
    def failing(self) -> int: ...


@dataclass(frozen=True)
class View:
    """The data of one scrape. `jobs`: each job with its objects, as JSON."""

    own: Mapping[str, float]
    cached: Mapping[str, int]
    jobs: Iterable[tuple[bytes, Iterable[bytes]]]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def own_families(view: View) -> Iterator[Metric]:
    """Yield a replica's metrics about itself."""
    build = InfoMetricFamily("egm_operator_build", OWN_METRICS["egm_operator_build_info"].text)
    build.add_metric(
        (), {"version": _installed("egm-grounding"), "kopf": _installed("kopf"), "python": platform.python_version()}
    )
    yield build
    for name, value in view.own.items():
        yield GaugeMetricFamily(name, OWN_METRICS[name].text, value=value)
    cached = GaugeMetricFamily(
        "egm_operator_cached_objects", OWN_METRICS["egm_operator_cached_objects"].text, labels=["kind"]
    )
    for kind, count in sorted(view.cached.items()):
        cached.add_metric([kind], count)
    yield cached


class StaticCollector:
    """A collector for prometheus-client's encoders."""

    def __init__(self, *parts: Iterable[Metric]) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        return chain(*self._parts)


class Exposition:
    """Answers scrapes one at a time."""

    def __init__(
        self,
        store: Store,
        queue: Queue,
        meters: Meters,
        leads: Callable[[], bool],
        watching: Callable[[], bool],
        limit: int,
        refused: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store, self.queue, self.meters = store, queue, meters
        self.leads, self.watching, self.limit, self.refused = leads, watching, limit, refused
        self._facts: dict[tuple[str, int], Facts] = {}
        self._one = asyncio.Lock()

    def view(self) -> View:
        """Return the current snapshot."""
        leads = self.leads()
        own = {
            "egm_operator_leader": float(leads),
            "egm_operator_watching": float(self.watching()),
            "egm_operator_refused_listings": float(self.refused()),
            "egm_operator_queue_depth": float(len(self.queue)),
            "egm_operator_queue_working": float(self.queue.working),
            "egm_operator_queue_delayed": float(self.queue.delayed),
            "egm_operator_queue_failing": float(self.queue.failing),
        }
        return View(own, self.store.counts(), self.store.packed() if leads else ())

    def _rows(self, view: View) -> Iterator[Row]:
        """Return the facts of each job. A spec is only parsed again if it has changed, because parsing takes most of the time of a first
        scrape.
        """
        known, self._facts = self._facts, {}
        for job, children in view.jobs:
            raw: Raw = orjson.loads(job)
            spec = identity(raw)
            found = self._facts[spec] = known.get(spec) or facts(raw)
            yield Row(raw, found, pods_with_gpus(map(orjson.loads, children)) if found.gpus else {})

    def render(self, view: View, accept: str = "", zipped: bool = False) -> tuple[str, bytes]:
        """Return content type and body, compressed with gzip if requested."""
        encoder, content_type = choose_encoder(accept)
        body: bytes = encoder(StaticCollector(self.meters.registry.collect(), own_families(view)))
        open_metrics = body.endswith(_END)
        jobs = text(self._rows(view), self.limit, open_metrics) if view.own["egm_operator_leader"] else iter(())
        parts = chain([body.removesuffix(_END)], (c.encode() for c in jobs), [_END] if open_metrics else [])
        if not zipped:
            return content_type, b"".join(parts)
        packing = zlib.compressobj(1, zlib.DEFLATED, 31)  # 31: with a gzip header
        return content_type, b"".join([*(packing.compress(p) for p in parts), packing.flush()])

    async def handle(self, request: web.Request) -> web.Response:
        """Answer a GET request for /metrics."""
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        async with self._one:
            view = self.view()
            kind, body = await asyncio.to_thread(self.render, view, request.headers.get("Accept", ""), zipped)
        headers = {"Content-Type": kind} | ({"Content-Encoding": "gzip"} if zipped else {})
        return web.Response(body=body, headers=headers)
