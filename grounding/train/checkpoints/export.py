"""Export a checkpoint as a Hugging Face folder without the optimizer, for evaluation or as the start of another job.

RL's checkpoints (verl) already contain that folder, or are merged by `verl.model_merger`. SFT's checkpoints contain the weights of one
process or the shards of several ranks. LoRA adapters of both are merged into the weights of the model from which training started.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.errors import Failure, UserError
from grounding.files import MANIFEST, publish, read_json
from grounding.models import folder as model_folder
from grounding.train.checkpoints import adapter as adapters
from grounding.train.checkpoints.local import content_folder
from grounding.train.checkpoints.safe_loading import require_safe
from grounding.train.sft.sharding import FOLDER

if TYPE_CHECKING:
    import torch

_TRAINERS = {adapters.CONFIG, "trainer_state.json", "complete.json", "identity.json", "metrics.json", MANIFEST}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def export(
    checkpoint: Path,
    out: Path,
    beside: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    *,
    adapter_only: bool = False,
) -> Path:
    """Write the weights of a checkpoint folder (`global_step_N`, `checkpoint-N`) to the folder `out`, completely or not at all.

    Files of `beside` (the model from which training started) that the checkpoint lacks are copied too, because its copy of the processor may
    be incomplete. `facts` are added to the manifest of `out`. `adapter_only` writes only the LoRA adapter, in PEFT's format. Raises `UserError`
    if this is not a checkpoint, or if `out` contains files that no export has written, and `Failure` if the checkpoint cannot be merged.
    """
    if not checkpoint.is_dir():
        raise UserError("no such folder", file=checkpoint)
    checkpoint = content_folder(checkpoint)
    actor = checkpoint / "actor" if (checkpoint / "actor").is_dir() else checkpoint
    write: partial[None]
    if adapter_only:
        return _adapter_only(checkpoint, actor, out, beside)
    if adapters.is_adapter(checkpoint) or (actor / adapters.VERL_META).is_file():
        base = beside if beside is not None and beside.is_dir() else None
        write = partial(_adapted, checkpoint, actor, base)
    elif list(actor.glob("model_world_size_*_rank_*.pt")):
        write = partial(_verl, actor)
    elif (checkpoint / FOLDER).is_dir():
        write = partial(_shards, checkpoint)
    elif (checkpoint / "config.json").is_file() and _has_weights(checkpoint):
        write = partial(_plain, checkpoint)
    else:
        hint = "Name a folder global_step_N or checkpoint-N of a job's checkpoints/."
        raise UserError("this is not a checkpoint of SFT or RL", file=checkpoint, hint=hint)
    with publish(out, facts) as folder:
        if write.func is not _plain:  # `_plain` copies files without loading them
            require_safe(checkpoint)
        write(folder)
        if beside is not None and beside.is_dir():
            _small_files(beside, folder)
        model_folder.require_exported(folder)
    return out


def _adapter_of(checkpoint: Path, actor: Path) -> adapters.Adapter:
    """Return the LoRA adapter of a checkpoint. Raises `UserError` if it has none."""
    if adapters.is_adapter(checkpoint):
        return adapters.read(checkpoint)
    if (actor / adapters.VERL_META).is_file():
        require_safe(checkpoint)
        return adapters.of_verl(actor)
    if (checkpoint / adapters.CONFIG).is_file():
        require_safe(checkpoint)
        meta = read_json(checkpoint / adapters.CONFIG)
        return adapters.of_state(_sharded_state(checkpoint), int(meta["r"]), int(meta["lora_alpha"]))
    raise UserError("this checkpoint has no LoRA adapter", file=checkpoint, hint="Leave out --adapter.")


def _adapter_only(checkpoint: Path, actor: Path, out: Path, base: Path | None) -> Path:
    adapter = _adapter_of(checkpoint, actor)
    known = adapters.base_of(checkpoint) if (checkpoint / adapters.CONFIG).is_file() else None
    with publish(out) as folder:
        adapters.write(adapter, folder, str(base or known or ""))
    return out


def _adapted(checkpoint: Path, actor: Path, base: Path | None, target: Path) -> None:
    adapter = _adapter_of(checkpoint, actor)
    if base is None and adapters.is_adapter(checkpoint):
        base = adapters.base_of(checkpoint)
    if base is None and (actor / adapters.VERL_META).is_file() and _merged_of_verl(actor, adapter, target):
        return
    if base is None:
        hint = "Name the folder of the model that training started from with --model."
        raise UserError("this checkpoint contains only LoRA adapters", file=checkpoint, hint=hint)
    settings = checkpoint / "config.json"
    dtype = read_json(settings).get("dtype") if settings.is_file() else None
    import torch

    write_merged(base, adapter, target, getattr(torch, str(dtype)) if dtype else None)


def _merged_of_verl(actor: Path, adapter: adapters.Adapter, target: Path) -> bool:
    """Write the merged weights of verl's shards if they also contain the frozen weights (some releases only save adapters)."""
    from transformers import AutoConfig

    state = adapters.verl_state(actor, re.compile("."))
    if not adapters.base_state(state):
        return False
    config = AutoConfig.from_pretrained(actor / "huggingface")
    assemble(config, adapters.merged_state(state, adapter), config.dtype).save_pretrained(target)
    _small_files(actor / "huggingface", target)
    return True


def write_merged(base: Path, adapter: adapters.Adapter, target: Path, dtype: Any = None) -> None:
    """Write the model in `base` with the adapter merged in, and its small files, to the folder `target`. Raises `Failure` if the result is
    incomplete.
    """
    adapters.merge(base, adapter, target, dtype)
    _small_files(base, target)
    model_folder.require_exported(target)


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


def _small_files(source: Path, target: Path) -> None:
    """Copy the configuration, processor and tokenizer that `target` lacks, but no files of a trainer's state."""
    for file in source.iterdir():
        wanted = file.suffix in {".json", ".jinja", ".txt", ".model"} and file.name not in _TRAINERS
        if wanted and not file.name.startswith(".") and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)


def _verl(actor: Path, target: Path) -> None:
    if _has_weights(actor / "huggingface"):
        shutil.copytree(actor / "huggingface", target, dirs_exist_ok=True)
        return
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor), "--target_dir", str(target)]
    if subprocess.run(command, check=False).returncode:
        raise Failure("verl's model merger failed", hint="Its message is in the log above.", file=actor)


def _plain(checkpoint: Path, target: Path) -> None:
    for pattern in (*_WEIGHTS, "*.index.json"):
        for file in checkpoint.glob(pattern):
            shutil.copy2(file, target / file.name)
    _small_files(checkpoint, target)


def _shards(checkpoint: Path, target: Path) -> None:
    from transformers import AutoConfig

    state = _sharded_state(checkpoint)
    if (checkpoint / adapters.CONFIG).is_file():
        state = adapters.merged_state(state, _adapter_of(checkpoint, checkpoint))
    config = AutoConfig.from_pretrained(checkpoint)
    assemble(config, state, config.dtype).save_pretrained(target)
    _small_files(checkpoint, target)


def _sharded_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner, _load_state_dict

    state: dict[str, dict[str, torch.Tensor]] = {}
    reader = FileSystemReader(checkpoint / FOLDER)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state["model"]


def assemble(config: Any, weights: dict[str, torch.Tensor], dtype: Any) -> Any:
    """Return a model with these weights in `dtype`, in CPU memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    model.tie_weights()
    return model
