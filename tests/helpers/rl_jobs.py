"""Resolved RL jobs for tests of overrides and metrics."""

from __future__ import annotations

from grounding.api import GroundingTrainJob, parse, resolve


def rl_job(
    preset: str, reward: str = "{type: mix, alpha: 0.25, threshold: 0.75}", **hyperparameters: object
) -> GroundingTrainJob:
    """Return a resolved job with the given changes; values are as in YAML."""
    changed = ", ".join(f"{k}: {v}" for k, v in hyperparameters.items())
    text = f"""
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {{name: rl}}
spec:
  preset: {preset}
  data: {{train: [a.json], validation: [b.jsonl], images: [c.tar]}}
  reward: {reward}
  hyperparameters: {{{changed}}}
"""
    return resolve(parse(text)[0])
