"""Supervised fine-tuning: transformers' Trainer on reasoning + box answers, resumable at any step.

Hyperparameters, label mask and freezing are the reference's (see `docs/training.md`); the tiny model of the demo runs through the same code.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from grounding.api import GroundingTrainJob
from grounding.data.images import open_images
from grounding.data.jobdata import JobData
from grounding.errors import Failure, UserError
from grounding.train import checkpoints, families, rank0, sft_shard, torchrun, tracking, uploads
from grounding.train.export import assemble
from grounding.train.patch_embedding import use_matrix_product
from grounding.train.progress import ProgressWriter
from grounding.train.sft_data import Collator, SftDataset, load_rows, raise_error

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Progress lines, completeness markers, and a clean stop on SIGTERM (a checkpoint first)."""

    def __init__(
        self, out: Path, resume_from: int, keep: int, log: tracking.Log, furnish: Callable[[Path], None]
    ) -> None:
        self.out, self.resume_from, self.keep, self.log, self.furnish = out, resume_from, keep, log, furnish
        self.stopped = False
        self._writer: ProgressWriter | None = None
        self._began, self._tokens = time.monotonic(), 0

    def request_stop(self, *_: object) -> None:
        self.stopped = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._writer = ProgressWriter(self.out / "progress.jsonl", "sft", state.max_steps, self.resume_from)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._tokens = time.monotonic(), int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self._writer and logs and "loss" in logs:
            names = {"loss": "loss", "grad_norm": "gradNorm", "learning_rate": "learningRate"}
            line = {n: float(logs[k]) for k, n in names.items() if k in logs}
            line["secondsStep"] = took = time.monotonic() - self._began
            if took > 0:
                line["tokensPerSecond"] = (int(state.num_input_tokens_seen) - self._tokens) / took
            self._writer.step(state.global_step, line)
            self.log(state.global_step, line)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _any_rank(self.stopped):  # all ranks stop after the same step, or none could save
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _barrier()  # the marker vouches for every rank's files
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.furnish(folder)
            checkpoints.mark_complete(folder)
            checkpoints.keep_newest(args.output_dir, self.keep)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._writer:
            self._writer.close()


def _distributed() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _barrier() -> None:
    if _distributed():
        torch.distributed.barrier()


def _any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank."""
    if not _distributed():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    told = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def _begin_loading(begin: Callable[[int], None] | None, number: int) -> None:
    """In a loader's process: a terminal's Ctrl-C, which every process gets, is the trainer's business; without rows it could not finish its step.

    SIGTERM keeps its meaning: by it Python ends the loaders of a trainer that has failed. torchrun must not send it to them (`torchrun.py`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if begin:
        begin(number)


class _Trainer(Trainer):  # type: ignore[misc]
    """The Trainer, which knows that a loader's process may hand over an error in the place of a batch."""

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        base.worker_init_fn = partial(_begin_loading, base.worker_init_fn)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        raise_error(batches)
        return batches, items


def _arguments(job: GroundingTrainJob, out: Path, processes: int) -> TrainingArguments:
    h, cpu = job.spec.hyperparameters, not torch.cuda.is_available()
    total, micro = h.batch_size or 128, h.micro_batch_size or h.batch_size or 8
    if total % (micro * processes):
        raise UserError(
            f"batchSize {total} is not a multiple of microBatchSize {micro} x {processes} processes",
            field="spec.hyperparameters.batchSize",
        )
    dtype = _DTYPES[h.dtype or "bfloat16"]
    shard = sft_shard.wanted(os.environ, processes, not cpu)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=total // (micro * processes),
        num_train_epochs=h.epochs or 1,
        max_steps=h.max_steps or -1,
        learning_rate=h.learning_rate or 1e-5,
        lr_scheduler_type=h.schedule or "cosine",
        warmup_steps=h.warmup_steps if h.warmup_steps is not None else (h.warmup_ratio or 0.0),
        weight_decay=h.weight_decay or 0.0,
        adam_beta2=h.adam_beta2 or 0.999,
        max_grad_norm=h.max_grad_norm if h.max_grad_norm is not None else 1.0,
        bf16=dtype == torch.bfloat16 and not cpu,
        fp16=dtype == torch.float16 and not cpu,
        use_cpu=cpu,
        gradient_checkpointing=bool(h.gradient_checkpointing),
        seed=job.spec.seed,
        data_seed=job.spec.seed,
        save_strategy="steps",
        save_steps=h.save_every or 50,
        save_total_limit=None,  # ours keeps only complete ones
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        # one worker reads and resizes pictures while the model trains; the order of rows does not depend on it
        dataloader_num_workers=1 if cpu else 8,
        dataloader_persistent_workers=True,
        dataloader_pin_memory=not cpu,
        **(sft_shard.settings() if shard else {}),
    )
    if shard:
        sft_shard.tune(arguments, torch.float32 if cpu else dtype)
    return arguments


def train(
    job: GroundingTrainJob, data: JobData, model_source: str, out: Path, log: tracking.Log = tracking.nowhere
) -> int:
    """Train to the end or to SIGTERM; leaves `out/model`. Returns the exit code: 0 finished, 143 stopped with a checkpoint."""
    if data.sft_rows is None:
        raise UserError("an SFT job needs spec.data.train (or spec.data.shapes)", field="spec.data")
    if (out / "model" / "config.json").exists():
        return 0
    processes, first = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    arguments = _arguments(job, out, processes)
    if (
        arguments.device.type == "cpu"
    ):  # the ranks find each other here; each calls its processor cpu:0, by which torch.load cannot resume
        arguments._setup_devices = torch.device("cpu")
    _one_storage(out, first)
    set_seed(job.spec.seed)
    rows = load_rows(data.sft_rows)
    source = model_source
    if source.startswith("tiny://"):
        if first:
            _tiny(job, out, rows)
        _barrier()
        source = str(_tiny(job, out, rows))
    families.check(job.spec.model.family_name, source)
    h = job.spec.hyperparameters
    original = AutoProcessor.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    if h.max_pixels or h.min_pixels:
        if job.spec.model.family_name == "internvl":
            raise UserError(
                "InternVL cuts pictures into tiles of one size; minPixels and maxPixels are Qwen3-VL's",
                field="spec.hyperparameters",
                hint="Leave both out, or choose the tiles in the model's preprocessor_config.json (max_patches).",
            )
        size = dict(processor.image_processor.size)
        processor.image_processor.size = {
            "shortest_edge": h.min_pixels or size["shortest_edge"],
            "longest_edge": h.max_pixels or size["longest_edge"],
        }
    if not torch.cuda.is_available():
        use_matrix_product()
    # in float32 whatever is computed in: at these learning rates bfloat16 has too few digits for a step to change a weight
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa")
    dtype = _DTYPES[h.dtype or "bfloat16"] if torch.cuda.is_available() else torch.float32
    if h.freeze_vision:
        families.freeze_vision(model)
    # rank 0 alone sets broken ones aside
    checkpoint = checkpoints.newest(out / "checkpoints") if first else None
    _barrier()
    checkpoint = checkpoint or checkpoints.peek(out / "checkpoints")
    if checkpoint:
        _refuse_other_kind(checkpoint, bool(arguments.fsdp))

    def furnish(folder: Path) -> None:
        """What a checkpoint lacks to be exported by itself."""
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
        original.save_pretrained(folder)

    recorder = _Recorder(out, checkpoint.step if checkpoint else 0, h.keep_checkpoints or 5, log, furnish)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, recorder.request_stop)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=SftDataset(rows, processor),
        data_collator=Collator(open_images(*data.images), processor, model.config.image_token_id, h.max_length or 8192),
        callbacks=[recorder],
    )
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start = f"resuming after step {checkpoint.step}" if checkpoint else "starting"
    print(f"sft: {len(rows)} rows, {parameters:,} parameters ({trained:,} trained), {start}", flush=True)  # noqa: T201
    result = trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if recorder.stopped and trainer.state.global_step < trainer.state.max_steps:
        return 143
    if not torch.isfinite(torch.tensor(result.training_loss)):
        raise Failure(
            "the loss is not a finite number",
            hint="Lower spec.hyperparameters.learningRate; the progress lines show the step it began at.",
            file=out / "progress.jsonl",
        )
    weights = sft_shard.whole(trainer) if arguments.fsdp else None  # asks all ranks
    if trainer.is_world_process_zero():
        save_model(out, _finished(trainer, weights, dtype), original)
    _barrier()
    return 0


def _finished(trainer: Any, weights: dict[str, torch.Tensor] | None, dtype: torch.dtype) -> Any:
    """The trained model in one piece and in the dtype that the job names."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.to(dtype) if weights is None else assemble(model.config, weights, dtype)


def _one_storage(out: Path, first: bool) -> None:
    """Raise `UserError` on a node whose `out` is not rank 0's: checkpoints hold files of all ranks, and resuming needs all of them."""
    if not _distributed():
        return
    token = [os.urandom(8).hex() if first else ""]
    torch.distributed.broadcast_object_list(token, src=0)
    sign = out / f".ranks-{token[0]}"
    if first:
        out.mkdir(parents=True, exist_ok=True)
        sign.touch()
    _barrier()
    apart = _any_rank(not sign.exists())
    if first:
        sign.unlink()
    if apart:
        hint = "Give the job an output on a claim that all nodes can mount (pvc://, ReadWriteMany)."
        raise UserError("the nodes of this job do not share their storage", field="spec.output", file=out, hint=hint)


def _refuse_other_kind(checkpoint: checkpoints.Checkpoint, sharded: bool) -> None:
    """Raise `UserError` where a checkpoint of sharded ranks is to be continued by one process, or the other way round. Their number may differ."""
    if sft_shard.is_sharded(checkpoint.path) == sharded:
        return
    found = checkpoints.world_size(checkpoint.path) or 1
    raise UserError(
        f"this checkpoint was written by {found} {'ranks' if found > 1 else 'process'}, "
        + ("the job now has several GPUs" if sharded else "the job now has one GPU or none"),
        file=checkpoint.path,
        field="spec.resources",
        hint=checkpoints.way_out(checkpoint),
    )


def save_model(out: Path, model: Any, processor: Any) -> None:
    """Write `out/model` so that it is there whole or not at all."""
    temporary = out / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(out / "model")
    temporary.rename(out / "model")


def _tiny(job: GroundingTrainJob, out: Path, rows: list[dict[str, Any]]) -> Path:
    """The random tiny model of this job, built once."""
    from grounding.train.tiny import build

    folder, temporary = out / "initial", out / ".initial.tmp"
    if not folder.exists():
        shutil.rmtree(temporary, ignore_errors=True)
        texts = [turn["value"] for row in rows[:2000] for turn in row["conversations"]]
        build(temporary, ["user\nassistant\n", *texts], seed=job.spec.seed, family=job.spec.model.family_name)
        temporary.rename(folder)
    return folder


def main(job: GroundingTrainJob, data: JobData, model_source: str, out: Path) -> None:
    """Entry point of `egm role sft`; on several GPUs or nodes it becomes torchrun, which starts it again once a rank."""
    command = torchrun.launcher(os.environ, torch.cuda.device_count(), sys.argv[1:])
    if command:
        os.execv(sys.executable, command)  # noqa: S606
    gpus = torch.cuda.device_count() * job.spec.resources.nodes
    model_source = uploads.local_model(model_source)
    if int(os.environ.get("RANK", "0")) == 0:
        with rank0.surrounded(job, out, gpus) as log:
            code = train(job, data, model_source, out, log)
    else:
        code = train(job, data, model_source, out)
    if code:
        sys.stderr.write("sft: stopped; a checkpoint was written, the same command continues from it\n")
    raise SystemExit(code)
