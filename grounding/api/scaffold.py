"""Write the text of a new, commented job file from a few choices, for `egm init`. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from grounding.api.manifest import parse
from grounding.api.models import GROUP_VERSION

PUBLISHED = "hf://datasets/JamesZGQ/EGM_Datasets"
"""The data set published by the authors of EGM"""
SHAPES = "shapes"
"""The value of `data` that selects the synthetic set"""

What = Literal["pipeline", "sft", "rl", "eval"]
Size = Literal["tiny", "4b", "8b"]
Engine = Literal["sglang", "vllm", "transformers"]
_MODELS = {"4b": "hf://JamesZGQ/EGM-4B", "8b": "hf://JamesZGQ/EGM-8B", "tiny": "tiny://"}
_ROWS = "vanilla_grounding_reasoning_training_dataset_cot_subset.jsonl"


@dataclass(frozen=True)
class Choices:
    """The user's choices. `gpus` is the number of GPUs of each machine. `data` is `shapes`, or a path or URI with the layout of the
    published data. An empty `output` means that there is none.
    """

    what: What = "pipeline"
    name: str = "egm"
    size: Size = "8b"
    data: str = PUBLISHED
    model: str = ""
    """The model to start from or to evaluate; empty: the preset's model, or the published model of that size"""
    gpus: int = 8
    engine: Engine = "sglang"
    output: str = ""

    @property
    def synthetic(self) -> bool:
        """Return whether the job uses the synthetic set."""
        return self.data == SHAPES


def quoted(text: str) -> str:
    """Return a YAML scalar for any text."""
    plain = text and all(c.isalnum() or c in "-_./:" for c in text) and text[0].isalpha() and not text.endswith(":")
    words = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
    if plain and text.isascii() and text.lower() not in words:
        return text
    double = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in double)


def _place(choices: Choices, path: str) -> str:
    return quoted(f"{choices.data.rstrip('/')}/{path}")


def _images(choices: Choices, *names: str) -> list[str]:
    return [
        "    # folders, tars or split tars; the first one that has a picture is used",
        f"    images: [{', '.join(_place(choices, n) for n in names)}]",
    ]


def _output(choices: Choices, name: str) -> list[str]:
    if choices.output:
        place = choices.output.rstrip("/") + f"/{name}"
        return [f"  output: {quoted(place)}    # a copy of the job's folder, updated during the job"]
    return [f"  # output: s3://BUCKET/{name}    # a copy of the job's folder; without it, results are only in runs/"]


def _shapes() -> list[str]:
    return ["  data:", "    shapes: {seed: 7}    # coloured shapes, drawn on this machine; nothing is downloaded"]


def _head(kind: str, name: str) -> list[str]:
    return [f"apiVersion: {GROUP_VERSION}", f"kind: {kind}", f"metadata: {{name: {quoted(name)}}}", "spec:"]


def _preset(choices: Choices, method: str) -> list[str]:
    preset = f"{'tiny' if choices.size == 'tiny' else f'egm-{choices.size}'}-{method}"
    note = "# supplies values that are not written below: `egm explain gtj.spec.preset`"
    return [f"  method: {method}", f"  preset: {preset}    {note}"]


def _resources(choices: Choices) -> list[str]:
    if choices.size == "tiny":
        return []
    return [f"  resources: {{nodes: 1, gpusPerNode: {choices.gpus}}}"]


def _hyperparameters() -> list[str]:
    return [
        "  # hyperparameters:    # `egm explain gtj.spec.hyperparameters` lists them with their defaults",
        "  #   learningRate: 1.0e-5",
    ]


def _start(model: str) -> list[str]:
    """Return the YAML line with the model to start from; no line if it is the preset's model."""
    return [f"  model: {{source: {quoted(model)}}}    # the model to start from"] if model else []


def _sft(choices: Choices, name: str, model: str) -> list[str]:
    data = (
        _shapes()
        if choices.synthetic
        else [
            "  data:",
            "    # rows with pictures, questions and reasoned answers; `egm data reasoning` makes more",
            f"    train: [{_place(choices, _ROWS)}]",
            *_images(choices, "coco.tar", "coco_flip.tar"),
        ]
    )
    start = _start(model)
    return [
        "# Supervised fine-tuning: the model learns to reason and to answer with a box.",
        *_head("GroundingTrainJob", name),
        *_preset(choices, "sft"),
        *start,
        *data,
        *_resources(choices),
        *_hyperparameters(),
        *_output(choices, name),
    ]


def _rl(choices: Choices, name: str, model: str, after: str = "") -> list[str]:
    data = (
        _shapes()
        if choices.synthetic
        else [
            "  data:",
            "    # prepared rows, with val.parquet next to them; or give files in `train` and `validation`",
            f"    prepared: {_place(choices, 'processed_rl_data/train_grounding.parquet')}",
            *_images(choices, "coco.tar", "coco_flip.tar"),
        ]
    )
    start = _start(model)
    if after:
        start = [f"  model: {{trainJob: {quoted(after)}}}    # waits for that job and uses the model that it exports"]
    return [
        "# Reinforcement learning: answers are generated, and their boxes are rewarded.",
        *_head("GroundingTrainJob", name),
        *_preset(choices, "rl"),
        *start,
        *data,
        "  reward: {type: mix, alpha: 0.5, threshold: 0.5}    # alpha * pass + (1 - alpha) * IoU",
        *_resources(choices),
        *_hyperparameters(),
        *_output(choices, name),
    ]


def _eval(choices: Choices, name: str, model: str, after: str = "") -> list[str]:
    data = (
        _shapes()
        if choices.synthetic
        else [
            "  data:",
            "    # has the eight files of RefCOCO, RefCOCO+ and RefCOCOg; list other files in `files`",
            f"    root: {_place(choices, 'metadata/eval')}",
            *_images(choices, "coco.tar"),
        ]
    )
    source = f"{{trainJob: {quoted(after)}}}" if after else f"{{source: {quoted(model or _MODELS[choices.size])}}}"
    gpus = (
        []
        if choices.engine == "transformers"
        else [f"  gpusPerServer: {choices.gpus}    # one copy of the model on each GPU"]
    )
    tokens = 48 if choices.size == "tiny" else 4096
    return [
        "# Evaluation of the model: accuracy at IoU 0.5 on eight files.",
        *_head("GroundingEvalJob", name),
        f"  model: {source}    # the model to evaluate",
        f"  engine: {choices.engine}    # sglang or vllm on GPUs, transformers on the CPU",
        *gpus,
        *data,
        f"  sampling: {{maxTokens: {tokens}}}    # greedy; `egm explain gej.spec.sampling`",
        f"  concurrency: {8 if choices.engine == 'transformers' else 64}    # requests in flight over all servers",
        *_output(choices, name),
    ]


def text(choices: Choices) -> str:
    """Return the text of the job file. Raises `ManifestError` (a `UserError`) if the choices are inconsistent, as `egm validate` would."""
    name, model = choices.name, choices.model
    one: dict[str, Callable[[], list[str]]] = {
        "sft": lambda: _sft(choices, name, model),
        "rl": lambda: _rl(choices, name, model),
        "eval": lambda: _eval(choices, name, model),
    }
    if choices.what == "pipeline":
        jobs = [
            _sft(choices, f"{name}-sft", model),
            _rl(choices, f"{name}-rl", "", after=f"{name}-sft"),
            _eval(choices, f"{name}-eval", "", after=f"{name}-rl"),
        ]
    else:
        jobs = [one[choices.what]()]
    head = "# Written by `egm init`. `egm validate -f FILE` checks it, `egm explain gtj.spec` and `gej.spec` document it.\n"
    whole = head + "---\n".join("\n".join(lines) + "\n" for lines in jobs)
    parse(whole, "the new job file")
    return whole
