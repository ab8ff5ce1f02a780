"""The formula for operations, compared with torch's count for the real model class and with its picture processor."""

import pytest

from grounding.evaluate.flops import shape_of

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def config():
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "vocab_size": 320,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 112,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=300,
        video_token_id=301,
        vision_start_token_id=302,
        vision_end_token_id=303,
        tie_word_embeddings=False,
    )


def test_the_formula_counts_what_torch_counts(config):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    processor = {"size": {"shortest_edge": 1024, "longest_edge": 224 * 224}}
    shape = shape_of(config.to_dict(), processor)
    width, height = 192, 128
    pictured = shape.tower.tokens(width, height)
    assert pictured == (width // 32) * (height // 32)
    tokens = 40
    ids = torch.full((1, tokens), 5)
    ids[0, 3], ids[0, 4 + pictured] = 302, 303
    ids[0, 4 : 4 + pictured] = 300
    pixels = torch.randn(pictured * 4, 3 * 2 * 16 * 16)
    grid = torch.tensor([[1, height // 16, width // 16]])
    kinds = (ids == 300).int()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        out = model(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=kinds,
            logits_to_keep=1,
            use_cache=True,
        )
    head = 2 * shape.width * shape.vocabulary
    # torch also computes the scores of later tokens and masks them
    masked = shape._attend(tokens * tokens) - shape._attend(tokens * (tokens + 1) / 2)
    assert counter.get_total_flops() == pytest.approx(
        shape.prompt(tokens) + masked + shape.picture(width, height) + head, rel=0.01
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)
    assert counter.get_total_flops() == pytest.approx(shape.generated(tokens, 1), rel=0.01)


def test_pictures_are_cut_as_the_models_own_processor_cuts_them(config):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    tower = shape_of(config.to_dict(), {"size": {"shortest_edge": 65536, "longest_edge": 1 << 20}}).tower
    for width, height in ((640, 480), (100, 80), (224, 224), (5000, 3000), (1000, 40), (333, 999)):
        h, w = smart_resize(height, width, 32, 65536, 1 << 20)
        assert tower.tokens(width, height) == h * w // 1024, (width, height)
