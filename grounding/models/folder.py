"""Check model folders before training or serving: configuration, weights, tokenizer, chat template and processor.

Only the headers of the weights are read, so this takes milliseconds and needs neither torch nor a GPU. Without this check, transformers
fills missing tensors with random values and continues, and an engine reports a truncated file only after minutes, with a traceback.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grounding.errors import Failure, UserError
from grounding.jsontypes import JsonObject
from grounding.models import architecture, families, safetensors_header
from grounding.models.safetensors_header import BrokenFile, Tensor
from grounding.storage import locate

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_OLD_INDEX, _OLD_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_FLOATS = ("F32", "F16", "BF16", "F64")
_SHOWN = 3
"""Maximum number of problems and tensors that a message names; the others are counted"""


@dataclass(frozen=True)
class Problem:
    """A problem of a model folder: the file, a sentence, and what to do."""

    file: Path
    what: str
    remedy: str


@dataclass(frozen=True)
class ModelFolder:
    """A model folder as described by its files. `tensors` is empty if the weights are in a format without headers."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    problems: tuple[Problem, ...]


def examine(folder: Path, family: str | None = None, *, weights_only: bool = False) -> ModelFolder:
    """Return the content of a model folder and all of its problems. `family` is the required family; None: any.

    With `weights_only`, only the configuration and the weights are checked, not tokenizer, chat template and processor.
    """
    found = list(_no_model(folder))
    if found:
        return ModelFolder({}, {}, tuple(found))
    config, problem = _object(folder / "config.json")
    if problem is not None:
        return ModelFolder({}, {}, (problem,))
    try:
        if family is not None:
            families.check(family, folder)
    except UserError as error:
        return ModelFolder(config, {}, (Problem(folder / "config.json", error.message, error.hint),))
    tensors, found = _weights(folder)
    if not found and tensors:
        found = list(_against_config(folder, config, tensors))
    if not weights_only:
        found += [*_tokenizer(folder, config), *_template(folder)]
        # a model with its own code may not need a processor
        found += [] if "auto_map" in config else _processor(folder, config)
        found += _generation(folder)
    return ModelFolder(config, tensors, tuple(found))


def require(folder: Path, family: str | None = None, *, field: str = "spec.model.source") -> ModelFolder:
    """Return the content of a model folder. Raises `UserError` with the file and the remedy if the model cannot be trained or served."""
    model = examine(folder, family)
    if model.problems:
        first = model.problems[0]
        raise UserError(sentence(model.problems), file=first.file, field=field, hint=first.remedy)
    return model


def require_trainable(source: str, family: str, *, field: str = "spec.model.source") -> None:
    """Raise `UserError` with the file and the remedy if the model in the folder `source` cannot be trained further."""
    folder = of_source(source)
    if folder is None:
        return
    model = require(folder, family, field=field)
    for problem in untrainable(folder, model):
        raise UserError(problem.what, file=problem.file, field=field, hint=problem.remedy)


def untrainable(folder: Path, model: ModelFolder) -> Iterator[Problem]:
    """Yield the reasons why a model that can be served cannot be trained further."""
    kind = model.config.get("quantization_config")
    if kind is not None:
        method = kind.get("quant_method", "unknown") if isinstance(kind, Mapping) else "unknown"
        what = f"the weights are quantised ({method}), but training needs the original weights"
        yield Problem(folder / "config.json", what, "Start from the model before quantisation.")


def require_exported(folder: Path) -> None:
    """Raise `Failure` if the weights that an export has written do not match its configuration."""
    problems = examine(folder, weights_only=True).problems
    if problems:
        raise Failure(
            f"the exported weights do not match their configuration: {sentence(problems)}", file=problems[0].file
        )


def sentence(problems: tuple[Problem, ...]) -> str:
    """Return a sentence with the first problem and the files of the others."""
    first, rest = problems[0], problems[1:]
    more = "".join(f"\n  also {p.file.name}: {p.what}. {p.remedy}" for p in rest[:_SHOWN])
    left = len(rest) - _SHOWN
    return first.what + more + (f"\n  and {left} more" if left > 0 else "")


def of_source(source: str | None) -> Path | None:
    """Return the folder on this machine that `model.source` refers to; None for a store, the hub, an unmounted claim or no source."""
    if not source or source.startswith("tiny://"):
        return None
    place = locate(source, "spec.model.source")
    if place.scheme != "file" or (source.startswith("pvc://") and not place.folder.exists()):
        return None
    return place.folder


# ---- folders without a model ----
def _no_model(folder: Path) -> Iterator[Problem]:
    if not folder.is_dir():
        yield Problem(folder, "no such folder", "Give the folder of a model, or hf://owner/name.")
        return
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        yield _adapter(folder, adapter)
        return
    if (folder / "config.json").is_file():
        return
    if folder.name.startswith(("global_step_", "checkpoint-")) or (folder / "actor").is_dir():
        remedy = f"Export it first: egm checkpoint export {folder} DIR."
        yield Problem(folder, "is a checkpoint of a training, not a model", remedy)
        return
    below = sorted(p.parent for p in folder.glob("*/config.json"))[:1]
    below += sorted(p.parent for p in folder.glob("snapshots/*/config.json"))[:1]
    hint = (
        f"Did you mean {below[0]}?"
        if below
        else "A model's folder contains config.json, its weights and its tokenizer."
    )
    yield Problem(folder, "the folder has no model: config.json is absent", hint)


def _adapter(folder: Path, file: Path) -> Problem:
    config, problem = _object(file)
    base = config.get("base_model_name_or_path") or "its base model"
    if problem is not None:
        return problem
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        what = f"is in the same folder as full weights: transformers would load {base} with this adapter instead of the weights"
        return Problem(file, what, "Remove adapter_config.json if the weights are merged already.")
    remedy = f"Merge it first, into the folder DIR: egm checkpoint export {folder} DIR --model BASE."
    return Problem(file, f"is a LoRA adapter of {base}, not a complete model", remedy)


def _object(path: Path) -> tuple[JsonObject, Problem | None]:
    """Return (the JSON object in a file, None) or (an empty object, the problem)."""
    again = "Copy or download the file again."
    try:
        text = path.read_bytes()
        if text.startswith(safetensors_header.POINTER):
            return {}, Problem(
                path, "is a pointer of Git LFS, not the file itself", "Download the files with `git lfs pull`."
            )
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return {}, Problem(path, f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})", again)
    except OSError as error:
        return {}, Problem(path, f"cannot be read: {error.strerror}", "Check its permissions.")
    if not isinstance(value, dict):
        return {}, Problem(path, f"expected a JSON object, found {type(value).__name__}", again)
    return value, None


# ---- weights ----
def _weights(folder: Path) -> tuple[dict[str, Tensor], list[Problem]]:
    """Return the tensors of the files that transformers would load, and the problems of these files."""
    if (folder / _SINGLE).is_file():
        tensors, found = _file(folder / _SINGLE)
        return tensors, found or list(_stale_index(folder))
    if (folder / _INDEX).is_file():
        return _indexed(folder / _INDEX)
    if (folder / _OLD_SINGLE).is_file():
        return {}, list(_pickled(folder / _OLD_SINGLE))
    if (folder / _OLD_INDEX).is_file():
        weight_map, problem = _weight_map(folder / _OLD_INDEX)
        missing, present = _shards(folder / _OLD_INDEX, weight_map)
        return {}, [*([problem] if problem else missing), *(p for file in present for p in _pickled(file))]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        what = f"is absent, although {len(shards)} of its weight files exist"
        return {}, [Problem(folder / _INDEX, what, "Copy or download this file too.")]
    return {}, [Problem(folder, f"has no weights: neither {_SINGLE} nor {_INDEX}", "Copy or download the weights.")]


def _stale_index(folder: Path) -> Iterator[Problem]:
    """Yield a problem if the index lists other files than the single one in the folder, because engines follow the index."""
    if not (folder / _INDEX).is_file():
        return
    weight_map, problem = _weight_map(folder / _INDEX)
    if problem is not None or set(weight_map.values()) != {_SINGLE}:
        what = f"lists other files than {_SINGLE}, which contains the weights"
        yield Problem(folder / _INDEX, what, "Remove the index, or remove the weight file that it does not list.")


def _file(path: Path) -> tuple[dict[str, Tensor], list[Problem]]:
    try:
        return safetensors_header.read(path), []
    except BrokenFile as error:
        return {}, [Problem(path, error.what, error.remedy)]
    except OSError as error:
        return {}, [Problem(path, f"cannot be read: {error.strerror}", "Check its permissions.")]


def _pickled(path: Path) -> Iterator[Problem]:
    """Yield the problems of weights in torch's own format. Their tensors are not listed, because that would need running Python code."""
    try:
        whole = zipfile.is_zipfile(path)
    except OSError:
        whole = False
    if not whole:
        yield Problem(path, "is truncated, or does not contain weights", "Copy or download the file again.")


def _weight_map(index: Path) -> tuple[dict[str, str], Problem | None]:
    found, problem = _object(index)
    weight_map = found.get("weight_map")
    if problem is None and (
        not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values())
    ):
        problem = Problem(index, "has no weight_map of tensors and files", "Copy or download the file again.")
    return ({}, problem) if problem is not None else (dict(weight_map or {}), None)


def _shards(index: Path, weight_map: Mapping[str, str]) -> tuple[list[Problem], list[Path]]:
    """Return a problem for each absent file of an index, and the files that exist."""
    missing, present = [], []
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if Path(name).name != name or not name:
            missing.append(Problem(index, f"lists a file outside the folder: {name}", "Download the index again."))
        elif file.is_file():
            present.append(file)
        else:
            count = sum(1 for other in weight_map.values() if other == name)
            what = f"is absent; according to {index.name}, it contains {count} tensors"
            missing.append(Problem(file, what, "Copy or download this file too."))
    return missing, present


def _indexed(index: Path) -> tuple[dict[str, Tensor], list[Problem]]:
    weight_map, problem = _weight_map(index)
    if problem is not None:
        return {}, [problem]
    found, present = _shards(index, weight_map)
    tensors: dict[str, Tensor] = {}
    for file in present:
        held, wrong = _file(file)
        found += wrong
        lacking = [] if wrong else [n for n, place in weight_map.items() if place == file.name and n not in held]
        if lacking:
            what = f"lacks {_some(lacking)}, although {index.name} lists it for this file"
            found.append(Problem(file, what, "Copy or download both the file and its index again."))
        tensors |= held
    return tensors, found


def _some(names: list[str]) -> str:
    """Return the first few names, and the number of the others."""
    left = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {left} more" if left > 0 else "")


def _against_config(folder: Path, config: Mapping[str, Any], held: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Yield the differences between the tensors in the files and those that the configuration describes."""
    if "quantization_config" in config:
        return  # the quantisation method defines other names, shapes and types
    try:
        known = architecture.read(config)
    except architecture.ConfigProblem as error:
        yield Problem(
            folder / "config.json", str(error), "Use the config.json of the model that the weights belong to."
        )
        return
    where = folder / (_SINGLE if (folder / _SINGLE).is_file() else _INDEX)
    kind = str(config.get("model_type"))
    there = {architecture.canonical(kind, name): tensor for name, tensor in held.items()}
    expected = {}
    if known is not None:
        expected = {name: shape for name, shape in known.tensors.items() if not architecture.is_expert(name)}
    missing = [name for name in expected if name not in there] if known else list(_gaps(held))
    if missing:
        what = f"lacks {_some(missing)}; a program that loads the model would use random values instead"
        yield Problem(where, what, "Copy or download the weights again, or repeat the export.")
    for name, shape in expected.items():
        if name in there and there[name].shape != shape:
            what = f"{name} has the shape {list(there[name].shape)}, but according to config.json it is {list(shape)}"
            yield Problem(where, what, "Use weights and config.json of the same model.")
            return
    for name, tensor in there.items():
        if name in expected and tensor.dtype not in _FLOATS:
            what = f"{name} is of type {tensor.dtype}, but config.json does not mention a quantisation"
            yield Problem(where, what, "Use the config.json of the model that the weights belong to.")
            return


_LAYER = re.compile(r"^(.*?\b(?:layers?|blocks|h)\.)(\d+)\.(.+)$")


def _gaps(held: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the tensors that one layer of a stack lacks and all others have. For models whose tensors are unknown."""
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in held:
        if match := _LAYER.match(name):
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    for prefix, layers in stacks.items():
        for number in range(max(layers) + 1):
            others, own = [names for other, names in layers.items() if other != number], layers.get(number, set())
            if len(others) < 2 or not own <= set.union(*others):
                continue  # a layer with other tensors is of another kind
            for name in sorted(set.intersection(*others) - own):
                yield f"{prefix}{number}.{name}"


# ---- tokenizer, chat template, processor ----
_PICTURES = ("processor_config.json", "preprocessor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MISTRAL = "tekken.json"
"""File of a tokenizer that formats conversations without a template"""


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        pairs = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        if pairs or any((folder / name).is_file() for name in ("tokenizer.model", _MISTRAL)):
            return
        yield Problem(
            file, "is absent: the folder has no tokenizer", "Copy it from the model that training started from."
        )
        return
    found, problem = _object(file)
    if problem is not None:
        yield problem
        return
    yield from _picture_token(file, found, config)
    text = config.get("text_config", config)
    rows = text.get("vocab_size") if isinstance(text, Mapping) else None
    highest = max(_numbers(found), default=-1)
    if isinstance(rows, int) and highest >= rows:
        what = f"has tokens up to number {highest}, but the model's embedding has only {rows} rows"
        yield Problem(file, what, "Use the tokenizer of the model that the weights belong to.")


_PICTURE_TOKENS = ("<|image_pad|>", "<IMG_CONTEXT>")
"""Tokens that a picture's features replace, in the tokenizers"""


def _picture_token(file: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem if the number of the tokenizer's token for pictures is not the one that the model expects."""
    wanted = config.get("image_token_id")
    added = [each for each in tokenizer.get("added_tokens") or [] if isinstance(each, Mapping)]
    numbers = {each.get("content"): each.get("id") for each in added if each.get("content") in _PICTURE_TOKENS}
    if isinstance(wanted, int) and numbers and wanted not in numbers.values():
        word, number = next(iter(numbers.items()))
        what = f"{word} has number {number}, but according to config.json the token for pictures is {wanted}"
        yield Problem(file, what, "Use tokenizer and config.json of the same model.")


def _numbers(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from (number for number in vocabulary.values() if isinstance(number, int))
    elif isinstance(vocabulary, list):
        yield len(vocabulary) - 1
    for added in tokenizer.get("added_tokens") or []:
        if isinstance(added, Mapping) and isinstance(added.get("id"), int):
            yield added["id"]


def _template(folder: Path) -> Iterator[Problem]:
    if (folder / _MISTRAL).is_file():
        return
    place, text = _template_text(folder)
    if text is None:
        what = "is absent: the folder has no chat template, neither in this file nor in tokenizer_config.json"
        yield Problem(place, what, "Copy it from the model that training started from.")
        return
    if "content" not in text:
        what = "does not include any message" if text.strip() else "is empty"
        yield Problem(place, what, "Copy it from the model that training started from.")
        return
    from jinja2 import Environment, TemplateSyntaxError

    try:
        # the template is only parsed, so no foreign code is run. {% generation %} is transformers' own tag
        plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", text)
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)  # noqa: S701
    except TemplateSyntaxError as error:
        what = f"is not a valid template: {error.message} (line {error.lineno})"
        yield Problem(place, what, "Copy it from the model that training started from.")


def _template_text(folder: Path) -> tuple[Path, str | None]:
    """Return (the file of the chat template, its text); the text is None if there is no template."""
    jinja = folder / _TEMPLATES[0]
    if jinja.is_file():
        return jinja, jinja.read_text(encoding="utf-8", errors="replace")
    for name in (_TEMPLATES[1], "tokenizer_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = _object(folder / name)[0].get("chat_template")
            if isinstance(found, list):  # several templates, by name
                found = next((each.get("template") for each in found if isinstance(each, Mapping)), None)
            if isinstance(found, str) and found.strip():
                return folder / name, found
    return jinja, None


def _generation(folder: Path) -> Iterator[Problem]:
    """Yield the problems of the file of sampling defaults, because loaders ignore it silently if they cannot read it."""
    file = folder / "generation_config.json"
    problem = _object(file)[1] if file.is_file() else None
    if problem is not None:
        yield problem


def _processor(folder: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    there = [folder / name for name in _PICTURES if (folder / name).is_file()]
    if not there:
        what = "is absent: it describes how pictures become the model's input"
        yield Problem(folder / _PICTURES[1], what, "Copy it from the model that training started from.")
        return
    read = [_object(file) for file in there]
    broken = [problem for _, problem in read if problem is not None]
    yield from broken
    kinds = ("image_processor_type", "image_processor", "feature_extractor_type")
    if not broken and not any(key in found for found, _ in read for key in kinds):
        what = f"does not name an image processor ({kinds[0]})"
        yield Problem(there[0], what, "Copy it from the model that training started from.")
    vision = config.get("vision_config")
    for file, (found, problem) in zip(there, read, strict=True):
        images = found.get("image_processor", found)
        if problem is None and isinstance(vision, Mapping) and isinstance(images, Mapping):
            yield from _patches(file, images, vision)


_PATCHES = (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"), ("temporal_patch_size",) * 2)
"""Settings of a patch's size: (name in the image processor, name in the vision tower)"""


def _patches(file: Path, images: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterator[Problem]:
    for name, of_tower in _PATCHES:
        one, other = images.get(name), vision.get(of_tower)
        if isinstance(one, int) and isinstance(other, int) and one != other:
            what = f"{name} is {one}, but the vision tower in config.json needs {other}"
            yield Problem(file, what, "Copy it from the model that training started from.")
