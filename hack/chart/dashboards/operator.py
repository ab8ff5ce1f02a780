"""Operator: does it keep up, what does the API server say, what does it use."""

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
    made = made.with_panel(figure("Replicas that watch", "sum(egm_operator_watching)"))
    made = made.with_panel(figure("Waiting for a worker", "sum(egm_operator_queue_depth)"))
    made = made.with_panel(figure("Being worked on", "sum(egm_operator_queue_working)"))
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
    made = made.with_row(row("Does it keep up?"))
    made = made.with_panel(
        lines(
            "Reconciles a second",
            (f"sum by (kind, result) (rate({reconcile}_count[$__rate_interval]))", "{{kind}} {{result}}"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Time of a reconcile",
            (_quantile(0.5, reconcile, "kind"), "{{kind}} half"),
            (_quantile(0.99, reconcile, "kind"), "{{kind}} 99 of 100"),
            unit="s",
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Wait for a worker",
            (f"histogram_quantile(0.5, sum by (le) (rate({wait}_bucket[$__rate_interval])))", "half"),
            (f"histogram_quantile(0.99, sum by (le) (rate({wait}_bucket[$__rate_interval])))", "99 of 100"),
            unit="s",
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Queue",
            ("sum(egm_operator_queue_depth)", "waiting"),
            ("sum(egm_operator_queue_working)", "being worked on"),
            ("sum(egm_operator_queue_delayed)", "later"),
            ("sum(egm_operator_queue_failing)", "failing"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Jobs that ended",
            (
                "sum by (kind, phase, reason) (increase(egm_jobs_finished_total[$__rate_interval]))",
                "{{kind}} {{phase}} {{reason}}",
            ),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Phases that ended",
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
            "Requests a second",
            (f"sum by (method, resource) (rate({request}_count[$__rate_interval]))", "{{method}} {{resource}}"),
            stacked=True,
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Requests without success",
            (
                f'sum by (code, method, resource) (rate({request}_count{{code!="2xx"}}[$__rate_interval]))',
                "{{code}} {{method}} {{resource}}",
            ),
            least=0,
            text="404 and 409 are part of the work: what is gone already, what somebody else wrote meanwhile.",
        )
    )
    made = made.with_panel(
        lines("Time of a request, 99 of 100", (_quantile(0.99, request, "method"), "{{method}}"), unit="s", least=0)
    )
    made = made.with_row(row("What it uses"))
    # process_* are everyone's names: those of the pods that have an operator's metrics
    mine = " * on (instance, job) group_left egm_operator_build_info"
    made = made.with_panel(
        lines(
            "CPU",
            (f"rate(process_cpu_seconds_total[$__rate_interval]){mine}", "{{instance}}"),
            least=0,
            width=6,
            text="Cores; it uses one at most.",
        )
    )
    made = made.with_panel(
        lines("Memory", (f"process_resident_memory_bytes{mine}", "{{instance}}"), unit="bytes", least=0, width=6)
    )
    made = made.with_panel(
        lines("Objects in the cache", ("sum by (kind) (egm_operator_cached_objects)", "{{kind}}"), least=0, width=6)
    )
    return made.with_panel(lines("Open files", (f"process_open_fds{mine}", "{{instance}}"), least=0, width=6))
