# ruff: noqa: E501  # a table of series
"""Every alert fires when it should, with the right text, and is silent otherwise: `promtool test rules` with invented series."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.cluster.chart_kit import CHART
from tests.cluster.prometheus_kit import promtool

RULES = YAML(typ="safe").load((CHART / "rules" / "alerts.yaml").read_text())
ALERTS = {r["alert"]: r for g in RULES["groups"] for r in g["rules"]}
T = 'kind="GroundingTrainJob",namespace="n",job_name="t"'
E = 'kind="GroundingEvalJob",namespace="n",job_name="e"'
LABELS = {
    "T": {"kind": "GroundingTrainJob", "namespace": "n", "job_name": "t"},
    "E": {"kind": "GroundingEvalJob", "namespace": "n", "job_name": "e"},
}

# alert -> [(series, time in minutes, labels and summary of the alert that fires, or None)]
# Values have promtool's notation: `a+bxn` begins at a and grows by b each minute; `_` is a missing value.
Case = tuple[dict[str, str], int, tuple[dict[str, str], str] | None]
CASES: dict[str, list[Case]] = {
    "EgmOperatorDown": [
        ({}, 6, ({}, "No operator leads.")),
        ({"egm_operator_leader": "0x20"}, 6, ({}, "No operator leads.")),
        ({'egm_operator_leader{pod="a"}': "0x20", 'egm_operator_leader{pod="b"}': "1x20"}, 6, None),
        ({}, 4, None),
    ],
    "EgmOperatorBlind": [
        ({'egm_operator_watching{pod="a",instance="i"}': "0x20"}, 6, ({"pod": "a", "instance": "i"}, "The operator in pod a receives no events.")),
        ({'egm_operator_watching{pod="a"}': "0 0 1x20"}, 8, None),
    ],
    "EgmOperatorForbidden": [
        (
            {'egm_operator_api_request_duration_seconds_count{code="403",method="PATCH",resource="jobs"}': "0+1x20"}, 12,
            ({"method": "PATCH", "resource": "jobs"}, "The operator may not PATCH jobs."),
        ),
        ({'egm_operator_api_request_duration_seconds_count{code="403",method="PATCH",resource="jobs"}': "7x30"}, 25, None),
        ({'egm_operator_api_request_duration_seconds_count{code="2xx",method="PATCH",resource="jobs"}': "0+9x30"}, 25, None),
    ],
    "EgmOperatorApiErrors": [
        (
            {'egm_operator_api_request_duration_seconds_count{code="500"}': "0+10x40", 'egm_operator_api_request_duration_seconds_count{code="2xx"}': "0+90x40"}, 30,
            ({}, "The API server fails 10% of the operator's requests."),
        ),
        ({'egm_operator_api_request_duration_seconds_count{code="409"}': "0+50x40", 'egm_operator_api_request_duration_seconds_count{code="2xx"}': "0+50x40"}, 30, None),
        ({'egm_operator_api_request_duration_seconds_count{code="0"}': "0+1x40", 'egm_operator_api_request_duration_seconds_count{code="2xx"}': "0+99x40"}, 30, None),
    ],
    "EgmOperatorReconcileErrors": [
        (
            {'egm_operator_reconcile_duration_seconds_count{kind="GroundingTrainJob",result="error"}': "0+20x40", 'egm_operator_reconcile_duration_seconds_count{kind="GroundingTrainJob",result="ok"}': "0+80x40"}, 30,
            ({"kind": "GroundingTrainJob"}, "20% of the reconciles of GroundingTrainJob fail."),
        ),
        ({'egm_operator_reconcile_duration_seconds_count{kind="GroundingTrainJob",result="conflict"}': "0+20x40", 'egm_operator_reconcile_duration_seconds_count{kind="GroundingTrainJob",result="ok"}': "0+80x40"}, 30, None),
    ],
    "EgmOperatorSlow": [
        (
            {'egm_operator_queue_wait_seconds_bucket{le="10.0"}': "0+10x40", 'egm_operator_queue_wait_seconds_bucket{le="30.0"}': "0+100x40", 'egm_operator_queue_wait_seconds_bucket{le="+Inf"}': "0+100x40"}, 30,
            ({}, "Jobs wait 27.78s for the operator."),
        ),
        ({'egm_operator_queue_wait_seconds_bucket{le="10.0"}': "0+100x40", 'egm_operator_queue_wait_seconds_bucket{le="+Inf"}': "0+100x40"}, 30, None),
    ],
    "EgmJobFailed": [
        (
            {f'egm_job_status{{{T},phase="Failed",reason="UserError"}}': "1x200", f"egm_job_completion_timestamp_seconds{{{T}}}": "600x200"}, 30,
            ({**LABELS["T"], "phase": "Failed", "reason": "UserError"}, "GroundingTrainJob n/t has failed: UserError."),
        ),
        ({f'egm_job_status{{{T},phase="Failed",reason="UserError"}}': "1x200", f"egm_job_completion_timestamp_seconds{{{T}}}": "600x200"}, 90, None),
        ({f'egm_job_status{{{T},phase="Succeeded",reason="Completed"}}': "1x200", f"egm_job_completion_timestamp_seconds{{{T}}}": "600x200"}, 30, None),
        # a training has failed, and its evaluation of the same name has not
        (
            {f'egm_job_status{{{T},phase="Failed",reason="UserError"}}': "1x200", f"egm_job_completion_timestamp_seconds{{{T}}}": "0x200",
             f'egm_job_status{{{E.replace(chr(34) + "e" + chr(34), chr(34) + "t" + chr(34))},phase="Pending",reason=""}}': "1x200",
             f"egm_job_completion_timestamp_seconds{{{E.replace(chr(34) + 'e' + chr(34), chr(34) + 't' + chr(34))}}}": "5400x200"}, 91, None,
        ),
    ],
    "EgmJobStuck": [
        (
            {f"egm_job_phase_timestamp_seconds{{{T}}}": "0x200", f'egm_job_status{{{T},phase="Pending",reason="Unschedulable"}}': "1x200"}, 90,
            (LABELS["T"], "n/t has waited 1h 30m 0s for its pods."),
        ),
        ({f"egm_job_phase_timestamp_seconds{{{T}}}": "0x200", f'egm_job_status{{{T},phase="Pending",reason="Queued"}}': "1x200"}, 90, None),
        ({f"egm_job_phase_timestamp_seconds{{{T}}}": "0x200", f'egm_job_status{{{T},phase="Pending",reason="Unschedulable"}}': "1x200"}, 50, None),
    ],
    "EgmJobImagePull": [
        ({f'egm_job_status{{{T},phase="Pending",reason="ImagePull"}}': "1x200"}, 12, ({**LABELS["T"], "phase": "Pending", "reason": "ImagePull"}, "An image of n/t cannot be pulled.")),
        ({f'egm_job_status{{{T},phase="Pending",reason="ImagePull"}}': "1x5 _x20"}, 12, None),
    ],
    "EgmJobRefused": [
        ({f'egm_job_status{{{T},phase="Pending",reason="Refused"}}': "1x200"}, 6, ({**LABELS["T"], "phase": "Pending", "reason": "Refused"}, "n/t cannot be carried out: Refused.")),
        ({f'egm_job_status{{{T},phase="Failed",reason="InvalidSpec"}}': "1x200"}, 6, ({**LABELS["T"], "phase": "Failed", "reason": "InvalidSpec"}, "n/t cannot be carried out: InvalidSpec.")),
        ({f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x200"}, 6, None),
    ],
    "EgmJobRestarting": [
        ({f"egm_job_attempts{{{T}}}": "0 1 2 3x100"}, 30, (LABELS["T"], "n/t was started 3 times within an hour.")),
        ({f"egm_job_attempts{{{T}}}": "0 1 2 3x200"}, 90, None),
        ({f"egm_job_attempts{{{T}}}": "0 1x200"}, 30, None),
    ],
    "EgmJobGpusIdle": [
        ({f"egm_job_gpus{{{E}}}": "8x200", f'egm_job_status{{{E},phase="Pending",reason="ServersStarting"}}': "1x200"}, 40, (LABELS["E"], "n/e occupies 8 GPUs and does not run.")),
        ({f"egm_job_gpus{{{E}}}": "8x200", f'egm_job_status{{{E},phase="Running",reason="ClientRunning"}}': "1x200"}, 40, None),
        ({f"egm_job_gpus{{{E}}}": "0x200", f'egm_job_status{{{E},phase="Pending",reason="Unschedulable"}}': "1x200"}, 40, None),
    ],
    "EgmTrainingStalled": [
        (
            {f"egm_job_step_timestamp_seconds{{{T}}}": "600x200", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x200", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x200"}, 60,
            (LABELS["T"], "n/t has finished no step for 50m 0s."),
        ),
        # resumed a moment ago: the last step was before the pause
        ({f"egm_job_step_timestamp_seconds{{{T}}}": "0x200", f"egm_job_phase_timestamp_seconds{{{T}}}": "3000x200", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x200"}, 60, None),
        ({f"egm_job_step_timestamp_seconds{{{T}}}": "0+60x200", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x200", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x200"}, 60, None),
        ({f"egm_job_step_timestamp_seconds{{{T}}}": "0x200", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x200", f'egm_job_status{{{T},phase="Suspended",reason="SuspendedByUser"}}': "1x200"}, 60, None),
    ],
    "EgmTrainingSilent": [
        ({f"egm_job_progress_available{{{T}}}": "0x200"}, 12, (LABELS["T"], "n/t does not report its progress.")),
        ({f"egm_job_progress_available{{{T}}}": "1x200"}, 12, None),
    ],
    "EgmTrainingUnhealthy": [
        (
            {'egm_train_event{namespace="n",job_name="t",pod="p",reason="RewardCollapse"}': "1x200"}, 12,
            ({"namespace": "n", "job_name": "t", "reason": "RewardCollapse"}, "n/t: RewardCollapse."),
        ),
        ({'egm_train_event{namespace="n",job_name="t",pod="p",reason="RewardCollapse"}': "1x5 _x20"}, 12, None),
    ],
    "EgmTrainingUnsaved": [
        (
            {f"egm_job_steps_finished{{{T}}}": "7x600", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 300,
            (LABELS["T"], "n/t has run 4 hours without a checkpoint."),
        ),
        (
            {f"egm_job_steps_finished{{{T}}}": "7x600", f"egm_job_checkpoint_step{{{T}}}": "5x600", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 300, None,
        ),
        # the only checkpoint is of the first minute
        (
            {f"egm_job_steps_finished{{{T}}}": "7x600", f"egm_job_checkpoint_step{{{T}}}": "5x600", f"egm_job_saved_timestamp_seconds{{{T}}}": "60x600", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 300,
            (LABELS["T"], "n/t has run 4 hours without a checkpoint."),
        ),
        ({f"egm_job_steps_finished{{{T}}}": "7x600", f"egm_job_phase_timestamp_seconds{{{T}}}": "0x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 200, None),
    ],
    "EgmTrainingNotUploaded": [
        (
            {f"egm_job_saved_step{{{T}}}": "5x10 20x600", f"egm_job_uploaded_step{{{T}}}": "5x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 60,
            (LABELS["T"], "n/t has had a checkpoint for 30 minutes that is not in its output."),
        ),
        ({f"egm_job_saved_step{{{T}}}": "5x10 20x600", f"egm_job_uploaded_step{{{T}}}": "5x20 20x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 60, None),
        ({f"egm_job_saved_step{{{T}}}": "20x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 60, None),
        # nothing was ever uploaded, because the output refuses
        (
            {f"egm_job_saved_step{{{T}}}": "20x600", f"egm_job_output_writable{{{T}}}": "0x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 60,
            (LABELS["T"], "n/t has had a checkpoint for 30 minutes that is not in its output."),
        ),
        ({f"egm_job_saved_step{{{T}}}": "20x600", f"egm_job_output_writable{{{T}}}": "1x600", f'egm_job_status{{{T},phase="Running",reason="AllPodsRunning"}}': "1x600"}, 60, None),
    ],
    "EgmEvaluationServersMissing": [
        (
            {f"egm_job_servers_ready{{{E}}}": "3x200", f"egm_job_servers{{{E}}}": "4x200", f'egm_job_status{{{E},phase="Running",reason="ClientRunning"}}': "1x200"}, 30,
            (LABELS["E"], "n/e runs with only 3 of its servers."),
        ),
        ({f"egm_job_servers_ready{{{E}}}": "4x200", f"egm_job_servers{{{E}}}": "4x200", f'egm_job_status{{{E},phase="Running",reason="ClientRunning"}}': "1x200"}, 30, None),
        ({f"egm_job_servers_ready{{{E}}}": "0x200", f"egm_job_servers{{{E}}}": "4x200", f'egm_job_status{{{E},phase="Pending",reason="ServersStarting"}}': "1x200"}, 30, None),
    ],
    "EgmEvaluationErrors": [
        (
            {f'egm_job_file_errors{{{E},file="a"}}': "2x200", f'egm_job_file_errors{{{E},file="b"}}': "1x200"}, 12,
            (LABELS["E"], "3 questions of n/e have failed permanently."),
        ),
        ({f'egm_job_file_errors{{{E},file="a"}}': "0x200"}, 12, None),
    ],
}  # fmt: skip


def _plain() -> dict[str, Any]:
    """Return the rules with only their summaries, because promtool compares every annotation."""
    groups = []
    for group in RULES["groups"]:
        rules = [{**r, "annotations": {"summary": r["annotations"]["summary"]}} for r in group["rules"]]
        groups.append({**group, "rules": rules})
    return {"groups": groups}


def test_every_alert_has_cases_of_both_kinds() -> None:
    assert set(CASES) == set(ALERTS)
    for name, cases in CASES.items():
        assert {bool(c[2]) for c in cases} == {True, False}, name


@pytest.mark.parametrize("name", sorted(CASES))
def test_it_fires_and_is_silent(name: str, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text(json.dumps(_plain()))
    tests = []
    for series, minute, wanted in CASES[name]:
        expected = []
        if wanted is not None:
            labels, summary = wanted
            expected = [{"exp_labels": {**labels, **ALERTS[name]["labels"]}, "exp_annotations": {"summary": summary}}]
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": s, "values": v} for s, v in series.items()],
                "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": name, "exp_alerts": expected}],
            }
        )
    (tmp_path / "test.json").write_text(
        json.dumps({"rule_files": ["rules.json"], "evaluation_interval": "1m", "tests": tests})
    )
    done = promtool("test", "rules", str(tmp_path / "test.json"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text(json.dumps(RULES))
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(tmp_path / "rules.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["description"].endswith(".")
