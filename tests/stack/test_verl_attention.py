"""Attention without padding in the installed verl."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# the test runs in a child process, because verl replaces classes of transformers for the whole process
PACKED = """
import sys
import torch
from grounding.train.verl import patches
patches.apply()
from grounding.models import PACKED_ROWS, attention
from transformers import AutoConfig, AutoModelForImageTextToText
from verl.models.transformers.monkey_patch import apply_monkey_patch

def model_of(name):
    config = AutoConfig.from_pretrained(sys.argv[1], attn_implementation=name)  # as verl's HFModelConfig does
    found = AutoModelForImageTextToText.from_pretrained(sys.argv[1], config=config, dtype=torch.float32).eval()
    apply_monkey_patch(found, ulysses_sp_size=1, use_remove_padding=True)
    return found

used = []
attend = attention.attend
attention.attend = lambda query, *more, **named: used.append(query.shape[0]) or attend(query, *more, **named)
packed = model_of(PACKED_ROWS)
torch.manual_seed(0)
lengths = [7, 30, 2, 19]
ids = torch.randint(20, 200, (1, sum(lengths)))
positions = torch.cat([torch.arange(n) for n in lengths])[None, None].expand(4, 1, -1)  # verl's (4, 1, total)
with torch.no_grad():
    found = packed(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    layers = packed.config.get_text_config().num_hidden_layers
    assert used.count(sum(lengths)) == layers, used
    alone, start = model_of("sdpa"), 0
    for n in lengths:
        row = slice(start, start + n)
        expected = alone(input_ids=ids[:, row], position_ids=positions[..., row], use_cache=False).logits[0]
        assert torch.allclose(found[row], expected, atol=2e-5), float((found[row] - expected).abs().max())
        start += n
print("equal")
"""


def test_packed_rows_under_verl_are_each_row_alone(tiny_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PACKED, str(tiny_model)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]
