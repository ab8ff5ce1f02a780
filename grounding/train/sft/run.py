"""Supervised fine-tuning with transformers' Trainer on answers with reasoning and box, resumable at any step.

Hyperparameters, label mask and freezing equal the reference's (see `docs/training.md`). The tiny model of the demo is trained by the same
code.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from grounding.api import SftJob
from grounding.api.validation import FIGURES, best_figure, of_set
from grounding.data.embedded import embedded_sources
from grounding.data.images import open_images
from grounding.data.jobdata import JobData
from grounding.data.sft_rows import SftRow
from grounding.errors import Failure, UserError
from grounding.files import is_published, publish, write_json
from grounding.models import architecture, attention, families
from grounding.models import folder as model_folder
from grounding.models.fused import use_fused_kernels
from grounding.models.memory import SMALLEST, Plan, plan, state_bytes
from grounding.models.patch_embedding import use_matrix_product
from grounding.progress import ProgressWriter, read_progress
from grounding.runtime.grace import Stop
from grounding.runtime.ranks import rank_of, world_size_of
from grounding.train import devices, identity, lora, rank0
from grounding.train import initial as initials
from grounding.train.checkpoints import adapter as adapters
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads
from grounding.train.checkpoints.export import assemble, export, write_merged
from grounding.train.checkpoints.own_disks import (
    FINISHED_S,
    OwnDisks,
    every_file,
    is_late,
    output_of,
    uploading,
)
from grounding.train.checkpoints.safe_loading import require_safe
from grounding.train.finite import all_finite
from grounding.train.monitoring import tracking
from grounding.train.monitoring.speed import peak_flops
from grounding.train.sft import pods, torchrun
from grounding.train.sft import sharding as sft_shard
from grounding.train.sft.data import PackingCollator, SftDataset, load_rows
from grounding.train.sft.finite import FiniteGuard
from grounding.train.sft.masters import to_bfloat16
from grounding.train.sft.trainer import Measured, PackedTrainer, recompute, use_pack_loss

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes progress lines and completeness markers, and stops cleanly on SIGTERM, after saving a checkpoint."""

    def __init__(
        self,
        out: Path,
        resume_from: int,
        keep: int,
        log: tracking.Log,
        furnish: Callable[[Path], None],
        stop: Stop,
        *,
        own_disks: bool = False,
    ) -> None:
        self.out, self.resume_from, self.keep, self.log, self.furnish = out, resume_from, keep, log, furnish
        self.own_disks = own_disks
        self.stop, self.guard = stop, FiniteGuard(_any_rank)
        self._writer: ProgressWriter | None = None
        self.trainer: PackedTrainer | None = None
        self.flops_a_token, self.peak, self._optimizer = 0.0, float("nan"), 0.0
        self.sets: dict[str, SftDataset] = {}
        """Validation sets by name; a name may be empty"""
        self.every, self.first, self.figure = 0, False, ""
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self.validation_owed = False
        """Whether the last validation was skipped because the run was asked to stop"""

    def validate_on(self, sets: dict[str, SftDataset], job: SftJob) -> None:
        """Validate on these sets during training, as the job configures."""
        h = job.spec.hyperparameters
        self.sets, self.every, self.first, self.figure = (
            sets,
            h.validate_every,
            h.validate_before_train,
            best_figure(job) or "",
        )

    def note_last_figures(self) -> None:
        """Record the metrics of the step from which this run continues, because the earlier run may have been killed between saving and
        recording it.
        """
        root = self.out / "checkpoints"
        for line in read_progress(self.out / "progress.jsonl"):
            value = line["metrics"].get(self.figure)
            if value is not None and line["step"] == self.resume_from:
                checkpoints.note_best(root, self.resume_from, self.figure, value)

    def _validate(self, step: int) -> None:
        assert self.trainer is not None
        began = time.monotonic()
        found: dict[str, tuple[float, float]] = {}
        for name, rows in self.sets.items():
            values = self.trainer.figures_of(rows, lambda: _any_rank(self.stop.asked))
            self.validation_owed = values is None
            if values is None:  # no time for the validation: the grace period is for the checkpoint
                print(f"sft: stopping; the validation of step {step} is left to the next run", flush=True)  # noqa: T201
                return
            found[name] = values
        figures = dict(
            zip(FIGURES["sft"], (sum(f) / len(found) for f in zip(*found.values(), strict=True)), strict=True)
        )
        for name, values in found.items():
            figures |= {of_set(figure, name): value for figure, value in zip(FIGURES["sft"], values, strict=True)}
        self._validated = step, {**figures, "secondsValidation": time.monotonic() - began}

    def watch(self, trainer: PackedTrainer, flops_a_token: float) -> None:
        """Take the metrics of each step from `trainer`. `flops_a_token`: operations of its model for one token."""
        self.trainer, self.flops_a_token = trainer, flops_a_token
        rate = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.peak = float("nan") if rate is None else rate * trainer.accelerator.num_processes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._writer = ProgressWriter(self.out / "progress.jsonl", "sft", state.max_steps, self.resume_from)
        begins = self.first and not self.resume_from
        # only rank 0 has the lines
        if self.sets and (begins or _any_rank(state.is_world_process_zero and self._owes(state.max_steps))):
            self._validate(self.resume_from)
            if self._writer and self._validated[0] == self.resume_from:
                self._writer.step(self.resume_from, self._validated[1])
                self._writer.sync()
                self.log(self.resume_from, self._validated[1])
                self.note_last_figures()
            control.should_training_stop = self.validation_owed  # the next run begins with the validation

    def _owes(self, total: int) -> bool:
        """Return whether a validation is due at the step from which this run continues, but no line of progress.jsonl has its result.

        That is so if the previous run was stopped before it validated.
        """
        step = self.resume_from
        due = step > 0 and (step % self.every == 0 or step >= total)
        lines = read_progress(self.out / "progress.jsonl")
        return due and not any(line["step"] == step and FIGURES["sft"][0] in line["metrics"] for line in lines)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer:
            self.trainer.measured.add("secondsOptimizer", self._optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self._writer and logs and "loss" in logs:
            names = {"loss": "loss", "grad_norm": "gradNorm", "learning_rate": "learningRate"}
            line = {n: float(logs[k]) for k, n in names.items() if k in logs}
            if self.guard.skipped:
                line["skippedSteps"] = float(self.guard.skipped)
            if self.trainer:
                line |= self._figures(self.trainer.measured)
            if self._validated[0] == state.global_step:
                line |= self._validated[1]
            self._writer.step(state.global_step, line)
            self.log(state.global_step, line)

    def _figures(self, measured: Measured) -> dict[str, float]:
        """Return the costs of a step: seconds by phase, throughput, share of the GPUs' peak rate, and maximum memory in use."""
        took = max((measured.ended or time.monotonic()) - measured.began, 1e-9)
        line = {"secondsStep": took, "tokensPerSecond": measured.tokens / took, "packs": float(measured.packs)}
        line |= measured.seconds
        if math.isfinite(self.peak):
            line["mfu"] = self.flops_a_token * line["tokensPerSecond"] / self.peak
        if torch.cuda.is_available():
            line["gpuMemoryBytes"] = float(torch.cuda.max_memory_allocated())
        return line

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if self.sets and (step % self.every == 0 or step >= state.max_steps):
            if self.trainer:
                self.trainer.measured.end()
            self._validate(step)
        if _any_rank(self.stop.asked):  # all ranks must stop after the same step; otherwise none of them could save
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _barrier()  # the marker vouches for every rank's files
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            self.furnish(folder)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of the Trainer's, which no code reads
            if self._writer:
                self._writer.sync()
            if not self.own_disks:
                checkpoints.mark_complete(folder)
        if self.own_disks:
            pods.mark(folder)
        if state.is_world_process_zero:
            if self.figure and self._validated[0] == state.global_step:
                checkpoints.note_best(
                    Path(args.output_dir), state.global_step, self.figure, self._validated[1].get(self.figure, math.nan)
                )
            checkpoints.keep_newest(args.output_dir, self.keep)
        if self.own_disks:
            pods.prune_as_rank_0(Path(args.output_dir))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._writer:
            self._writer.close()


def _distributed() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _barrier() -> None:
    if _distributed():
        torch.distributed.barrier()


def _any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank."""
    if not _distributed():
        return flag
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    told = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def _workers(processes: int) -> int:
    """Return the number of loader processes per rank: a picture needs a core for about 10 ms, and a GPU trains about 80 rows per second."""
    cores = len(os.sched_getaffinity(0)) // max(1, min(processes, torch.cuda.device_count()))
    return int(max(2, min(12, cores - 1)))


def _arguments(job: SftJob, out: Path, processes: int, *, own_disks: bool = False) -> TrainingArguments:
    h, cpu = job.spec.hyperparameters, not torch.cuda.is_available()
    total = h.batch_size
    if total % processes:
        raise UserError(
            f"batchSize {total} is not a multiple of {processes} processes",
            field="spec.hyperparameters.batchSize",
        )
    dtype = _DTYPES[h.dtype]
    shard = sft_shard.wanted(os.environ, processes, not cpu)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=total
        // processes,  # rows of a rank in one step; the trainer divides them into packs
        gradient_accumulation_steps=1,
        num_train_epochs=h.epochs,
        max_steps=h.max_steps if h.max_steps is not None else -1,
        learning_rate=h.learning_rate,
        lr_scheduler_type=h.schedule,
        warmup_steps=h.warmup_steps if h.warmup_steps is not None else h.warmup_ratio,
        weight_decay=h.weight_decay,
        adam_beta2=h.adam_beta2,
        max_grad_norm=h.max_grad_norm,
        # with one GPU, bfloat16 weights and float32 masters are used instead
        bf16=dtype == torch.bfloat16 and shard and not cpu,
        fp16=dtype == torch.float16 and not cpu,
        use_cpu=cpu,
        gradient_checkpointing=False,  # enabled layer by layer, see `memory.plan`
        seed=job.spec.seed,
        data_seed=job.spec.seed,
        save_strategy="steps",
        save_steps=h.save_every,
        save_total_limit=None,  # our callback deletes old checkpoints, and keeps only complete ones
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",  # our trainer counts them
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        # loaders read and resize pictures while the model trains; the order of rows does not depend on their number
        dataloader_num_workers=1 if cpu else _workers(processes),
        dataloader_persistent_workers=True,
        dataloader_pin_memory=not cpu,
        ddp_timeout=pods.PATIENCE_S if own_disks else 1800,
        **(sft_shard.settings() if shard else {}),
    )
    if shard:
        sft_shard.tune(arguments, torch.float32 if cpu else dtype)
    return arguments


def train(
    job: SftJob,
    data: JobData,
    model_source: str,
    out: Path,
    log: tracking.Log = tracking.nowhere,
    stop: Stop | None = None,
    disks: OwnDisks | None = None,
    who: identity.Identity | None = None,
) -> int:
    """Train to the end or until `stop` is requested, and write `out/model`. Return the exit code: 0 finished, 143 stopped with a
    checkpoint.

    `disks`: the pods share no folder; then `who` is what the pod of this rank trains, on the first rank of each pod.
    """
    if data.sft_rows is None:
        raise UserError("an SFT job needs spec.data.train (or spec.data.shapes)", field="spec.data")
    if is_published(out / "model"):
        return 0
    stop = stop if stop is not None else Stop.of_process()
    processes, first = world_size_of(os.environ), rank_of(os.environ) == 0
    arguments = _arguments(job, out, processes, own_disks=disks is not None)
    # reading `device` connects the ranks; each names its processor cpu:0, with which torch.load cannot resume
    if arguments.device.type == "cpu":
        arguments._setup_devices = torch.device("cpu")
    if disks is None:
        _one_storage(out, first)
    else:
        pods.meet(disks, out, who)
    set_seed(job.spec.seed)
    rows = load_rows(data.sft_rows)

    def texts() -> list[str]:
        return [text for row in rows[:2000] for text in (row.human, row.gpt)]

    def initial() -> str:
        return initials.local(model_source, job.spec.model.family_name, job.spec.seed, out, texts)

    if first or (disks is not None and pods.is_first_of_pod()):
        initial()
    _barrier()
    source = initial()
    families.check(job.spec.model.family_name, source)
    family = job.spec.model.family_facts
    h = job.spec.hyperparameters
    original = AutoProcessor.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    if h.max_pixels is not None or h.min_pixels is not None:
        if not family.pixels:
            raise UserError(
                "InternVL cuts pictures into tiles of one size; minPixels and maxPixels are for Qwen's models",
                field="spec.hyperparameters",
                hint="Leave both out, or choose the tiles in the model's preprocessor_config.json (max_patches).",
            )
        size = dict(processor.image_processor.size)
        processor.image_processor.size = {
            "shortest_edge": size["shortest_edge"] if h.min_pixels is None else h.min_pixels,
            "longest_edge": size["longest_edge"] if h.max_pixels is None else h.max_pixels,
        }
    use_matrix_product()
    attention.use()
    # always load float32 weights, because at these learning rates a step would not change a bfloat16 weight
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.float32, attn_implementation=attention.choose()
    )
    dtype = _DTYPES[h.dtype] if torch.cuda.is_available() else torch.float32
    if h.lora is not None:
        lora.add(model, h.lora, freeze_vision=h.freeze_vision)
    elif h.freeze_vision:
        families.freeze_vision(model)
    masters = to_bfloat16(model) if dtype == torch.bfloat16 and not arguments.fsdp else None
    fused = use_fused_kernels(model)
    use_pack_loss(model)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packs = _plan(job, model, processes, masters=masters is not None, fused=fused)
    recompute(model, packs.recomputed)
    # only rank 0 renames broken checkpoints
    checkpoint = checkpoints.newest(out / "checkpoints") if first else None
    _barrier()
    checkpoint = checkpoint or checkpoints.peek(out / "checkpoints")
    identity.refuse_steps_beyond(checkpoint, _total_steps(arguments, len(rows), processes))
    if checkpoint:
        require_safe(checkpoint.path)
        _refuse_other_kind(checkpoint, bool(arguments.fsdp))

    def furnish(folder: Path) -> None:
        """Add the files that a checkpoint needs for its export."""
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
        original.save_pretrained(folder)
        if h.lora is not None and not adapters.is_adapter(folder):  # for a sharded model, all weights are saved
            write_json(
                folder / adapters.CONFIG, adapters.config(adapters.Adapter({}, h.lora.rank, h.lora.alpha), source)
            )

    done = checkpoint.step if checkpoint else 0
    recorder = _Recorder(out, done, h.keep_checkpoints, log, furnish, stop, own_disks=disks is not None)
    guard = recorder.guard
    trainer = PackedTrainer(
        model=model,
        args=arguments,
        train_dataset=SftDataset(rows, processor),
        data_collator=PackingCollator(
            open_images(*data.images, *embedded_sources([data.sft_rows, *(path for _, path in data.sft_validation)])),
            processor,
            model.config.image_token_id,
            h.max_length,
            torch.float32 if masters is None else dtype,
            patch=family.patch if family.boxes == "resized" else None,
        ),
        callbacks=[guard, recorder],
        tokens=packs.tokens,
        rows=h.micro_batch_size if family.packs else 1,
        masters=masters,
        lora=h.lora,
        base=str(Path(source).resolve()),
    )
    if data.sft_validation:
        recorder.validate_on(_validation_sets(data, processor), job)
        if first:
            recorder.note_last_figures()
    recorder.watch(trainer, _flops_of_token(model, trained))
    start = f"resuming after step {checkpoint.step}" if checkpoint else "starting"
    print(f"sft: {len(rows)} rows, {parameters:,} parameters ({trained:,} trained), {start}", flush=True)  # noqa: T201
    kernels = "Liger's kernels" if fused else "transformers' kernels"
    print(f"sft: packs of {packs.tokens} tokens, {packs.recomputed} layers recomputed, {kernels}", flush=True)  # noqa: T201
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(packs, trainer.state.global_step + 1, error) from error
    if recorder.validation_owed or (stop.asked and trainer.state.global_step < trainer.state.max_steps):
        return 143
    if guard.skipped:
        print(f"sft: {guard.skipped} steps were skipped, because their gradients were not finite numbers", flush=True)  # noqa: T201
    if _any_rank(not all_finite(list(trainer.model.parameters()))):
        raise Failure(
            "the weights are not finite numbers",
            hint="Lower spec.hyperparameters.learningRate; the progress lines show the first such step.",
            file=out / "progress.jsonl",
        )
    weights = sft_shard.whole(trainer) if arguments.fsdp else None  # all ranks take part
    left_to_next = False
    if trainer.is_world_process_zero():
        last = checkpoints.peek(out / "checkpoints")
        chosen = checkpoints.chosen(out / "checkpoints", best_figure(job), last) if last is not None else None
        if chosen is not None and chosen != last:
            left_to_next = disks is not None and not disks.bring(chosen, stop)
            if not left_to_next:
                export(chosen.path, out / "model", Path(source), identity.facts(out))
        elif h.lora is not None:
            state = model.state_dict() if weights is None else weights
            adapter = lora.adapter_of(state, h.lora)
            with publish(out / "model", identity.facts(out)) as folder:
                write_merged(Path(source), adapter, folder, dtype)
                original.save_pretrained(folder)
        else:
            save_model(out, _finished(trainer, weights, dtype), original, identity.facts(out))
    return 143 if _any_rank(left_to_next) else 0  # the ranks wait here for rank 0


def _validation_sets(data: JobData, processor: Any) -> dict[str, SftDataset]:
    rows: dict[str, list[SftRow]] = {}
    for name, path in data.sft_validation:
        rows.setdefault(name, []).extend(load_rows(path))
    return {name: SftDataset(some, processor) for name, some in rows.items()}


def _flops_of_token(model: Any, trained: int) -> float:
    """Return the operations of a model for one token in training: two per weight in the forward pass, and two for each of the two gradients.

    With adapters, the gradients of the frozen weights are not computed.
    """
    if not any(p.requires_grad for p in model.lm_head.parameters()):
        language: int = sum(p.numel() for p in model.model.language_model.parameters())
        return 4.0 * language + 2.0 * trained
    return 6.0 * trained


def _plan(job: SftJob, model: Any, processes: int, *, masters: bool, fused: bool) -> Plan:
    """Choose how many tokens a pack has and which layers recompute their activations.

    Raises `UserError` if weights and optimizer do not fit into the GPU's memory.
    """
    h = job.spec.hyperparameters
    if not torch.cuda.is_available():  # a CPU has few cores and a small cache: use small packs
        tokens = 4096 if h.tokens_per_gpu is None else h.tokens_per_gpu
        return Plan(tokens, model.config.get_text_config().num_hidden_layers if h.gradient_checkpointing else 0)
    sizes = architecture.read(model.config.to_dict())
    assert sizes is not None, "families.check accepted a model without a family"
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = torch.cuda.get_device_properties(0).total_memory
    states = state_bytes(parameters, trained, processes, masters=masters)
    if states > total:
        raise UserError(
            f"weights, gradients and optimizer of {parameters:,} parameters take {states / 2**30:.0f} GiB on each GPU, "
            f"which has {total / 2**30:.0f} GiB",
            field="spec.resources",
            hint="Use more GPUs: weights, gradients and optimizer are distributed over them.",
        )
    number = 4 if h.dtype == "float32" else 2
    free = int(0.95 * total) - states
    return plan(sizes.text, free, h.tokens_per_gpu, h.gradient_checkpointing, fused=fused, number=number)


def _out_of_memory(packs: Plan, step: int, error: BaseException) -> UserError:
    """Return the user's error for a step that ran out of GPU memory, with the setting to change."""
    smaller = packs.tokens // 2 // 512 * 512
    if smaller >= SMALLEST:
        change = (
            f"Set spec.hyperparameters.tokensPerGpu to {smaller}, or gradientCheckpointing to true; or use more GPUs."
        )
    else:
        change = "Use more GPUs (spec.resources): weights, gradients and optimizer are distributed over them."
    return UserError(
        f"the GPU's memory ran out in step {step} with packs of {packs.tokens} tokens: {str(error).splitlines()[0]}",
        field="spec.hyperparameters.tokensPerGpu",
        hint=f"{change} The same command continues from the newest checkpoint.",
    )


def _total_steps(arguments: TrainingArguments, rows: int, processes: int) -> int:
    """Return the number of steps that the Trainer will execute."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = -(-rows // (int(arguments.per_device_train_batch_size) * processes))
    return math.ceil(
        float(arguments.num_train_epochs) * max(1, -(-batches // int(arguments.gradient_accumulation_steps)))
    )


def _finished(trainer: Any, weights: dict[str, torch.Tensor] | None, dtype: torch.dtype) -> Any:
    """Return the complete trained model in the job's dtype."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.to(dtype) if weights is None else assemble(model.config, weights, dtype)


def _one_storage(out: Path, first: bool) -> None:
    """Raise `UserError` on a node whose `out` is not rank 0's folder, because a resume needs the checkpoint files of all ranks in one folder."""
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
        hint = "Give the job an output in S3 (s3://), or on a claim that all nodes can mount (pvc://, ReadWriteMany)."
        raise UserError("the nodes of this job do not share their storage", field="spec.output", file=out, hint=hint)


def _refuse_other_kind(checkpoint: checkpoints.Checkpoint, sharded: bool) -> None:
    """Raise `UserError` if one process would have to continue a checkpoint of sharded ranks, or the other way round. The number of ranks may
    change.
    """
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


def save_model(out: Path, model: Any, processor: Any, facts: Mapping[str, Any] | None = None) -> None:
    """Write `out/model` durably, completely or not at all. `facts` are added to its manifest."""
    with publish(out / "model", facts) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def main(job: SftJob, data: JobData, model_source: str, out: Path) -> None:
    """Run `egm role sft`. On several GPUs or nodes, replace this process with torchrun, which starts the command again for each rank."""
    devices.require(job, model_source)
    command = torchrun.launcher(os.environ, torch.cuda.device_count(), sys.argv[1:])
    if command:
        os.execv(sys.executable, command)  # noqa: S606
    gpus = torch.cuda.device_count() * job.spec.resources.nodes
    model_source = uploads.local_model(model_source)
    if os.environ.get("LOCAL_RANK", "0") == "0" and not is_published(out / "model"):
        model_folder.require_trainable(model_source, job.spec.model.family_name)
    stop = Stop.of_process()
    uri = output_of(job, pods.number_of_pods())
    disks = OwnDisks(uri, every_file) if uri else None
    if rank_of(os.environ) == 0:
        who = identity.identify(job, data, model_source)
        with rank0.surrounded(job, out, gpus, stop, who, disks) as log:
            code = train(job, data, model_source, out, log, stop, disks, who)
    elif disks is not None and pods.is_first_of_pod():
        who = identity.identify(job, data, model_source)
        with uploading(out, disks) as uploader:
            code = train(job, data, model_source, out, stop=stop, disks=disks, who=who)
            if uploader is not None:
                patience_s = FINISHED_S if code == 0 else uploads.UPLOAD_SHARE * stop.left()
                uploader.await_marker(patience_s, lambda: is_late(stop))
    else:
        code = train(job, data, model_source, out, stop=stop, disks=disks)
    if code:
        sys.stderr.write("sft: stopped; a checkpoint was written, and the same command continues from it\n")
    raise SystemExit(code)
