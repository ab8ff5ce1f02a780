"""Metrics of the operator's own work: reconciles, requests to the API server, waits in the queue, ended phases.

Counters start at zero with the process, and only the leader counts. The values of labels come from closed lists; they contain no names of
jobs or objects, and no paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from egm_operator.metrics.jobs import phase_since
from egm_operator.status import phase_of, reason_text, status_of
from grounding.api.status import Phase

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_PHASES = (1.0, 5.0, 15.0, _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 4 * _HOUR, 12 * _HOUR, _DAY, 3 * _DAY, 7 * _DAY)
FINAL = (Phase.SUCCEEDED, Phase.FAILED)


class Meters:
    """Counters and histograms of one process, in their own registry."""

    def __init__(self) -> None:
        # otherwise each counter would have one more series, with the same value as process_start_time_seconds
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._reconciles = Histogram(
            "egm_operator_reconcile_duration_seconds",
            "Duration of a reconcile. result: ok, conflict (another writer was faster), error.",
            ("kind", "result"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._requests = Histogram(
            "egm_operator_api_request_duration_seconds",
            "Duration of a request to the API server. code: 2xx, the code of a refusal, or 0 if there was no answer.",
            ("method", "resource", "code"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._waits = Histogram(
            "egm_operator_queue_wait_seconds",
            "Time that a job waited for a worker.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._phases = Histogram(
            "egm_job_phase_duration_seconds",
            "Time that jobs have spent in a phase that has ended.",
            ("kind", "phase"),
            buckets=_PHASES,
            registry=self.registry,
        )
        self._failures = Counter(
            "egm_job_attempts_failed",
            "Failed attempts that were followed by another, by reason; a job that fails permanently counts in egm_jobs_finished.",
            ("kind", "reason"),
            registry=self.registry,
        )
        self._finished = Counter(
            "egm_jobs_finished",
            "Jobs that have ended, by phase and reason.",
            ("kind", "phase", "reason"),
            registry=self.registry,
        )

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        """Count a finished reconcile."""
        self._reconciles.labels(kind, result).observe(seconds)

    def asked(self, method: str, path: str, code: int, seconds: float) -> None:
        """Count a request with the answer `code`; 0: no answer."""
        answer = "2xx" if 200 <= code <= 299 else str(code)
        self._requests.labels(method, resource(path), answer).observe(seconds)

    def waited(self, seconds: float) -> None:
        """Count the wait of a key that a worker has taken."""
        self._waits.observe(seconds)

    def status_written(self, raw: Mapping[str, Any], status: Mapping[str, Any], now: float) -> None:
        """Count the changes between the status of the job `raw` and the new `status`."""
        kind, before = str(raw["kind"]), phase_of(status_of(raw))
        new = status_of({"kind": kind, "status": status})
        phase, reason = phase_of(new), reason_text(new)
        if phase is before:
            return
        if before not in FINAL:  # a job whose spec was fixed leaves the phase Failed, whose duration is not measured
            self._phases.labels(kind, before).observe(max(0.0, now - phase_since(raw)))
        if phase == Phase.RESTARTING:
            self._failures.labels(kind, reason).inc()
        if phase in FINAL:
            self._finished.labels(kind, phase, reason).inc()


def resource(path: str) -> str:
    """Return the resource of an API path with its subresource, such as `pods/proxy` for the progress of a pod. It contains no names.

    Paths are, for example, `/api/v1/namespaces/n/pods/p:8090/proxy/progress` or `/apis/batch/v1/jobs`.
    """
    parts = path.partition("?")[0].strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    if not rest:
        return "other"
    return f"{rest[0]}/{rest[2]}" if len(rest) > 2 else rest[0]
