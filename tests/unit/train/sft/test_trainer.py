"""The trainer with packs on the tiny model: masters in transformers' Trainer, resumed runs, checkpoints without masters."""

from __future__ import annotations

import os
import pickle
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed

from grounding.api.hyperparameters import Lora
from grounding.data.images import open_images
from grounding.data.sft_rows import SftRow
from grounding.errors import Failure
from grounding.models import attention
from grounding.models.patch_embedding import use_matrix_product
from grounding.models.tiny import build, demo_corpus
from grounding.train.checkpoints import adapter as adapters
from grounding.train.checkpoints.safe_loading import READ, require_safe
from grounding.train.lora import add as add_lora
from grounding.train.sft.data import PackingCollator, SftDataset
from grounding.train.sft.finite import FiniteGuard
from grounding.train.sft.masters import to_bfloat16
from grounding.train.sft.trainer import PackedTrainer, use_pack_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    made = tmp_path_factory.mktemp("trainer")
    build(made / "model", demo_corpus())
    Image.effect_noise((64, 64), 60).convert("RGB").save(made / "a.png")
    return made


def _trainer(
    folder: Path,
    out: Path,
    steps: int,
    *,
    masters: bool,
    tokens: int = 4096,
    lora: Lora | None = None,
    workers: int = 0,
) -> PackedTrainer:
    use_matrix_product()
    attention.use()
    set_seed(3)
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation=attention.NAME
    )
    if lora is not None:
        add_lora(model, lora, freeze_vision=True)
    held = to_bfloat16(model) if masters else None
    use_pack_loss(model)
    processor = AutoProcessor.from_pretrained(folder / "model")
    colours = ("red", "green", "blue", "yellow", "red and blue", "green and small")
    rows = [
        SftRow("a.png", "<image>\nLocate it", f"the {colour} square " * (1 + n)) for n, colour in enumerate(colours)
    ]
    arguments = TrainingArguments(
        str(out), max_steps=steps, save_steps=2 if not workers else 1, per_device_train_batch_size=3, learning_rate=1e-3, use_cpu=True, report_to=[],
        lr_scheduler_type="constant", disable_tqdm=True, remove_unused_columns=False, logging_steps=1, weight_decay=0.1,
        include_num_input_tokens_seen="no", save_total_limit=None,
        dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0,
    )  # fmt: skip
    collator = PackingCollator(
        open_images(folder), processor, model.config.image_token_id, 512, torch.bfloat16 if masters else torch.float32
    )
    return PackedTrainer(
        model=model, args=arguments, train_dataset=SftDataset(rows, processor), data_collator=collator,
        callbacks=[FiniteGuard(lambda flag: flag)], tokens=tokens, masters=held,
        lora=lora, base=str(folder / "model"),
    )  # fmt: skip


class _Touch:
    """When it is unpickled, it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _losses(trainer: PackedTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("masters", [True, False])
def test_a_resumed_run_ends_with_the_same_weights(folder: Path, tmp_path: Path, masters: bool) -> None:
    straight = _trainer(folder, tmp_path / "straight", 4, masters=masters)
    straight.train()
    first = _trainer(folder, tmp_path / "cut", 2, masters=masters)
    first.train()
    checkpoint, mark = tmp_path / "cut" / "checkpoint-2", tmp_path / "loaded"
    require_safe(checkpoint)
    assert {p.name for p in checkpoint.iterdir() if not any(fnmatch(p.name, pattern) for pattern, _ in READ)} == set()
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(_Touch(mark)))
    resumed = _trainer(folder, tmp_path / "cut", 4, masters=masters)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert not mark.exists(), "loading read a file that the table marks as unused"
    assert _losses(resumed) == _losses(straight)
    one, two = (dict(t.model.named_parameters()) for t in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    if masters:
        assert {p.dtype for p in one.values()} == {torch.bfloat16}
        held = [t.optimizer.optimizer.masters for t in (straight, resumed)]
        assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))


@pytest.mark.parametrize("masters", [True, False])
def test_adapters_resume_exactly_and_nothing_else_is_trained_or_saved(
    folder: Path, tmp_path: Path, masters: bool
) -> None:
    lora = Lora(rank=4, dropout=0.1)  # type: ignore[call-arg]
    straight = _trainer(folder, tmp_path / "straight", 4, masters=masters, lora=lora)
    base = {name: value.clone() for name, value in straight.model.named_parameters() if ".lora_" not in name}
    straight.train()
    first = _trainer(folder, tmp_path / "cut", 2, masters=masters, lora=lora)
    first.train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    require_safe(checkpoint)
    assert {p.name for p in checkpoint.iterdir() if not any(fnmatch(p.name, pattern) for pattern, _ in READ)} == set()
    assert adapters.is_adapter(checkpoint) and not list(checkpoint.glob("model*.safetensors"))
    resumed = _trainer(folder, tmp_path / "cut", 4, masters=masters, lora=lora)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert _losses(resumed) == _losses(straight)
    one, two = (dict(t.model.named_parameters()) for t in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one[name], base[name]) for name in base)
    other = _trainer(folder, tmp_path / "cut", 4, masters=masters, lora=Lora(rank=8))  # type: ignore[call-arg]
    with pytest.raises(Failure, match="a different rank"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_dropout_is_the_same_after_a_resume_within_an_epoch(folder: Path, tmp_path: Path) -> None:
    lora = Lora(rank=4, dropout=0.5)  # type: ignore[call-arg]
    straight = _trainer(folder, tmp_path / "straight", 4, masters=False, lora=lora, workers=1)  # 2 steps per epoch
    straight.train()
    resumed = _trainer(folder, tmp_path / "straight", 4, masters=False, lora=lora, workers=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    assert _losses(resumed) == _losses(straight)


def test_how_rows_are_packed_does_not_change_the_losses(folder: Path, tmp_path: Path) -> None:
    whole, cut = (_trainer(folder, tmp_path / str(n), 3, masters=False, tokens=n) for n in (4096, 60))
    whole.train()
    cut.train()
    assert whole.measured.packs == 1 < cut.measured.packs
    assert whole.measured.tokens == cut.measured.tokens > 0
    assert _losses(cut) == pytest.approx(_losses(whole), rel=1e-3)


def test_a_checkpoint_of_float32_weights_gives_the_masters_all_their_digits(folder: Path, tmp_path: Path) -> None:
    _trainer(folder, tmp_path, 2, masters=False).train()
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    resumed = _trainer(folder, tmp_path, 2, masters=True)
    # all steps are done, so only the state is loaded
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    own = resumed.optimizer.optimizer
    names = {weight: name for name, weight in resumed.model.named_parameters()}
    values = dict(before.named_parameters())
    assert own.masters and not own.restored
    for weight, master in zip(own.weights, own.masters, strict=True):
        assert torch.equal(master, values[names[weight]]) and torch.equal(weight, master.bfloat16())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in own.masters), (
        "expected masters with more digits than bfloat16 has"
    )


def test_a_training_that_has_taken_its_last_step_takes_no_other(folder: Path, tmp_path: Path) -> None:
    for steps in (1, 2):  # stop within an epoch, and at the end of an epoch
        _trainer(folder, tmp_path, steps, masters=False).train()
        resumed = _trainer(folder, tmp_path, steps, masters=False)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
        assert resumed.state.global_step == steps


def test_validation_counts_every_answer_once_and_leaves_the_training_as_it_is(folder: Path, tmp_path: Path) -> None:
    trainer = _trainer(folder, tmp_path, 2, masters=False, tokens=60)
    rows = trainer.train_dataset
    before, loss, right = torch.get_rng_state(), 0.0, 0.0
    trainer.model.train()
    found = trainer.figures_of(rows)
    assert trainer.figures_of(rows, lambda: True) is None, "expected no figures, because a stop ends the validation"
    assert torch.equal(before, torch.get_rng_state()) and trainer.model.training
    tokens = 0
    for row in range(len(rows)):  # compute the loss row by row, from the complete logits
        batch = trainer.data_collator([rows[row]])["batch"]
        with torch.no_grad():
            hidden = trainer.model.model(**_inputs(batch))[0][0]
            logits = hidden @ trainer.model.lm_head.weight.T
        trained = batch.labels != -100
        loss += float(torch.nn.functional.cross_entropy(logits[trained], batch.labels[trained], reduction="sum"))
        right += int((logits[trained].argmax(-1) == batch.labels[trained]).sum())
        tokens += int(trained.sum())
    assert found == pytest.approx((loss / tokens, right / tokens), rel=1e-5)


def _inputs(batch: Any) -> dict[str, Any]:
    from grounding.train.sft.trainer import model_inputs

    return {**model_inputs(batch), "use_cache": False}
