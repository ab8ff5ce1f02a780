"""The dashboard of an evaluation job: results of the eight files, progress, speed, and the state of the servers."""

from __future__ import annotations

from functools import partial

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.kit import OF_JOB, bars, board, figure, lines, row, rows, states

JOB = f'kind="GroundingEvalJob", {OF_JOB}'
NAME = "{{job_name}}"
FILE = "{{job_name}} {{file}}"
SERVER = "{{endpoint}}"
POD = "{{pod}}"

now = partial(figure, name=NAME)


def dashboard() -> Dashboard:
    """Return the dashboard."""
    made = board("evaluation", "Evaluation job", "One evaluation, or several side by side.", job="GroundingEvalJob")
    made = made.with_row(row("Now"))
    made = made.with_panel(now("Progress", f"egm_job_progress_ratio{{{JOB}}}", "percentunit", decimals=1))
    made = made.with_panel(now("Time left", f"egm_job_eta_seconds{{{JOB}}}", "s"))
    made = made.with_panel(now("Requests per second", f"egm_job_requests_per_second{{{JOB}}}", decimals=1))
    made = made.with_panel(
        now(
            "Macro accuracy",
            f'egm_job_accuracy{{{JOB}, mean="macro"}}',
            "percentunit",
            decimals=2,
            text="The accuracy over all files is not shown while answers are missing.",
        )
    )
    made = made.with_panel(
        now(
            "Failed questions",
            f"sum by (job_name) (egm_job_file_errors{{{JOB}}}) or sum by (job_name) (egm_eval_errors{{{OF_JOB}}})",
        )
    )
    made = made.with_panel(now("Servers ready", f"egm_job_servers_ready{{{JOB}}}"))
    made = made.with_panel(now("GPUs", f"egm_job_gpus{{{JOB}}}"))
    made = made.with_panel(now("GPU hours", f"egm_job_gpu_seconds_total{{{JOB}}} / 3600", "h", decimals=1))
    made = made.with_panel(states("Phase", (f"egm_job_status{{{JOB}}}", "{{job_name}}: {{phase}}, {{reason}}")))
    made = made.with_row(row("The files"))
    made = made.with_panel(
        rows(
            "Result",
            {
                "Accuracy": (f"egm_job_file_accuracy{{{JOB}}}", "percentunit"),
                "Mean IoU": (f"egm_job_file_iou{{{JOB}}}", "percentunit"),
                "Questions": (f"egm_job_file_questions{{{JOB}}}", "short"),
                "Failed": (f"egm_job_file_errors{{{JOB}}}", "short"),
                "Without a box": (f"egm_job_file_unparsed{{{JOB}}}", "short"),
            },
            {"namespace": "Namespace", "job_name": "Job", "file": "File"},
            height=11,
            text="Of finished evaluations.",
        )
    )
    made = made.with_panel(
        rows(
            "Report",
            {"": (f"egm_job_report_info{{{JOB}}}", "none")},
            {"namespace": "Namespace", "job_name": "Job", "uri": "Location"},
            height=4,
            links={"Location": ("Open", "${__value.raw}")},
        )
    )
    made = made.with_panel(
        lines(
            "Accuracy of the answers so far",
            (f"egm_eval_file_accuracy{{{OF_JOB}}}", FILE),
            unit="percentunit",
            most=1,
            width=12,
        )
    )
    made = made.with_panel(bars("Answers by file", (f"egm_eval_file_answers{{{OF_JOB}}}", FILE), width=6))
    made = made.with_panel(
        bars(
            "Unusable answers",
            (
                f"sum by (job_name, file) (egm_eval_file_unparsed{{{OF_JOB}}} + egm_eval_file_errors{{{OF_JOB}}})",
                FILE,
            ),
            width=6,
            text="Answers without a box and failed requests are added up.",
        )
    )
    made = made.with_row(row("The client"))
    made = made.with_panel(
        lines(
            "Questions",
            (f"egm_eval_answered{{{OF_JOB}}}", f"{NAME} answered"),
            (f"egm_eval_questions{{{OF_JOB}}}", f"{NAME} total"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Replies per second",
            (f"sum by (job_name) (rate(egm_eval_replies_total{{{OF_JOB}}}[$__rate_interval]))", NAME),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Latency",
            (
                f"histogram_quantile(0.5, sum by (le, job_name) (rate(egm_eval_latency_seconds_bucket{{{OF_JOB}}}[$__rate_interval])))",
                f"{NAME} half",
            ),
            (
                f"histogram_quantile(0.9, sum by (le, job_name) (rate(egm_eval_latency_seconds_bucket{{{OF_JOB}}}[$__rate_interval])))",
                f"{NAME} 90th percentile",
            ),
            unit="s",
            text="The client measures the time of each HTTP request.",
        )
    )
    made = made.with_panel(
        lines(
            "Requests in flight",
            (f"egm_eval_endpoint_in_flight{{{OF_JOB}}}", SERVER),
            (f"sum by (job_name) (egm_eval_endpoint_limit{{{OF_JOB}}})", f"{NAME} limit"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Failed requests",
            (f"rate(egm_eval_endpoint_failures_total{{{OF_JOB}}}[$__rate_interval])", SERVER),
            unit="reqps",
            least=0,
            text="Failed requests per second. Each one is sent again.",
        )
    )
    made = made.with_panel(
        lines(
            "Prompt tokens found in a cache",
            (
                f"sum by (endpoint) (rate(egm_eval_endpoint_cached_tokens_total{{{OF_JOB}}}[$__rate_interval]))"
                f" / sum by (endpoint) (rate(egm_eval_endpoint_prompt_tokens_total{{{OF_JOB}}}[$__rate_interval]))",
                SERVER,
            ),
            unit="percentunit",
            least=0,
            most=1,
            text="The servers report this share in their answers.",
        )
    )
    made = made.with_row(row("The servers"))
    made = made.with_panel(
        lines(
            "Running requests",
            (f"sum by (pod) (sglang:num_running_reqs{{{OF_JOB}}})", POD),
            (f"sum by (pod) (vllm:num_requests_running{{{OF_JOB}}})", POD),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Waiting requests",
            (f"sum by (pod) (sglang:num_queue_reqs{{{OF_JOB}}})", POD),
            (f"sum by (pod) (vllm:num_requests_waiting{{{OF_JOB}}})", POD),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "KV cache usage",
            (f"max by (pod) (sglang:token_usage{{{OF_JOB}}})", POD),
            (f"max by (pod) (vllm:kv_cache_usage_perc{{{OF_JOB}}})", POD),
            unit="percentunit",
            least=0,
            most=1,
            text="The value is that of the fullest replica.",
        )
    )
    made = made.with_panel(
        lines(
            "Tokens generated per second",
            (f"sum by (pod) (rate(sglang:generation_tokens_total{{{OF_JOB}}}[$__rate_interval]))", POD),
            (f"sum by (pod) (rate(vllm:generation_tokens_total{{{OF_JOB}}}[$__rate_interval]))", POD),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "Hits of the prefix cache",
            (
                f"sum by (pod) (rate(sglang:cached_tokens_total{{{OF_JOB}}}[$__rate_interval]))"
                f" / sum by (pod) (rate(sglang:prompt_tokens_total{{{OF_JOB}}}[$__rate_interval]))",
                POD,
            ),
            (
                f"sum by (pod) (rate(vllm:prefix_cache_hits_total{{{OF_JOB}}}[$__rate_interval]))"
                f" / sum by (pod) (rate(vllm:prefix_cache_queries_total{{{OF_JOB}}}[$__rate_interval]))",
                POD,
            ),
            unit="percentunit",
            least=0,
            most=1,
        )
    )
    return made.with_panel(
        lines(
            "Time to the first token, 90th percentile",
            (
                f"histogram_quantile(0.9, sum by (le, pod) (rate(sglang:time_to_first_token_seconds_bucket{{{OF_JOB}}}[$__rate_interval])))",
                POD,
            ),
            (
                f"histogram_quantile(0.9, sum by (le, pod) (rate(vllm:time_to_first_token_seconds_bucket{{{OF_JOB}}}[$__rate_interval])))",
                POD,
            ),
            unit="s",
            least=0,
        )
    )
