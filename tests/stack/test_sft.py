"""Real SFT: the label mask, freezing, and a killed run whose result equals that of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grounding.api import parse
from grounding.progress import read_progress

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  data: {shapes: {train: 64, perFile: 2}}
  hyperparameters: {maxSteps: 12, saveEvery: 4, warmupSteps: 2}
"""


def _role(job: Path, data: Path, out: Path) -> list[str]:
    where = ["--job", str(job), "--data", str(data), "--model", "tiny://", "--out", str(out)]
    return [sys.executable, "-m", "grounding.cli", "role", "sft", *where]


def _losses(out: Path) -> list[float]:
    return [line["metrics"]["loss"] for line in read_progress(out / "progress.jsonl")]


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    job, data = tmp_path / "job.yaml", tmp_path / "data"
    job.write_text(MANIFEST)
    prepare = [sys.executable, "-m", "grounding.cli", "role", "prepare", "--job", str(job), "--data", str(data)]
    subprocess.run(prepare, check=True)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for out in (straight, killed):
        out.mkdir()
    subprocess.run(_role(job, data, straight), check=True)

    child = subprocess.Popen(_role(job, data, killed))
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(read_progress(killed / "progress.jsonl")) < 6:
        assert child.poll() is None, "the training ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    subprocess.run(_role(job, data, killed), check=True)

    assert len(_losses(straight)) == 12 and all(torch.isfinite(torch.tensor(_losses(straight))))
    assert _losses(killed) == _losses(straight)
    one, two = (load_file(out / "model" / "model.safetensors") for out in (straight, killed))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_labels_are_the_answer_alone(tiny_model: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    from grounding.data.images import open_images
    from grounding.train.sft.data import IGNORE, Collator, Example, split_target

    processor = AutoProcessor.from_pretrained(tiny_model)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Locate assistant"}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    answers = ['[{"bbox_2d": [1, 2, 3, 4]}]', "short"]
    examples = []
    for answer in answers:
        given, target = split_target(rendered, answer)
        examples.append(Example("row", "a.png", given, target))
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    Image.new("RGB", (224, 224)).save(tmp_path / "a.png")
    batch = Collator(open_images(tmp_path), processor, token, 512)(examples)
    for row, answer in enumerate(answers):
        kept = batch["labels"][row][batch["labels"][row] != IGNORE]
        assert processor.tokenizer.decode(kept) == answer + "<|im_end|>\n"
    assert int(batch["mm_token_type_ids"].sum()) == 2 * 49
    assert batch["attention_mask"][1].sum() < batch["attention_mask"][0].sum()


def test_a_thinking_template_s_opening_is_trained() -> None:
    from grounding.train.sft.data import split_target

    given, target = split_target(
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\n", "why\n</think>\n\n[]"
    )
    assert given.endswith("<|im_start|>assistant\n")
    assert target == "<think>\nwhy\n</think>\n\n[]<|im_end|>\n"


def test_vision_is_frozen_but_for_its_merger(tiny_model: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from grounding.models.families import freeze_vision

    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    freeze_vision(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".visual.merger." in n for n in trained) and any("language_model" in n for n in trained)
    assert not any(".visual." in n and ".visual.merger." not in n for n in trained)


def test_a_row_that_is_too_long_is_named(tmp_path: Path) -> None:
    job = parse(MANIFEST.replace("maxSteps: 12", "maxSteps: 12, maxLength: 60"))[0]
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST.replace("maxSteps: 12", "maxSteps: 12, maxLength: 60"))
    assert job.spec.hyperparameters.max_length == 60
    data = tmp_path / "data"
    subprocess.run([*_role(path, data, tmp_path)[:4], "prepare", "--job", str(path), "--data", str(data)], check=True)
    done = subprocess.run(_role(path, data, tmp_path), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "more than maxLength 60" in done.stderr and "Traceback" not in done.stderr


def test_a_broken_picture_is_named(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    from grounding.data.images import open_images
    from grounding.errors import UserError
    from grounding.train.sft.data import Collator, Example, raise_error

    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    collator = Collator(open_images(tmp_path), AutoProcessor.from_pretrained(tiny_model), 0, 512)
    with pytest.raises(UserError, match="row 7: the picture cannot be decoded"):
        raise_error([collator([Example("row 7", "a.png", "x", "y")])])
