"""The dashboard of a training job: learning progress, speed and costs."""

from __future__ import annotations

from functools import partial

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.kit import OF_JOB, board, figure, lines, row, states

JOB = f'kind="GroundingTrainJob", {OF_JOB}'
NAME = "{{job_name}}"

now = partial(figure, name=NAME)


def dashboard() -> Dashboard:
    """Return the dashboard."""
    made = board(
        "training", "Training job", "One training, or several side by side: SFT and RL.", job="GroundingTrainJob"
    )
    made = made.with_row(row("Now"))
    made = made.with_panel(now("Progress", f"egm_job_progress_ratio{{{JOB}}}", "percentunit", decimals=1))
    made = made.with_panel(now("Time left", f"egm_job_eta_seconds{{{JOB}}}", "s"))
    made = made.with_panel(now("Attempt", f"egm_job_attempts{{{JOB}}}"))
    made = made.with_panel(now("Score", f"egm_job_score{{{JOB}}}", decimals=3, text="Mean reward of the last step."))
    made = made.with_panel(now("Validation", f"egm_job_validation_accuracy{{{JOB}}}", "percentunit", decimals=1))
    made = made.with_panel(
        now("Checkpoint", f"egm_job_checkpoint_step{{{JOB}}}", text="Step of the newest checkpoint.")
    )
    made = made.with_panel(now("GPUs", f"egm_job_gpus{{{JOB}}}"))
    made = made.with_panel(now("GPU hours", f"egm_job_gpu_seconds_total{{{JOB}}} / 3600", "h", decimals=1))
    made = made.with_panel(states("Phase", (f"egm_job_status{{{JOB}}}", "{{job_name}}: {{phase}}, {{reason}}")))
    made = made.with_row(row("Learning progress"))
    made = made.with_panel(
        lines("Score", (f"egm_train_score{{{OF_JOB}}}", NAME), text="Mean reward of a step's answers (RL).")
    )
    made = made.with_panel(
        lines(
            "Validation",
            (f"egm_train_val_accuracy{{{OF_JOB}}}", f"{NAME} accuracy"),
            (f"egm_train_val_iou{{{OF_JOB}}}", f"{NAME} mean IoU"),
            (f"egm_train_parse_rate{{{OF_JOB}}}", f"{NAME} with a box"),
            unit="percentunit",
            most=1,
        )
    )
    made = made.with_panel(lines("Loss", (f"egm_train_loss{{{OF_JOB}}}", NAME)))
    made = made.with_panel(
        lines(
            "KL",
            (f"egm_train_kl_loss{{{OF_JOB}}}", f"{NAME} to the starting model"),
            (f"egm_train_kl{{{OF_JOB}}}", f"{NAME} within a step"),
            text="How far the policy has moved (RL).",
        )
    )
    made = made.with_panel(
        lines(
            "Entropy",
            (f"egm_train_entropy{{{OF_JOB}}}", NAME),
            text="The unit is nats per token. Near zero, the policy no longer explores (RL).",
        )
    )
    made = made.with_panel(
        lines(
            "Length of answers",
            (f"egm_train_response_length_tokens{{{OF_JOB}}}", NAME),
            text="Mean, in tokens (RL).",
        )
    )
    made = made.with_panel(
        lines(
            "Truncated answers and clipped ratios",
            (f"egm_train_response_clipped_ratio{{{OF_JOB}}}", f"{NAME} answers truncated at the limit"),
            (f"egm_train_clip_ratio{{{OF_JOB}}}", f"{NAME} clipped ratios"),
            unit="percentunit",
        )
    )
    made = made.with_panel(lines("Gradient norm", (f"egm_train_grad_norm{{{OF_JOB}}}", NAME)))
    made = made.with_panel(
        lines("Learning rate", (f"egm_train_learning_rate{{{OF_JOB}}}", NAME), unit="sci", decimals=1)
    )
    made = made.with_row(row("How fast?"))
    made = made.with_panel(
        lines(
            "Duration of a step by stage",
            (f'egm_train_phase_seconds{{{OF_JOB}, phase!="step"}}', f"{NAME} {{{{phase}}}}"),
            unit="s",
            stacked=True,
            text="Stages of the last step; validation and saving happen every few steps.",
        )
    )
    made = made.with_panel(
        lines("Duration of a step", (f'egm_train_phase_seconds{{{OF_JOB}, phase="step"}}', NAME), unit="s", least=0)
    )
    made = made.with_panel(
        lines(
            "Tokens per second",
            (f"egm_train_tokens_per_second{{{OF_JOB}}}", NAME),
            least=0,
            text="SFT: tokens of all GPUs together. RL: tokens per GPU, as verl counts them.",
        )
    )
    made = made.with_panel(
        lines(
            "Steps: finished, saved, uploaded",
            (f"egm_job_steps_finished{{{JOB}}}", f"{NAME} finished"),
            (f"egm_job_checkpoint_step{{{JOB}}}", f"{NAME} saved"),
            (f"egm_job_steps_wanted{{{JOB}}}", f"{NAME} wanted"),
            least=0,
        )
    )
    made = made.with_panel(
        lines(
            "GPUs",
            (f"egm_job_gpus{{{JOB}}}", NAME),
            least=0,
            text="The number of GPUs that the job's pods occupy, as the operator sees it.",
        )
    )
    return made.with_panel(
        lines(
            "Reported health problems",
            (f"max by (job_name, reason) (egm_train_event{{{OF_JOB}}})", f"{NAME} {{{{reason}}}}"),
            text="NotFinite, RewardCollapse, LengthAtLimit, Stalled. An empty panel means that no rule reports a problem.",
        )
    )
