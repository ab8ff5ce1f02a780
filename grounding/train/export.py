"""A checkpoint as a Hugging Face folder, which the evaluation serves and another job starts from; without the optimizer.

RL's (verl) carry that folder already or are merged by `verl.model_merger`; SFT's are the weights of one process, or the shards of several ranks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from grounding.errors import Failure, UserError
from grounding.train.sft_shard import FOLDER

_TRAINERS = {"trainer_state.json", "complete.json"}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def export(checkpoint: Path, out: Path, beside: Path | None = None) -> Path:
    """Write the weights of a checkpoint folder (`global_step_N`, `checkpoint-N`) to the folder `out`, whole or not at all.

    Files of `beside` (the model that training started from) that the checkpoint lacks go along: its copy of the processor may be incomplete.
    Raises `UserError` where this is no checkpoint, `Failure` where it cannot be merged.
    """
    if not checkpoint.is_dir():
        raise UserError("no such folder", file=checkpoint)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    actor = checkpoint / "actor" if (checkpoint / "actor").is_dir() else checkpoint
    if list(actor.glob("model_world_size_*_rank_*.pt")):
        _verl(actor, temporary)
    elif (checkpoint / FOLDER).is_dir():
        _shards(checkpoint, temporary)
    elif (checkpoint / "config.json").is_file() and _has_weights(checkpoint):
        _plain(checkpoint, temporary)
    else:
        hint = "Name a folder global_step_N or checkpoint-N of a job's checkpoints/."
        raise UserError("this is no checkpoint of SFT or RL", file=checkpoint, hint=hint)
    if beside is not None and beside.is_dir():
        _small_files(beside, temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


def _small_files(source: Path, target: Path) -> None:
    """Configuration, processor and tokenizer that `target` lacks; nothing of a trainer's state."""
    for file in source.iterdir():
        wanted = file.suffix in {".json", ".jinja", ".txt", ".model"} and file.name not in _TRAINERS
        if wanted and not file.name.startswith(".") and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)


def _verl(actor: Path, target: Path) -> None:
    if _has_weights(actor / "huggingface"):
        shutil.copytree(actor / "huggingface", target)
        return
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor), "--target_dir", str(target)]
    if subprocess.run(command, check=False).returncode:
        raise Failure("verl's model merger failed", hint="Its message stands above.", file=actor)


def _plain(checkpoint: Path, target: Path) -> None:
    target.mkdir()
    for pattern in (*_WEIGHTS, "*.index.json"):
        for file in checkpoint.glob(pattern):
            shutil.copy2(file, target / file.name)
    _small_files(checkpoint, target)


def _shards(checkpoint: Path, target: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner, _load_state_dict
    from transformers import AutoConfig

    state: dict[str, Any] = {}
    reader = FileSystemReader(checkpoint / FOLDER)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    config = AutoConfig.from_pretrained(checkpoint)
    assemble(config, state["model"], config.dtype).save_pretrained(target)
    _small_files(checkpoint, target)


def assemble(config: Any, weights: dict[str, Any], dtype: Any) -> Any:
    """A model of these weights in `dtype`, in the memory of this machine."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    model.tie_weights()
    return model
