"""Compute the names and shapes of a model's tensors from its `config.json`. Pure; needs neither torch nor the weights.

Names are those of the parameters of a model that transformers 5 has loaded. `canonical` converts the names in a file to these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture of experts. `shared` is the width of the expert that every token passes through; 0 if there is none."""

    number: int
    intermediate: int
    shared: int
    dense: frozenset[int]
    """Layers that have an ordinary feed-forward part instead of a mixture"""
    dense_intermediate: int


@dataclass(frozen=True)
class Linear:
    """Sizes of linear attention: its layers, heads and widths."""

    layers: frozenset[int]
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int


@dataclass(frozen=True)
class TextSizes:
    """Sizes of the language model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    tied: bool
    """Whether the output projection is the embedding matrix"""
    normed_heads: bool
    """Whether queries and keys each have a norm (Qwen3)"""
    biased: bool
    """Whether queries, keys and values have a bias (Qwen2)"""
    experts: Experts | None = None
    """The mixture of experts in the feed-forward layers, if there is one; `intermediate` is then the width that a token passes through"""
    linear: Linear | None = None
    """The layers with linear attention (Gated DeltaNet), if there are any; the other layers then have gated queries (Qwen3.5)"""


@dataclass(frozen=True)
class Architecture:
    """A model: the sizes of its language model, and all of its tensors."""

    model_type: str
    text: TextSizes
    vision_hidden: int
    vision_layers: int
    tensors: Mapping[str, Shape]

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    def trained(self, freeze_vision: bool) -> int:
        """Return the number of weights that training changes. If the vision tower is frozen, its merger or projector is still trained."""
        return sum(
            math.prod(shape) for name, shape in self.tensors.items() if not (freeze_vision and is_frozen_vision(name))
        )

    def adapter_weights(self, rank: int, layers: Collection[str], freeze_vision: bool) -> int:
        """Return the number of weights of LoRA adapters of this rank in the linear layers whose names end in one of `layers`."""
        return sum(
            rank * (shape[0] + shape[1])
            for name, shape in self.tensors.items()
            if len(shape) == 2
            and name.endswith(tuple(f".{layer}.weight" for layer in layers))
            and not (freeze_vision and name.startswith(_VISION))
        )


_VISION = ("model.visual.", "model.vision_tower.")
UNADAPTED_VISION = ".*[.](visual|vision_tower)[.].*"
"""The same as a pattern for PEFT and verl. It has no backslash, because Hydra would interpret it"""


def is_frozen_vision(name: str) -> bool:
    """Return whether `freezeVision` freezes a tensor. `families.freeze_vision` follows the same rule for a loaded model."""
    return name.startswith(_VISION) and not name.startswith("model.visual.merger.")


_ON_DISK = {
    "internvl": (
        (re.compile(r"^language_model\.lm_head\."), "lm_head."),
        (re.compile(r"^language_model\.model\."), "model.language_model."),
        (re.compile(r"^(?=vision_tower\.|multi_modal_projector\.|language_model\.)"), "model."),
    ),
    "qwen2_5_vl": (
        (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
        (re.compile(r"^(?=visual\.|language_model\.)"), "model."),
    ),
    **{
        kind: ((re.compile(r"^(?=visual\.|language_model\.)"), "model."),)
        for kind in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
    },
}


def is_expert(name: str) -> bool:
    """Return whether a tensor contains experts. Files have experts one by one, or stacked in one of two orders; transformers converts all
    forms.
    """
    return ".mlp.experts." in name


def canonical(model_type: str, name: str) -> str:
    """Return a tensor's name in the loaded model, given its name in a file, because older files have other prefixes."""
    for pattern, new in _ON_DISK.get(model_type, ()):
        renamed = pattern.sub(new, name)
        if renamed != name:
            return renamed
    return name


class ConfigProblem(ValueError):
    """A `config.json` is wrong. The message says what is wrong, and under which key."""


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigProblem(f"{key} must be a whole number above 0, found {value!r}")
    return value


def _pair(config: Mapping[str, Any], key: str, default: int) -> Shape:
    value = config.get(key, default)
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sizes) != 2 or not all(isinstance(each, int) and each > 0 for each in sizes):
        raise ConfigProblem(f"{key} must be one or two whole numbers above 0, found {value!r}")
    return sizes


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise ConfigProblem(f"{key} is missing")
    return value


def read(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture that a `config.json` describes; None if this module does not know the model type.

    Raises `ConfigProblem` if a size is missing or is not a number. Optional values that are absent have the defaults of transformers 5.9.
    """
    kind = config.get("model_type")
    if kind in ("qwen3_vl", "qwen3_vl_moe"):
        return _qwen3_vl(config, kind)
    if kind in ("qwen3_5", "qwen3_5_moe"):
        return _qwen3_5(config, kind)
    if kind == "qwen2_5_vl":
        return _qwen2_5_vl(config)
    return _internvl(config) if kind == "internvl" else None


def _tied(config: Mapping[str, Any], text: Mapping[str, Any], default: bool) -> bool:
    found = [part["tie_word_embeddings"] for part in (config, text) if "tie_word_embeddings" in part]
    return bool(found[0]) if found else default


def _indices(config: Mapping[str, Any], key: str, default: list[int]) -> frozenset[int]:
    value = config.get(key)
    found = default if value is None else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, int) for each in found):
        raise ConfigProblem(f"{key} must be a list of layers, found {value!r}")
    return frozenset(found)


def _experts(text: Mapping[str, Any], number: int, intermediate: int, shared: int, layers: int) -> Experts:
    named, step = _indices(text, "mlp_only_layers", []), _number(text, "decoder_sparse_step", 1)
    dense = frozenset(n for n in range(layers) if n in named or (n + 1) % step)
    return Experts(
        number=_number(text, "num_local_experts", _number(text, "num_experts", number)),
        intermediate=_number(text, "moe_intermediate_size", intermediate),
        shared=_number(text, "shared_expert_intermediate_size", shared) if shared else 0,
        dense=dense,
        dense_intermediate=_number(text, "intermediate_size", 5632) if dense else 0,
    )


def _qwen3_vl(config: Mapping[str, Any], kind: str) -> Architecture:
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    mixture = kind == "qwen3_vl_moe"
    heads, hidden = (16, 2048) if mixture else (32, 4096)
    heads, hidden = _number(text, "num_attention_heads", heads), _number(text, "hidden_size", hidden)
    layers = _number(text, "num_hidden_layers", 24 if mixture else 32)
    experts = _experts(text, 60, 1408, 0, layers) if mixture else None
    active = experts.intermediate * _number(text, "num_experts_per_tok", 4) if experts is not None else 0
    given = text.get("head_dim")
    sizes = TextSizes(
        vocabulary=_number(text, "vocab_size", 151936),
        hidden=hidden,
        intermediate=active if experts is not None else _number(text, "intermediate_size", 22016),
        layers=layers,
        heads=heads,
        key_value_heads=_number(text, "num_key_value_heads", 16 if mixture else heads),
        head_size=hidden // heads if mixture and given is None else _number(text, "head_dim", 128),
        tied=_tied(config, text, False),
        normed_heads=True,
        biased=bool(text.get("attention_bias", False)),
        experts=experts,
    )
    tensors = dict(_text(sizes, output_bias=sizes.biased)) | dict(_qwen3_vision(vision))
    width, depth = _number(vision, "hidden_size", 1152), _number(vision, "depth", 27)
    return Architecture(kind, sizes, width, depth, tensors)


def _qwen3_5(config: Mapping[str, Any], kind: str) -> Architecture:
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    mixture = kind == "qwen3_5_moe"
    layers = _number(text, "num_hidden_layers", 40 if mixture else 32)
    experts = _experts(text, 256, 512, 512, layers) if mixture else None
    active = experts.intermediate * _number(text, "num_experts_per_tok", 8) + experts.shared if experts else 0
    every = _number(text, "full_attention_interval", 4)
    kinds = text.get("layer_types")
    if kinds is not None and (not isinstance(kinds, (list, tuple)) or len(kinds) != layers):
        raise ConfigProblem(f"layer_types must name each of {layers} layers, found {kinds!r}")
    linear = frozenset(
        n for n in range(layers) if ((n + 1) % every if kinds is None else kinds[n] == "linear_attention")
    )
    sizes = TextSizes(
        vocabulary=_number(text, "vocab_size", 248320),
        hidden=_number(text, "hidden_size", 2048 if mixture else 4096),
        intermediate=active if experts is not None else _number(text, "intermediate_size", 12288),
        layers=layers,
        heads=_number(text, "num_attention_heads", 16),
        key_value_heads=_number(text, "num_key_value_heads", 2 if mixture else 4),
        head_size=_number(text, "head_dim", 256),
        tied=_tied(config, text, False),
        normed_heads=True,
        biased=bool(text.get("attention_bias", False)),
        experts=experts,
        linear=Linear(
            layers=linear,
            key_heads=_number(text, "linear_num_key_heads", 16),
            value_heads=_number(text, "linear_num_value_heads", 32),
            key_size=_number(text, "linear_key_head_dim", 128),
            value_size=_number(text, "linear_value_head_dim", 128),
            kernel=_number(text, "linear_conv_kernel_dim", 4),
        ),
    )
    tower = {**vision, "deepstack_visual_indexes": []}
    tensors = dict(_text(sizes, output_bias=sizes.biased)) | dict(_qwen3_vision(tower))
    return Architecture(kind, sizes, _number(vision, "hidden_size", 1152), _number(vision, "depth", 27), tensors)


def _qwen2_5_vl(config: Mapping[str, Any]) -> Architecture:
    # on the hub, some files have the language model's sizes at the top level, next to `vision_config`
    text, vision = config.get("text_config", config), _part(config, "vision_config")
    if not isinstance(text, Mapping):
        raise ConfigProblem("text_config is missing")
    heads, hidden = _number(text, "num_attention_heads", 64), _number(text, "hidden_size", 8192)
    sizes = TextSizes(
        vocabulary=_number(text, "vocab_size", 152064),
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", 29568),
        layers=_number(text, "num_hidden_layers", 80),
        heads=heads,
        key_value_heads=_number(text, "num_key_value_heads", 8),
        head_size=hidden // heads,
        tied=_tied(config, text, False),
        normed_heads=False,
        biased=True,
    )
    tensors = dict(_text(sizes, output_bias=False)) | dict(_qwen2_5_vision(vision))
    width, depth = _number(vision, "hidden_size", 3584), _number(vision, "depth", 32)
    return Architecture("qwen2_5_vl", sizes, width, depth, tensors)


def _internvl(config: Mapping[str, Any]) -> Architecture | None:
    text, vision = _part(config, "text_config"), _part(config, "vision_config")
    if text.get("model_type", "qwen2") not in ("qwen2", "qwen3"):
        return None
    qwen3 = text.get("model_type") == "qwen3"
    heads, hidden = _number(text, "num_attention_heads", 32), _number(text, "hidden_size", 4096)
    sizes = TextSizes(
        vocabulary=_number(text, "vocab_size", 151936),
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", 22016),
        layers=_number(text, "num_hidden_layers", 32),
        heads=heads,
        key_value_heads=_number(text, "num_key_value_heads", heads if qwen3 else 32),
        head_size=_number(text, "head_dim", 128 if qwen3 else hidden // heads),
        tied=_tied(config, text, True),
        normed_heads=qwen3,
        biased=bool(text.get("attention_bias", False)) if qwen3 else True,
    )
    tensors = dict(_text(sizes, output_bias=qwen3 and sizes.biased)) | dict(_intern_vision(vision))
    width = _number(vision, "hidden_size", 1024)
    ratio = config.get("downsample_ratio", 0.5)
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ConfigProblem(f"downsample_ratio must be above 0 and at most 1, found {ratio!r}")
    wide, place = width * int(1 / ratio) ** 2, "model.multi_modal_projector."
    tensors |= dict(_norm(place + "layer_norm", wide))
    tensors |= dict(_linear(place + "linear_1", wide, sizes.hidden)) | dict(
        _linear(place + "linear_2", sizes.hidden, sizes.hidden)
    )
    return Architecture("internvl", sizes, width, _number(vision, "num_hidden_layers", 24), tensors)


Named = Iterator[tuple[str, Shape]]


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, size: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def _text(s: TextSizes, output_bias: bool) -> Named:
    place = "model.language_model"
    yield f"{place}.embed_tokens.weight", (s.vocabulary, s.hidden)
    for number in range(s.layers):
        layer = f"{place}.layers.{number}"
        yield from _norm(f"{layer}.input_layernorm", s.hidden, bias=False)
        yield from _norm(f"{layer}.post_attention_layernorm", s.hidden, bias=False)
        if s.linear is not None and number in s.linear.layers:
            yield from _delta(f"{layer}.linear_attn", s.hidden, s.linear)
            yield from _feed_forward(f"{layer}.mlp", s, number)
            continue
        queries = s.heads * s.head_size * (1 if s.linear is None else 2)  # Qwen3.5 has a gate for each query
        yield from _linear(f"{layer}.self_attn.q_proj", s.hidden, queries, s.biased)
        for each in ("k_proj", "v_proj"):
            yield from _linear(f"{layer}.self_attn.{each}", s.hidden, s.key_value_heads * s.head_size, s.biased)
        yield from _linear(f"{layer}.self_attn.o_proj", s.heads * s.head_size, s.hidden, output_bias)
        if s.normed_heads:
            yield from _norm(f"{layer}.self_attn.q_norm", s.head_size, bias=False)
            yield from _norm(f"{layer}.self_attn.k_norm", s.head_size, bias=False)
        yield from _feed_forward(f"{layer}.mlp", s, number)
    yield from _norm(f"{place}.norm", s.hidden, bias=False)
    if not s.tied:
        yield "lm_head.weight", (s.vocabulary, s.hidden)


def _gated(place: str, hidden: int, intermediate: int) -> Named:
    yield from _linear(f"{place}.gate_proj", hidden, intermediate, bias=False)
    yield from _linear(f"{place}.up_proj", hidden, intermediate, bias=False)
    yield from _linear(f"{place}.down_proj", intermediate, hidden, bias=False)


def _feed_forward(place: str, s: TextSizes, layer: int) -> Named:
    experts = s.experts
    if experts is None:
        yield from _gated(place, s.hidden, s.intermediate)
    elif layer in experts.dense:
        yield from _gated(place, s.hidden, experts.dense_intermediate)
    else:
        yield f"{place}.experts.gate_up_proj", (experts.number, 2 * experts.intermediate, s.hidden)
        yield f"{place}.experts.down_proj", (experts.number, s.hidden, experts.intermediate)
        yield f"{place}.gate.weight", (experts.number, s.hidden)
        if experts.shared:
            yield from _gated(f"{place}.shared_expert", s.hidden, experts.shared)
            yield f"{place}.shared_expert_gate.weight", (1, s.hidden)


def _delta(place: str, hidden: int, linear: Linear) -> Named:
    keys, values = linear.key_heads * linear.key_size, linear.value_heads * linear.value_size
    yield f"{place}.dt_bias", (linear.value_heads,)
    yield f"{place}.A_log", (linear.value_heads,)
    yield f"{place}.conv1d.weight", (2 * keys + values, 1, linear.kernel)
    yield f"{place}.norm.weight", (linear.value_size,)
    yield from _linear(f"{place}.out_proj", values, hidden, bias=False)
    yield from _linear(f"{place}.in_proj_qkv", hidden, 2 * keys + values, bias=False)
    yield from _linear(f"{place}.in_proj_z", hidden, values, bias=False)
    for each in ("in_proj_b", "in_proj_a"):
        yield from _linear(f"{place}.{each}", hidden, linear.value_heads, bias=False)


def _qwen2_5_vision(vision: Mapping[str, Any]) -> Named:
    place = "model.visual"
    width, inner = _number(vision, "hidden_size", 3584), _number(vision, "intermediate_size", 3420)
    patch, frames = _number(vision, "patch_size", 14), _number(vision, "temporal_patch_size", 2)
    wide, out = width * _number(vision, "spatial_merge_size", 2) ** 2, _number(vision, "out_hidden_size", 3584)
    channels = _number(vision, "in_channels", _number(vision, "in_chans", 3))
    yield f"{place}.patch_embed.proj.weight", (width, channels, frames, patch, patch)
    for number in range(_number(vision, "depth", 32)):
        block = f"{place}.blocks.{number}"
        yield from _norm(f"{block}.norm1", width, bias=False)
        yield from _norm(f"{block}.norm2", width, bias=False)
        yield from _linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.gate_proj", width, inner)
        yield from _linear(f"{block}.mlp.up_proj", width, inner)
        yield from _linear(f"{block}.mlp.down_proj", inner, width)
    yield from _norm(f"{place}.merger.ln_q", width, bias=False)
    yield from _linear(f"{place}.merger.mlp.0", wide, wide)
    yield from _linear(f"{place}.merger.mlp.2", wide, out)


def _qwen3_vision(vision: Mapping[str, Any]) -> Named:
    place = "model.visual"
    width, inner = _number(vision, "hidden_size", 1152), _number(vision, "intermediate_size", 4304)
    patch, frames = _number(vision, "patch_size", 16), _number(vision, "temporal_patch_size", 2)
    wide, out = width * _number(vision, "spatial_merge_size", 2) ** 2, _number(vision, "out_hidden_size", 3584)
    deep = vision.get("deepstack_visual_indexes", [8, 16, 24])
    if not isinstance(deep, (list, tuple)):
        raise ConfigProblem(f"deepstack_visual_indexes must be a list, found {deep!r}")
    yield f"{place}.patch_embed.proj.weight", (width, _number(vision, "in_channels", 3), frames, patch, patch)
    yield f"{place}.patch_embed.proj.bias", (width,)
    yield f"{place}.pos_embed.weight", (_number(vision, "num_position_embeddings", 2304), width)
    for number in range(_number(vision, "depth", 27)):
        block = f"{place}.blocks.{number}"
        yield from _norm(f"{block}.norm1", width)
        yield from _norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.attn.qkv", width, 3 * width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.linear_fc1", width, inner)
        yield from _linear(f"{block}.mlp.linear_fc2", inner, width)
    mergers = [("merger", width), *((f"deepstack_merger_list.{number}", wide) for number in range(len(deep)))]
    for name, normed in mergers:
        yield from _norm(f"{place}.{name}.norm", normed)
        yield from _linear(f"{place}.{name}.linear_fc1", wide, wide)
        yield from _linear(f"{place}.{name}.linear_fc2", wide, out)


def _intern_vision(vision: Mapping[str, Any]) -> Named:
    place = "model.vision_tower"
    width, inner = _number(vision, "hidden_size", 1024), _number(vision, "intermediate_size", 4096)
    (height, breadth), (tall, broad) = _pair(vision, "image_size", 448), _pair(vision, "patch_size", 14)
    yield f"{place}.embeddings.cls_token", (1, 1, width)
    if vision.get("use_mask_token", False):
        yield f"{place}.embeddings.mask_token", (1, 1, width)
    if vision.get("use_absolute_position_embeddings", True):
        yield f"{place}.embeddings.position_embeddings", (1, (height // tall) * (breadth // broad) + 1, width)
    channels = _number(vision, "num_channels", 3)
    yield f"{place}.embeddings.patch_embeddings.projection.weight", (width, channels, tall, broad)
    yield f"{place}.embeddings.patch_embeddings.projection.bias", (width,)
    biased, normed = bool(vision.get("attention_bias", False)), bool(vision.get("use_qk_norm", False))
    layer_norm = vision.get("norm_type", "layer_norm") == "layer_norm"
    for number in range(_number(vision, "num_hidden_layers", 24)):
        layer = f"{place}.encoder.layer.{number}"
        yield f"{layer}.lambda_1", (width,)
        yield f"{layer}.lambda_2", (width,)
        yield from _norm(f"{layer}.layernorm_before", width, layer_norm)
        yield from _norm(f"{layer}.layernorm_after", width, layer_norm)
        for each in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{layer}.attention.{each}", width, width, biased)
        yield from _linear(f"{layer}.attention.projection_layer", width, width)
        if normed:
            yield from _norm(f"{layer}.attention.q_norm", width, bias=False)
            yield from _norm(f"{layer}.attention.k_norm", width, bias=False)
        yield from _linear(f"{layer}.mlp.fc1", width, inner)
        yield from _linear(f"{layer}.mlp.fc2", inner, width)
    if not vision.get("use_mean_pooling", True):
        yield from _norm(f"{place}.layernorm", width)
