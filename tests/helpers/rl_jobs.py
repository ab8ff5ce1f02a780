"""An RL job as its preset and the defaults make it."""

from __future__ import annotations

from grounding.api import GroundingTrainJob, parse, resolve


def rl_job(preset: str, **hyperparameters: object) -> GroundingTrainJob:
    """A resolved job that changes what is given; values as they stand in YAML."""
    changed = ", ".join(f"{k}: {v}" for k, v in hyperparameters.items())
    text = f"""
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {{name: rl}}
spec:
  preset: {preset}
  data: {{train: [a.json], validation: [b.jsonl], images: [c.tar]}}
  reward: {{type: mix, alpha: 0.25, threshold: 0.75}}
  hyperparameters: {{{changed}}}
"""
    return resolve(parse(text)[0])
