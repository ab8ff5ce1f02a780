"""Packs contain every row once and in order, stay within their limits, and give the padded batch's loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.api import read, resolve
from grounding.models import attention
from grounding.train.sft.packing import Batch, split

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 1000), st.none() | st.integers(1, 20), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_pack_and_no_pack_is_too_large(
    lengths: list[int], tokens: int, rows: int | None, at_least: int
) -> None:
    at_least = min(at_least, len(lengths))
    packs = split(lengths, tokens, rows, at_least)
    assert [row for pack in packs for row in range(pack.start, pack.stop)] == list(range(len(lengths)))
    assert len(packs) >= at_least
    for pack in packs:
        assert pack.stop > pack.start
        assert sum(lengths[pack]) <= max(tokens, *lengths)
        assert rows is None or pack.stop - pack.start <= rows
    if rows is None and at_least == 1 and tokens >= max(lengths):
        # only the limit of tokens applies: the packs are the fewest in this order, at most twice the lower bound
        assert all(sum(lengths[pack]) <= tokens for pack in packs)
        assert len(packs) <= 2 * -(-sum(lengths) // tokens)


def test_fewer_rows_than_packs_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 rows cannot make 3 packs"):
        split([1, 2], 10, at_least=3)
    assert split([], 10, at_least=0) == []


def test_a_step_of_the_preset_is_two_packs() -> None:
    """Only tokensPerGpu limits a pack, unless the job gives microBatchSize."""
    spec = {"preset": "egm-4b-sft", "data": {"train": ["/d/x.json"], "images": ["/d/p"]}}
    document = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingTrainJob", "metadata": {"name": "a"}}
    job, found = read({**document, "spec": spec})
    assert job is not None, found
    h: Any = resolve(job).spec
    assert len(split([240] * h.hyperparameters.batch_size, 16384, h.hyperparameters.micro_batch_size)) == 2
    assert h.hyperparameters.gradient_checkpointing is None


def _batch(lengths: list[int], pictures: list[int]) -> Batch:
    tokens, patches = sum(lengths), sum(pictures)
    return Batch(
        input_ids=torch.arange(tokens),
        labels=torch.arange(tokens) + 1,
        position_ids=torch.arange(4 * tokens).reshape(4, tokens),
        pixel_values=torch.arange(patches * 3).reshape(patches, 3),
        lengths=lengths,
        pictures=pictures,
        trained=tokens,
        grids=torch.tensor([[1, 1, n] for n in pictures]),
    )


@given(LENGTHS, st.integers(1, 900))
@settings(max_examples=60, deadline=None)
def test_parts_together_are_the_batch(lengths: list[int], tokens: int) -> None:
    batch = _batch(lengths, [1 + n % 5 for n in lengths])
    parts = [batch.part(pack) for pack in split(lengths, tokens)]
    for name in ("input_ids", "labels", "pixel_values", "grids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.position_ids for part in parts], 1), batch.position_ids)
    for part in parts:
        assert sum(part.lengths) == len(part.input_ids) and sum(part.pictures) == len(part.pixel_values)


# ---- the tiny model ----
@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The tiny model with grouped attention as the trainer loads it, its processor and a folder of pictures."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from grounding.models.patch_embedding import use_matrix_product
    from grounding.models.tiny import build, demo_corpus

    folder = tmp_path_factory.mktemp("packs")
    build(folder / "model", demo_corpus())
    for number, size in enumerate(((96, 64), (64, 64), (128, 96))):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.png")
    use_matrix_product()
    attention.use()
    model = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation=attention.NAME
    )
    return model.train(), AutoProcessor.from_pretrained(folder / "model"), folder


def _examples(processor: Any, answers: list[str]) -> list[Any]:
    from grounding.train.sft.data import Example, split_target

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Locate the red square"}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return [Example(f"row {i}", f"{i % 3}.png", *split_target(rendered, answer)) for i, answer in enumerate(answers)]


ANSWERS = [
    '[{"bbox_2d": [1, 2, 3, 4]}]',
    "short",
    "the red square is left of the blue circle",
    "a",
    "green circle " * 9,
]


def test_loss_and_gradients_are_the_padded_path_s(
    setup: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of one optimizer step, summed over packs, equals the loss that transformers computes for the padded batch."""
    from transformers import AutoModelForImageTextToText

    from grounding.data.images import open_images
    from grounding.train.sft.data import Collator, PackingCollator
    from grounding.train.sft.trainer import model_inputs, use_pack_loss

    model, processor, folder = setup
    examples, token = _examples(processor, ANSWERS), model.config.image_token_id
    padded = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    expected = padded.train()(**Collator(open_images(folder), processor, token, 512)(examples)).loss
    expected.backward()
    batch = PackingCollator(open_images(folder), processor, token, 512)(examples)["batch"]
    packs = split(batch.lengths, sum(batch.lengths) // 2)
    assert len(packs) > 1
    monkeypatch.setattr(model, "forward", model.forward)  # the module's other tests need the original model
    monkeypatch.setattr(model.lm_head, "forward", model.lm_head.forward)
    use_pack_loss(model)
    model.zero_grad()
    total = 0.0
    for place in packs:
        pack = batch.part(place)
        loss = model(labels=pack.labels, items=float(batch.trained), **model_inputs(pack))["loss"]
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(padded.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = gradients[name].grad
        scale = max(float(wanted.abs().max()), 1e-3)
        assert torch.allclose(parameter.grad, wanted, rtol=0, atol=2e-4 * scale), name


def test_a_row_does_not_see_its_neighbours(setup: tuple[Any, Any, Path]) -> None:
    from dataclasses import replace

    from grounding.data.images import open_images
    from grounding.train.sft.data import PackingCollator
    from grounding.train.sft.trainer import model_inputs

    model, processor, folder = setup
    collator = PackingCollator(open_images(folder), processor, model.config.image_token_id, 512)
    batch = collator(_examples(processor, ANSWERS))["batch"]
    first, last = batch.lengths[0], sum(batch.lengths[:-1])
    other = batch.input_ids.clone()
    other[-10:] = other[-10:].flip(0)  # the last row has another text
    assert not torch.equal(other, batch.input_ids)
    pixels = batch.pixel_values.clone()
    pixels[batch.pictures[0] : batch.pictures[0] + batch.pictures[1]] *= -1  # and the second row has another picture
    with torch.no_grad():
        one = model.model(**model_inputs(batch), use_cache=False)[0][0]
        two = model.model(**model_inputs(replace(batch, input_ids=other, pixel_values=pixels)), use_cache=False)[0][0]
    assert torch.equal(one[:first], two[:first]) and not torch.equal(one[-10:], two[-10:])
    second = slice(first, first + batch.lengths[1])
    assert not torch.equal(one[second], two[second])
    assert torch.equal(one[second.stop : last], two[second.stop : last])


def test_positions_are_transformers_own(setup: tuple[Any, Any, Path]) -> None:
    from grounding.data.images import open_images
    from grounding.train.sft.data import Collator, PackingCollator

    model, processor, folder = setup
    examples = _examples(processor, ANSWERS)
    collators = (
        kind(open_images(folder), processor, model.config.image_token_id, 512) for kind in (Collator, PackingCollator)
    )
    padded, packed = (collator(examples) for collator in collators)
    expected, _ = model.model.get_rope_index(
        padded["input_ids"],
        mm_token_type_ids=padded["mm_token_type_ids"],
        image_grid_thw=padded["image_grid_thw"],
        attention_mask=padded["attention_mask"],
    )
    start = 0
    for row, length in enumerate(packed["batch"].lengths):
        assert torch.equal(packed["batch"].position_ids[1:, start : start + length], expected[:, row, :length])
        start += length
