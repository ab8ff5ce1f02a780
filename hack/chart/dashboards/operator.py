"""The dashboard of the operator: its work queue, its requests to the API server, its use of CPU and memory."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.kit import board, figure, lines, row, rows


def _quantile(q: float, metric: str, by: str) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket[$__rate_interval])))"


def dashboard() -> Dashboard:
    """Return the dashboard."""
    reconcile, request, wait = (
        f"egm_operator_{m}_seconds" for m in ("reconcile_duration", "api_request_duration", "queue_wait")
    )
    made = board("operator", "Operator", "The operator itself.")
    made = made.with_row(row("Now"))
    made = made.with_panel(figure("Leaders", "sum(egm_operator_leader)", text="One, always."))
    made = made.with_panel(figure("Watching replicas", "sum(egm_operator_watching)"))
    made = made.with_panel(figure("Waiting for a worker", "sum(egm_operator_queue_depth)"))
    made = made.with_panel(figure("Being processed", "sum(egm_operator_queue_working)"))
    made = made.with_panel(
        figure("Failing", "sum(egm_operator_queue_failing)", text="Jobs whose last reconcile has failed.")
    )
    made = made.with_panel(figure("Jobs", "sum(egm_jobs)"))
    made = made.with_panel(
        figure("Without series", "sum(egm_jobs_left_out)", text="Jobs beyond EGM_OPERATOR_METRICS_JOBS.")
    )
    made = made.with_panel(
        figure(
            "Up since",
            "max(process_start_time_seconds and on (instance, job) egm_operator_leader == 1) * 1000",
            "dateTimeFromNow",
        )
    )
    made = made.with_panel(
        rows(
            "Replicas",
            {
                "Leads": (
                    "egm_operator_leader * on (instance) group_left (version, kopf, python) egm_operator_build_info",
                    "short",
                )
            },
            {"instance": "Replica", "version": "Version", "kopf": "kopf", "python": "Python"},
            height=5,
        )
    )
    made = made.with_row(row("Work queue"))
    made = made.with_panel(
        lines(
            "Reconciles per second",
            (f"sum by (kind, result) (rate({reconcile}_count[$__rate_interval]))", "{{kind}} {{result}}"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Duration of a reconcile",
            (_quantile(0.5, reconcile, "kind"), "{{kind}} half"),
            (_quantile(0.99, reconcile, "kind"), "{{kind}} 99th percentile"),
            unit="s",
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Wait for a worker",
            (f"histogram_quantile(0.5, sum by (le) (rate({wait}_bucket[$__rate_interval])))", "median"),
            (f"histogram_quantile(0.99, sum by (le) (rate({wait}_bucket[$__rate_interval])))", "99th percentile"),
            unit="s",
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Queue",
            ("sum(egm_operator_queue_depth)", "waiting"),
            ("sum(egm_operator_queue_working)", "being processed"),
            ("sum(egm_operator_queue_delayed)", "later"),
            ("sum(egm_operator_queue_failing)", "failing"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Finished jobs",
            (
                "sum by (kind, phase, reason) (increase(egm_jobs_finished_total[$__rate_interval]))",
                "{{kind}} {{phase}} {{reason}}",
            ),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Finished phases",
            (
                "sum by (kind, phase) (increase(egm_job_phase_duration_seconds_count[$__rate_interval]))",
                "{{kind}} {{phase}}",
            ),
            least=0,
        )
    )
    made = made.with_row(row("The API server"))
    made = made.with_panel(
        lines(
            "Requests per second",
            (f"sum by (method, resource) (rate({request}_count[$__rate_interval]))", "{{method}} {{resource}}"),
            stacked=True,
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Unsuccessful requests",
            (
                f'sum by (code, method, resource) (rate({request}_count{{code!="2xx"}}[$__rate_interval]))',
                "{{code}} {{method}} {{resource}}",
            ),
            least=0,
            text="404 and 409 are normal: the object was already deleted, or another writer was faster.",
        )
    )
    made = made.with_panel(
        lines(
            "Duration of a request, 99th percentile",
            (_quantile(0.99, request, "method"), "{{method}}"),
            unit="s",
            least=0,
        )
    )
    made = made.with_row(row("Resource usage"))
    # many programs export process_*; select the pods that also export the operator's metrics
    mine = " * on (instance, job) group_left egm_operator_build_info"
    made = made.with_panel(
        lines(
            "CPU",
            (f"rate(process_cpu_seconds_total[$__rate_interval]){mine}", "{{instance}}"),
            least=0,
            width=6,
            text="The unit is cores; the operator uses one at most.",
        )
    )
    made = made.with_panel(
        lines("Memory", (f"process_resident_memory_bytes{mine}", "{{instance}}"), unit="bytes", least=0, width=6)
    )
    made = made.with_panel(
        lines("Objects in the cache", ("sum by (kind) (egm_operator_cached_objects)", "{{kind}}"), least=0, width=6)
    )
    return made.with_panel(lines("Open files", (f"process_open_fds{mine}", "{{instance}}"), least=0, width=6))
