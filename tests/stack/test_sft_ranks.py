"""SFT on two processes (gloo) has the same loss as on one, and disjoint rows in a seeded order; the loss is also computed by hand."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grounding.progress import read_progress
from grounding.train.checkpoints import local as checkpoints
from grounding.train.sft.torchrun import launcher

MANIFEST = """
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingTrainJob
metadata: {name: sft}
spec:
  preset: tiny-sft
  data: {shapes: {train: 48, perFile: 2}}
  hyperparameters: {maxSteps: 4, saveEvery: 2, warmupSteps: 2, batchSize: 8, microBatchSize: 4}
"""
ROWS = """
import json, os, sys
from pathlib import Path
from grounding.api import load_job, resolve
from grounding.train.sft import run as sft
job = resolve(load_job(Path(sys.argv[1])))
arguments = sft._arguments(job, Path(sys.argv[2]), int(os.environ["WORLD_SIZE"]))
import torch
class Names(torch.utils.data.Dataset):
    def __len__(self): return 48
    def __getitem__(self, index): return index
from grounding.train.sft.trainer import PackedTrainer
collate = lambda rows: {"rows": torch.tensor(rows)}
trainer = PackedTrainer(tokens=1000, model=torch.nn.Linear(1, 1), args=arguments, train_dataset=Names(), data_collator=collate)
seen = [batch["rows"].tolist() for batch in trainer.get_train_dataloader()]
Path(sys.argv[2], f"rows-{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _torchrun(*command: str) -> None:
    run = [sys.executable, "-m", "grounding.train.sft.torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    subprocess.run(
        [*run, f"--master-port={_port()}", *command], check=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    )


def _prepare(folder: Path, manifest: str = MANIFEST) -> list[str]:
    job = folder / "job.yaml"
    job.write_text(manifest)
    role = [sys.executable, "-m", "grounding.cli", "role", "prepare", "--job", str(job), "--data", str(folder / "data")]
    subprocess.run(role, check=True)
    return ["role", "sft", "--job", str(job), "--data", str(folder / "data"), "--model", "tiny://", "--out"]


def _losses(out: Path) -> list[float]:
    return [line["metrics"]["loss"] for line in read_progress(out / "progress.jsonl")]


def _last_step(out: Path) -> int:
    return int(read_progress(out / "progress.jsonl")[-1]["step"])


def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    role = _prepare(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        out.mkdir()
    subprocess.run([sys.executable, "-m", "grounding.cli", *role, str(one)], check=True)
    _torchrun("-m", "grounding.cli", *role, str(two))
    assert _losses(two) == pytest.approx(_losses(one), rel=2e-3) and len(_losses(two)) == 4
    newest = checkpoints.peek(two / "checkpoints")
    assert newest is not None and newest.step == 4 and checkpoints.world_size(newest.path) == 2
    assert (two / "model" / "config.json").exists()

    whole = _losses(two)
    for lost in (two / "model", newest.path):  # simulate a kill of both processes after step 2
        shutil.rmtree(lost)
    _torchrun("-m", "grounding.cli", *role, str(two))
    assert _losses(two) == whole and (two / "model" / "config.json").exists()


def test_a_mistake_of_the_ranks_is_one_of_the_whole(tmp_path: Path) -> None:
    role = _prepare(tmp_path, MANIFEST.replace("batchSize: 8, microBatchSize: 4", "batchSize: 9, microBatchSize: 3"))
    run = [sys.executable, "-m", "grounding.train.sft.torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command = [*run, f"--master-port={_port()}", "-m", "grounding.cli", *role, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 2, done.stderr[-3000:]
    assert "batchSize 9 is not a multiple" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_to_the_launcher_ends_the_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    role = _prepare(tmp_path, MANIFEST.replace("maxSteps: 4", "maxSteps: 400"))
    out = tmp_path / "out"
    out.mkdir()
    run = [sys.executable, "-m", "grounding.train.sft.torchrun", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command = [*run, f"--master-port={_port()}", "-m", "grounding.cli", *role, str(out)]
    with subprocess.Popen(command, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}) as child:
        while not (out / "progress.jsonl").exists() or not _losses(out):
            assert child.poll() is None
            time.sleep(0.05)
        child.terminate()
        assert child.wait(90) == 143
    newest = checkpoints.peek(out / "checkpoints")
    assert newest is not None and newest.step >= _last_step(out), (
        "expected a checkpoint of the last step before the stop"
    )


def test_ranks_see_disjoint_rows_in_a_seeded_order(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(ROWS)
    seen = {}
    for seed in (42, 42, 43):
        folder = tmp_path / f"{seed}-{len(seen)}"
        folder.mkdir()
        (folder / "job.yaml").write_text(MANIFEST.replace("preset: tiny-sft", f"preset: tiny-sft\n  seed: {seed}"))
        _torchrun(str(tmp_path / "rows.py"), str(folder / "job.yaml"), str(folder))
        seen[folder.name] = [json.loads((folder / f"rows-{rank}.json").read_text()) for rank in range(2)]
    first, again, other = seen.values()
    assert first == again and first != other
    mine, theirs = ([row for batch in rank for row in batch] for rank in first)
    assert not set(mine) & set(theirs) and sorted(mine + theirs) == list(range(48))
    assert mine != sorted(mine), "expected the rows in another order than that of the file"


def test_the_loss_is_the_masked_mean_worked_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grounding.data.images import open_images
    from grounding.train.sft.data import Collator, Example, split_target

    processor = AutoProcessor.from_pretrained(tiny_model)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32).eval()
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Locate it"}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    answers = ['[{"bbox_2d": [1, 2, 3, 4]}]', "short"]
    examples = [Example("row", "a.png", *split_target(rendered, answer)) for answer in answers]
    batch = Collator(open_images(tmp_path), processor, model.config.image_token_id, 512)(examples)
    with torch.no_grad():
        out = model(**batch)
    total, count = 0.0, 0
    for row, answer in enumerate(answers):
        target = processor.tokenizer(answer + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
        start = int(batch["attention_mask"][row].sum()) - len(target)
        for place, token in enumerate(target, start):  # the token at `place` is predicted from those before it
            logits = out.logits[row, place - 1].double()
            total += float(torch.logsumexp(logits, 0) - logits[token])
            count += 1
    assert count < int(batch["attention_mask"].sum()), (
        "expected fewer trained tokens than tokens, because the question is masked"
    )
    assert out.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_torchrun_is_started_where_there_is_more_than_one_rank() -> None:
    assert launcher({}, 0, ["role", "sft"]) == [] and launcher({}, 1, []) == []
    assert launcher({"LOCAL_RANK": "0", "WORLD_SIZE": "16", "RANK": "3"}, 8, []) == []
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    command = launcher(env, 8, ["role", "sft", "--job", "f"])
    assert {
        "--nnodes=2",
        "--nproc-per-node=8",
        "--node-rank=1",
        "--master-addr=job-master-0",
        "--master-port=23456",
    } <= set(command)
    assert command[-6:] == ["-m", "grounding.cli", "role", "sft", "--job", "f"]
