"""InternVL in its native layout, tiny and random: SFT, RL by verl on the CPU path, and the real `transformers serve`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from grounding.cli import run as egm
from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from tests.helpers.roles import role_command

SFT = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  model: {source: "tiny://", family: internvl}
  data: {shapes: {train: 400, perFile: 10}, prompt: grounding}
  hyperparameters: {maxSteps: 60, saveEvery: 60, warmupSteps: 5, freezeVision: true}
"""
RL = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: rl}
spec:
  preset: tiny-rl
  model: {source: MODEL, family: internvl}
  data: {shapes: {train: 48, perFile: 10}}
  hyperparameters: {maxSteps: 2, saveEvery: 1, validateEvery: 2, batchSize: 4, miniBatchSize: 4, rollouts: 4, responseLength: 24}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny InternVL after a few steps of SFT."""
    folder = tmp_path_factory.mktemp("internvl")
    job, data = folder / "job.yaml", folder / "data"
    job.write_text(SFT)
    subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
    subprocess.run(role_command("sft", "--job", job, "--data", data, "--model", "tiny://", "--out", folder), check=True)
    return folder / "model"


def test_sft_trains_all_but_the_tower(model: Path) -> None:
    from safetensors.torch import load_file

    before = load_file(model.parent / "initial" / "model.safetensors")
    after = load_file(model / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in n for n in changed) and any("multi_modal_projector" in n for n in changed)
    assert not any("vision_tower" in n for n in changed)
    losses = [line["metrics"]["loss"] for line in read_progress(model.parent / "progress.jsonl")]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_rl_runs_by_verl_and_leaves_a_model(tmp_path: Path, model: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    job, data = tmp_path / "job.yaml", tmp_path / "data"
    job.write_text(RL.replace("MODEL", str(model)))
    subprocess.run(role_command("prepare", "--job", job, "--data", data), check=True)
    subprocess.run(role_command("rl", "--job", job, "--data", data, "--model", model, "--out", tmp_path), check=True)
    lines = [line for line in read_progress(tmp_path / "progress.jsonl") if line["step"]]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["metrics"]["gradNorm"] > 0 for line in lines), (
        "expected a gradient in every step, but all rewards of a step were equal"
    )
    assert "valAccuracy" in lines[-1]["metrics"]
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in n for n in changed) and not any("vision_tower" in n for n in changed)
    AutoProcessor.from_pretrained(tmp_path / "model")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    newest = checkpoints.peek(tmp_path / "checkpoints")
    assert newest is not None and newest.step == 2


def test_the_real_server_answers_questions_about_pictures(tmp_path: Path, model: Path) -> None:
    from PIL import Image

    manifest = tmp_path / "eval.yaml"
    manifest.write_text(f"""
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {{name: eval}}
spec:
  model: {{source: {model}, family: internvl}}
  engine: transformers
  prompt: grounding
  data: {{shapes: {{train: 8, perFile: 2}}}}
  sampling: {{maxTokens: 40}}
  concurrency: 2
""")
    assert egm(["run", "-f", str(manifest), "--runs", str(tmp_path / "runs")]) == 0
    import json

    from grounding.evaluate.results.writer import read_rows

    out = tmp_path / "runs" / "eval" / "eval"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["done"], summary["errors"]) == (16, 0)
    rows = list(read_rows(out))
    assert all(row["prompt_tokens"] > 64 and row["completion_tokens"] for row in rows)
    # the server's greedy answer is the model's own
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grounding.data.images import open_images
    from grounding.prompts import render

    row = rows[0]
    [images] = (tmp_path / "runs" / "eval" / "data").glob("shapes-*/images")
    picture = open_images(images)
    import io

    image = Image.open(io.BytesIO(picture.read(row["image"]))).convert("RGB")
    processor = AutoProcessor.from_pretrained(model)
    net = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    text = {"type": "text", "text": render("grounding", row["sent"])}
    messages = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = processor.apply_chat_template([messages], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, images=[image], return_tensors="pt")
    with torch.no_grad():
        tokens = net.generate(**inputs, max_new_tokens=40, do_sample=False)
    answer = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert row["text"] == answer


def test_prompts_are_narrowed_to_what_vllm_widens(model: Path) -> None:
    pytest.importorskip("verl")
    from PIL import Image
    from transformers import AutoProcessor

    from grounding.train.verl.internvl import narrowed, processor_inputs

    processor = AutoProcessor.from_pretrained(model)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    images = [Image.new("RGB", (640, 300), "red")]
    inputs = processor(text=text, images=images, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] > 1, (
        "expected a picture of more than one tile, so that the test covers tiles"
    )
    wide = inputs["input_ids"][0].tolist()
    assert narrowed(wide, processor) == processor.tokenizer(text)["input_ids"][0]
    stripped = processor_inputs(processor, text=["user\nWhere?"], images=images)
    assert torch.equal(stripped["pixel_values"], inputs["pixel_values"])
