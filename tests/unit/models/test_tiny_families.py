"""A tiny random model of every kind: packed rows have the loss of single rows, positions are the model's, boxes are in the family's space."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.api.families import FAMILIES, Family, of_type
from grounding.boxes import resized
from grounding.data.images import open_images
from grounding.data.sft_rows import SftRow
from grounding.errors import UserError
from grounding.files import read_json
from grounding.models import attention, families
from grounding.models.folder import examine
from grounding.models.patch_embedding import use_matrix_product
from grounding.models.tiny import build, demo_corpus
from grounding.train.sft.data import PackingCollator, SftDataset
from grounding.train.sft.packing import Batch
from grounding.train.sft.trainer import model_inputs, use_pack_loss

KINDS = [(family, kind) for family in FAMILIES.values() for kind in family.tiny]
SIZES = ((96, 64), (64, 128), (224, 160))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.png")
    return folder


def _batch(family: Family, model: Path, pictures: Path) -> tuple[Batch, object]:
    from transformers import AutoConfig, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    rows = [
        SftRow(
            f"{number}.png",
            f"<image>\nLocate the red circle {'again ' * number}.",
            '[{"bbox_2d": [100, 200, 500, 1000], "label": "red circle"}]',
        )
        for number in range(len(SIZES))
    ]
    config = AutoConfig.from_pretrained(model)
    patch = family.patch if family.boxes == "resized" else None
    collator = PackingCollator(open_images(pictures), processor, config.image_token_id, 4096, patch=patch)
    made = collator([SftDataset(rows, processor)[i] for i in range(len(rows))])
    batch = made["batch"]
    assert isinstance(batch, Batch)
    return batch, processor


@pytest.mark.parametrize(("family", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_a_pack_costs_what_its_rows_cost_alone(family: Family, kind: str, tmp_path: Path, pictures: Path) -> None:
    from transformers import AutoModelForImageTextToText

    build(tmp_path / "m", demo_corpus(), kind=kind)
    assert of_type(read_json(tmp_path / "m/config.json")["model_type"]) is family
    assert examine(tmp_path / "m", family.name).problems == ()
    use_matrix_product()
    attention.use()
    net = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation=attention.choose()
    ).eval()
    batch, processor = _batch(family, tmp_path / "m", pictures)
    single = [batch.part(slice(i, i + 1)) for i in range(len(SIZES))]
    plain = []
    with torch.no_grad():
        for row in single:  # the loss by transformers, with the positions that it computes
            labels = torch.cat([torch.tensor([-100]), row.labels[:-1]])[None]
            inputs = {"input_ids": row.input_ids[None], "pixel_values": row.pixel_values, "labels": labels}
            if row.grids is not None:
                inputs |= {
                    "image_grid_thw": row.grids,
                    "mm_token_type_ids": (row.input_ids[None] == net.config.image_token_id).int(),
                }
            plain.append(float(net(**inputs).loss) * int((row.labels != -100).sum()))
        use_pack_loss(net)
        alone = [float(net(labels=r.labels, items=1.0, **model_inputs(r))["loss"]) for r in single]
        if family.packs:
            together = float(net(labels=batch.labels, items=1.0, **model_inputs(batch))["loss"])
            assert together == pytest.approx(sum(alone), rel=1e-5)
    assert alone == pytest.approx(plain, rel=1e-4)

    # the trained answer has its box in 0..1000, or in pixels of the picture as the processor resizes it
    text = processor.tokenizer.decode(batch.input_ids)  # type: ignore[attr-defined]
    found = [tuple(map(int, box.split(","))) for box in re.findall(r"\[([0-9, ]+)\]", text)]
    if family.boxes == "relative":
        assert found == [(100, 200, 500, 1000)] * len(SIZES)
    else:
        assert batch.grids is not None
        sides = [(family.patch * int(g[2]), family.patch * int(g[1])) for g in batch.grids]
        assert found == [(round(0.1 * w), round(0.2 * h), round(0.5 * w), h) for w, h in sides]


@pytest.mark.parametrize(("family", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_freezing_leaves_what_joins_tower_and_language_model(family: Family, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    build(tmp_path / "m", demo_corpus(), kind=kind)
    net = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    families.freeze_vision(net)
    trained = {name for name, weight in net.named_parameters() if weight.requires_grad}
    joins = "multi_modal_projector" if family.name == "internvl" else "visual.merger"
    assert any(joins in name for name in trained) and any("language_model" in name for name in trained)
    assert not any("blocks" in name or "vision_tower" in name for name in trained)


def test_targets_that_hold_no_box_are_kept() -> None:
    for text in ("no box", '"bbox_2d": [1, 2, 3]', '"bbox_2d": []', '"bbox_2d": [a, b, c, d]'):
        assert families.in_resized_pixels(text, 10, 10) == text
    assert (
        families.in_resized_pixels('[{"bbox_2d": [0, 500, 999.5, 1000]}]', 28, 56) == '[{"bbox_2d": [0, 28, 28, 56]}]'
    )


def test_an_unknown_kind_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)no tiny model of kind 'qwen9'.*qwen3-vl-moe.*internvl3.5"):
        build(tmp_path / "m", demo_corpus(), kind="qwen9")


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_resized_pictures_have_the_size_that_transformers_gives_them(width: int, height: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    if max(width, height) / min(width, height) <= 200:
        assert resized(width, height) == smart_resize(height, width, 28, 3136, 12_845_056)[::-1]
