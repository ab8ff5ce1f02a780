"""A custom reward in a cluster's pods with real RL: their commands, environment and mounts run as processes of this machine."""

from __future__ import annotations

from pathlib import Path

import pods
import pytest

from grounding.progress import read_progress

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: own}
spec:
  preset: tiny-rl
  model: {source: MODEL}
  output: file://OUTPUT
  podTemplate: {spec: {volumes: [{name: disk, emptyDir: {}}], containers: [{name: main, volumeMounts: [{name: disk, mountPath: OUTPUT}]}]}}
  data: {shapes: {train: 16, perFile: 2}}
  reward: {file: FILE, entryPoint: mine}
  resources: {nodes: 1, gpusPerNode: 0}
  hyperparameters: {maxSteps: 2, saveEvery: 2, validateEvery: 2, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}
"""
# no reward of this project is below 0 or depends on the number of characters
REWARD = """
def mine(data_source, solution_str, ground_truth, extra_info):
    assert len(ground_truth) == 4 and extra_info["width"] > 0, (ground_truth, extra_info)
    return {"score": -7.0 - len(solution_str) / 1000}
"""


def test_the_file_decides_the_score_and_a_changed_one_is_another_job(tmp_path: Path) -> None:
    file, manifest, output = tmp_path / "mine.py", tmp_path / "job.yaml", tmp_path / "output"
    file.write_text(REWARD)
    text = MANIFEST.replace("MODEL", "tiny://").replace("OUTPUT", str(output))
    manifest.write_text(text.replace("FILE", str(file)))
    objects = pods.render(manifest)
    file.unlink()  # the pods must use the submitted content and not this file
    pods.run_job(objects, tmp_path / "pods", {})

    lines = [line["metrics"] for line in read_progress(output / "progress.jsonl") if line["step"] > 0]
    assert len(lines) == 2 and all(-7.3 < m["score"] < -7.0 and m["gradNorm"] > 0 for m in lines), lines
    assert 0.0 <= lines[-1]["valScore"] <= 1.0  # the user's reward does not change the score of the validation

    file.write_text(REWARD.replace("-7.0", "-8.0"))
    with pytest.raises(AssertionError, match=r"ended with 2(?s:.*)the content of reward\.file"):
        pods.run_job(pods.render(manifest), tmp_path / "again", {})


def test_a_file_that_cannot_score_ends_the_pod_before_verl_starts(tmp_path: Path) -> None:
    """The pod runs the mounted file once, for the first row: it ends with exit code 2 and the line of the file."""
    file, manifest = tmp_path / "mine.py", tmp_path / "job.yaml"
    file.write_text(REWARD.replace("    return", "    raise RuntimeError(f'row of {data_source}')\n    return"))
    text = MANIFEST.replace("MODEL", "tiny://").replace("OUTPUT", str(tmp_path / "output"))
    manifest.write_text(text.replace("FILE", str(file)))
    objects = pods.render(manifest)
    file.unlink()
    with pytest.raises(AssertionError, match=r"ended with 2(?s:.*)reward/reward\.py:4(?s:.*)row of"):
        pods.run_job(objects, tmp_path / "pods", {})
