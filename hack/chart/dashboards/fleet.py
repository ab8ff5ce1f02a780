"""The dashboard of all jobs: running, waiting and failed ones, and the use of GPUs."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.kit import IN_NAMESPACE as NS
from dashboards.kit import bars, board, figure, lines, row, rows


def dashboard() -> Dashboard:
    """Return the dashboard."""
    made = board("fleet", "Fleet", "All jobs: running, waiting and failed ones, and the GPUs that they occupy.")
    made = made.with_row(row("Now"))
    for title, phases in (
        ("Running", "Running"),
        ("Waiting", "Pending|Preparing"),
        ("Restarting", "Restarting"),
        ("Suspended", "Suspended"),
        ("Failed", "Failed"),
        ("Succeeded", "Succeeded"),
    ):
        made = made.with_panel(figure(title, f'sum(egm_jobs{{{NS}, phase=~"{phases}"}}) or vector(0)'))
    made = made.with_panel(
        figure("GPUs in use", f"sum(egm_job_gpus{{{NS}}})", text="GPUs count as in use if their pod has a node.")
    )
    made = made.with_panel(
        figure(
            "GPUs idle",
            f'sum(egm_job_gpus{{{NS}}} unless on (namespace, kind, job_name) egm_job_status{{phase="Running"}}) or vector(0)',
            text="These GPUs are occupied by jobs that do not run, because some of their pods wait for others.",
        )
    )
    made = made.with_panel(
        rows(
            "Jobs that have not ended",
            {
                "Progress": (
                    f'egm_job_progress_ratio{{{NS}}} and on (namespace, kind, job_name) egm_job_status{{phase!~"Succeeded|Failed"}}',
                    "percentunit",
                ),
                "Time left": (f"egm_job_eta_seconds{{{NS}}}", "s"),
                "GPUs": (
                    f'egm_job_gpus{{{NS}}} and on (namespace, kind, job_name) egm_job_status{{phase!~"Succeeded|Failed"}}',
                    "short",
                ),
                "Attempts": (
                    f'egm_job_attempts{{{NS}}} and on (namespace, kind, job_name) egm_job_status{{phase!~"Succeeded|Failed"}}',
                    "short",
                ),
                "In this phase": (
                    "(time() - egm_job_phase_timestamp_seconds)"
                    " * on (namespace, kind, job_name) group_right "
                    f'egm_job_status{{{NS}, phase!~"Succeeded|Failed"}}',
                    "s",
                ),
            },
            {"namespace": "Namespace", "kind": "Kind", "job_name": "Job", "phase": "Phase", "reason": "Reason"},
            height=12,
            links={
                "Job": (
                    "Training",
                    "/d/egm-training?var-datasource=${datasource}&var-namespace=${__data.fields.Namespace}&var-job=${__value.raw}",
                ),
                "Kind": (
                    "Evaluation",
                    "/d/egm-evaluation?var-datasource=${datasource}&var-namespace=${__data.fields.Namespace}&var-job=${__data.fields.Job}",
                ),
            },
        )
    )
    made = made.with_row(row("Over time"))
    made = made.with_panel(lines("Jobs by phase", (f"sum by (phase) (egm_jobs{{{NS}}})", "{{phase}}"), stacked=True))
    made = made.with_panel(
        lines("GPUs by namespace", (f"sum by (namespace) (egm_job_gpus{{{NS}}})", "{{namespace}}"), stacked=True)
    )
    made = made.with_panel(
        lines(
            "Why jobs wait",
            (f'sum by (reason) (egm_jobs{{{NS}, phase=~"Pending|Preparing|Restarting|Suspended"}})', "{{reason}}"),
            stacked=True,
        )
    )
    made = made.with_row(row("Usage and failures"))
    made = made.with_panel(
        bars(
            "GPU hours by namespace",
            (f"sum by (namespace) (increase(egm_job_gpu_seconds_total{{{NS}}}[$__range])) / 3600", "{{namespace}}"),
            "h",
            text="Only the time range shown is counted.",
        )
    )
    made = made.with_panel(
        bars(
            "GPU hours by job",
            (
                f"topk(10, sum by (namespace, job_name) (increase(egm_job_gpu_seconds_total{{{NS}}}[$__range]))) / 3600",
                "{{namespace}}/{{job_name}}",
            ),
            "h",
            text="The ten jobs that used most GPU hours in the time range shown.",
        )
    )
    made = made.with_panel(
        bars(
            "Failed attempts",
            ("sum by (kind, reason) (increase(egm_job_attempts_failed_total[$__range]))", "{{kind}} {{reason}}"),
            text="All namespaces are counted, in the time range shown.",
        )
    )
    made = made.with_panel(
        lines(
            "Time in a phase, 90th percentile",
            (
                "histogram_quantile(0.9, sum by (le, kind, phase) (increase(egm_job_phase_duration_seconds_bucket[$__range])))",
                "{{kind}} {{phase}}",
            ),
            unit="s",
            width=12,
            text="Only phases that ended in the time range shown are counted, in all namespaces.",
        )
    )
    return made.with_panel(
        rows(
            "Finished evaluations",
            {
                "Macro accuracy": (f'egm_job_accuracy{{{NS}, mean="macro"}}', "percentunit"),
                "Low": (
                    f'max by (namespace, kind, job_name) (egm_job_accuracy_bound{{{NS}, bound="low"}})',
                    "percentunit",
                ),
                "High": (
                    f'max by (namespace, kind, job_name) (egm_job_accuracy_bound{{{NS}, bound="high"}})',
                    "percentunit",
                ),
            },
            {"namespace": "Namespace", "job_name": "Job"},
            width=12,
            height=8,
            links={
                "Job": (
                    "Evaluation",
                    "/d/egm-evaluation?var-datasource=${datasource}&var-namespace=${__data.fields.Namespace}&var-job=${__value.raw}",
                )
            },
        )
    )
