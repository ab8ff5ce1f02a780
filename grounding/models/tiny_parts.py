"""Parts that the tiny models of all families use: size, chat template and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grounding.api.families import TINY_SMALL

# The ChatML turns that Qwen models use. An image is a placeholder that the processor repeats for its number of tokens. Texts are
# expressions, because `{%-` would remove the line ends before it. Questions are trimmed, because RL rows begin with a line end that SFT rows
# and the evaluation lack, and to a model this small, different wording is a different question. Answers keep their line ends: engines that
# render an answer as a list of parts would otherwise continue another text than those that append it to the prompt.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type in ['image', 'image_url'] or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}"
    "{%- if message.role == 'assistant' -%}{{- part.text -}}{%- else -%}{{- part.text | trim -}}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class TinySize:
    """Sizes of the tiny model. `image` is the picture's side in pixels, `init` the standard deviation of the weights. If `tied` is set, one
    matrix embeds and predicts tokens, as in the 4B models.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    vision_hidden: int = 64
    vision_depth: int = 1
    vision_heads: int = 4
    image: int = 224
    init: float = 0.08
    tied: bool = False


def size_of(source: str) -> TinySize:
    """Return the size of the tiny model for a job's `tiny://` source."""
    return TinySize(hidden=64) if source == TINY_SMALL else TinySize()


def make_tokenizer(corpus: list[str], special: list[str]) -> Any:
    """Return a byte-level BPE tokenizer of about 440 tokens that writes digits one by one. The tokens `special` come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # noqa: S106
