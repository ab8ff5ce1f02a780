"""transformers' Trainer over packs: a batch contains a rank's rows of one optimizer step, divided into packs without padding.

The loss of a step is the mean over its trained tokens in all packs and on all ranks, so it depends neither on the packing of rows nor on the
number of GPUs.
"""

from __future__ import annotations

import atexit
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from grounding.api.hyperparameters import Lora
from grounding.errors import Failure
from grounding.failpoints import failpoint
from grounding.files import make_folder
from grounding.jsontypes import JsonObject
from grounding.models.attention import Rows
from grounding.models.losses import linear_cross_entropy, linear_figures
from grounding.train import schedule
from grounding.train.checkpoints import adapter
from grounding.train.checkpoints import local as checkpoints
from grounding.train.lora import adapter_of, load_adapter
from grounding.train.sft.data import Share, raise_error
from grounding.train.sft.masters import MasterAdamW
from grounding.train.sft.packing import IGNORE, Batch, split


def pack_loss(
    self: Any, labels: torch.Tensor | None = None, items: torch.Tensor | float = 1.0, **inputs: Any
) -> dict[str, torch.Tensor]:
    """Replace a model's `forward`: return the cross entropy of a pack's trained tokens, divided by `items`, without storing all logits.

    In evaluation mode, return the sum of the cross entropy and the number of correctly predicted tokens.
    """
    hidden = self.model(**inputs, use_cache=False)[0]
    width = hidden.shape[-1]
    flat, wanted = hidden.reshape(-1, width), (labels if labels is not None else hidden.new_empty(0)).reshape(-1)
    trained = (wanted != IGNORE).nonzero().reshape(-1)
    if not self.training:
        loss, right = self.lm_head(flat[trained], wanted[trained])
        return {"loss": loss, "right": right}
    return {"loss": self.lm_head(flat[trained], wanted[trained]) / items}


def head_loss(
    self: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Replace the output matrix's `forward`: return the sum of the cross entropy of `hidden` (tokens, width) in float32.

    In evaluation mode, also return the number of correctly predicted tokens.
    """
    if not self.training:
        return linear_figures(hidden, self.weight, targets)
    return linear_cross_entropy(hidden, self.weight, targets)


def use_pack_loss(model: Any) -> None:
    """Make `model(**model_inputs(pack))` return the loss of a pack.

    FSDP's hooks on the model and on its output matrix stay in place. The matrix may be a separate unit, whose weight is complete only within
    its own `forward`.
    """
    model.forward = MethodType(pack_loss, model)
    model.lm_head.forward = MethodType(head_loss, model.lm_head)


def recompute(model: Any, layers: int) -> None:
    """Make the first `layers` layers of the language model recompute their activations in the backward pass."""
    if not layers:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inner = model.model.language_model
    for number, layer in enumerate(inner.layers):
        layer.gradient_checkpointing = number < layers


def model_inputs(pack: Batch) -> JsonObject:
    """Return the model's inputs for a pack. Qwen3-VL's layers get the boundaries of rows; other models find them in the positions."""
    if pack.grids is None:
        return {"input_ids": pack.input_ids[None], "position_ids": pack.position_ids, "pixel_values": pack.pixel_values}
    ends = torch.tensor([0, *accumulate(pack.lengths)], dtype=torch.int32).to(pack.input_ids.device, non_blocking=True)
    return {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position_ids[:, None],
        "pixel_values": pack.pixel_values,
        "image_grid_thw": pack.grids,
        "rows": Rows(ends, max(pack.lengths)),
    }


@dataclass
class Measured:
    """Measurements of the current optimizer step. `tokens`: tokens of all ranks."""

    began: float = field(default_factory=time.monotonic)
    tokens: int = 0
    packs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    ended: float = 0.0
    """Time at which the step itself ended, if a validation ran before it was logged; else 0"""

    def end(self) -> None:
        """Record the end of the step, because a validation begins."""
        self.ended = time.monotonic()

    def add(self, phase: str, since: float) -> float:
        """Add the time from `since` until now to a phase, and return now. On a GPU, wait first until the queued work is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - since
        return now


def _begin_loading(begin: Callable[[int], None] | None, number: int) -> None:
    """Make a loader's process ignore the signals that ask the trainer to stop, because the trainer needs rows to finish its step.

    Ctrl-C on a terminal and `systemctl stop` signal every process of a group. If a trainer fails, `_end_loaders` ends its loaders.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    if begin:
        begin(number)


def _end_loaders() -> None:
    """Kill data loaders that still run when the trainer ends. Python would send SIGTERM, which they ignore, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch treats the end of a loader as a failure
    for child in multiprocessing.active_children():
        child.kill()


class PackedTrainer(Trainer):  # type: ignore[misc]
    """The Trainer over packs.

    `tokens` and `rows` limit a pack. `masters`: the float32 values of a bfloat16 model's weights. `lora`: description of the adapters of a
    model that has them. `base`: the folder from which the model was loaded.
    """

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        tokens: int,
        rows: int | None = None,
        masters: dict[torch.nn.Parameter, torch.Tensor] | None = None,
        lora: Lora | None = None,
        base: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pack_tokens, self.pack_rows, self.masters = tokens, rows, masters
        self.lora, self.base = lora, base
        self.measured = Measured()

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        base = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        atexit.register(_end_loaders)  # registered after multiprocessing's handler, so that it runs before it
        base.worker_init_fn = partial(_begin_loading, base.worker_init_fn)
        # a loader draws a random number whenever it starts new processes, which a resumed run does at other steps. With the training's
        # generator, this would change the dropout that follows
        base.generator = torch.Generator()
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.measured = Measured()
        batches, items = super().get_batch_samples(*args, **kwargs)
        raise_error(batches)
        self.measured.add("secondsData", self.measured.began)
        return batches, items

    def create_optimizer(self, model: Any = None) -> Any:
        if self.masters is None:
            return super().create_optimizer(model)
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = [
                {
                    "params": [
                        p for n, p in self.model.named_parameters() if p.requires_grad and (n in decayed) == decay
                    ],
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for decay in (True, False)
            ]
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if kind is not torch.optim.AdamW:
                raise TypeError(f"masters are for AdamW, not for {kind.__name__}")
            self.optimizer = MasterAdamW(groups, self.masters, **settings)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states, then apply the job's own learning rate and schedule, because the states restore the old ones."""
        rates = schedule.base_rates(self.lr_scheduler) if checkpoint and self.lr_scheduler else []
        super()._load_optimizer_and_scheduler(checkpoint)
        own = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if checkpoint and isinstance(own, MasterAdamW) and not own.restored:
            # a checkpoint of release 0.1.0 has float32 weights and no masters; the loaded model has kept 8 of their 24 bits
            whole = type(self.model).from_pretrained(checkpoint, dtype=torch.float32)
            names = {weight: name for name, weight in self.model.named_parameters()}
            values = dict(whole.named_parameters())
            own.begin_at([values[names[weight]] for weight in own.weights])
        if rates:
            for old, new in schedule.reapply(self.lr_scheduler, rates):
                print(f"sft: the learning rate of the next step is {new:g}; the checkpoint had {old:g}", flush=True)  # noqa: T201

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save like transformers if there is space. Delete an incomplete checkpoint on a full disk at once."""
        root = Path(self.args.output_dir)
        folder = root / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            make_folder(root)
            checkpoints.require_room(root, self._bytes_of_checkpoint(root))
        failpoint("checkpoint.save", folder.name)
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            if (
                "No space left" in str(error)
                or "file write failed" in str(error)
                or "PytorchStreamWriter" in str(error)
            ):
                hint = "Free some space; the same command continues from the newest checkpoint."
                raise Failure("no space is left on the disk for a checkpoint", hint=hint, file=folder) from error
            raise

    def _save(self, output_dir: str | None = None, state_dict: JsonObject | None = None) -> None:
        """Save the weights like transformers; with adapters, only the adapters."""
        if self.lora is None or output_dir is None:
            super()._save(output_dir, state_dict)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        adapter.write(adapter_of(self.model.state_dict(), self.lora), Path(output_dir), self.base)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint; with adapters, only the adapters."""
        folder = Path(resume_from_checkpoint)
        if self.lora is None or not adapter.is_adapter(folder) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_adapter(self.model, adapter.read(folder))

    def _bytes_of_checkpoint(self, root: Path) -> int:
        """Return the size of the next checkpoint in bytes: that of the newest one, or of the weights, their float32 values and two moments."""
        newest = checkpoints.peek(root)
        if newest is not None:
            return int(checkpoints.size_of(newest.path))
        parameters = list(self.model.parameters())
        saved = parameters if self.lora is None else [p for p in parameters if p.requires_grad]
        weights = int(sum(p.element_size() * p.numel() for p in saved))
        states = 8 if self.masters is None else 12
        return weights + int(sum(states * p.numel() for p in parameters if p.requires_grad))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch unless no step is left. transformers would run an extra epoch after a resume from the last step, within an epoch."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: JsonObject, num_items_in_batch: Any = None) -> torch.Tensor:
        since = time.monotonic()
        model.train()
        batch: Batch = inputs["batch"].to(self.args.device)
        ranks = self.accelerator.num_processes
        packs = split(batch.lengths, self.pack_tokens, self.pack_rows)
        trained = batch.trained
        self.measured.tokens, number = sum(batch.lengths), len(packs)
        # with a sharded model, all ranks must compute the same number of packs; the loss is divided by the tokens of all ranks
        if ranks > 1:
            counted = torch.tensor([trained, len(packs), self.measured.tokens], device=self.args.device)
            all_ranks = self.accelerator.gather(counted[None])
            trained, number = int(all_ranks[:, 0].sum()), int(all_ranks[:, 1].max())
            self.measured.tokens = int(all_ranks[:, 2].sum())
            packs = split(batch.lengths, self.pack_tokens, self.pack_rows, at_least=number)
        self.measured.packs = number
        total = torch.zeros((), device=self.args.device)
        for place in packs:
            pack = batch.part(place)
            with self.compute_loss_context_manager():
                loss = model(labels=pack.labels, items=trained / ranks, **model_inputs(pack))["loss"]
            self.accelerator.backward(loss)
            total += loss.detach()
        self.state.num_input_tokens_seen += self.measured.tokens
        self.measured.add("secondsUpdate", since)
        return total

    def figures_of(
        self, rows: Dataset[Any], stopping: Callable[[], bool] = lambda: False
    ) -> tuple[float, float] | None:
        """Return the mean cross entropy of the answers' tokens over all rows, and the share of correctly predicted tokens.

        All ranks must call it, each with its share of the rows. `stopping` must return the same value on all ranks; if it is true, return None.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        size, number = int(self.args.per_device_train_batch_size), len(rows)
        # every rank gets the same number of batches and rows, because a sharded model needs all ranks for every pack
        mine = [index if index < number else None for index in range(rank, -(-number // ranks) * ranks, ranks)]
        loader = DataLoader(
            Share(rows, mine),
            batch_size=size,
            collate_fn=self.data_collator,
            num_workers=0 if self.args.use_cpu else self.args.dataloader_num_workers,
            worker_init_fn=partial(_begin_loading, None),
            generator=torch.Generator(),  # so that the training's random numbers do not change
        )
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        was = self.model_wrapped.training
        self.model_wrapped.eval()
        try:
            for place, inputs in enumerate(loader):
                if stopping():
                    return None
                raise_error([inputs])
                absent = [n for n, index in enumerate(mine[place * size : (place + 1) * size]) if index is None]
                sums += self._batch_figures(inputs["batch"].without(absent).to(self.args.device))
        finally:
            self.model_wrapped.train(was)
        if ranks > 1:
            sums = self.accelerator.reduce(sums, "sum")
        loss, right, tokens = sums.tolist()
        return loss / max(1.0, tokens), right / max(1.0, tokens)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _batch_figures(self, batch: Batch) -> torch.Tensor:
        number = len(split(batch.lengths, self.pack_tokens, self.pack_rows))
        if self.accelerator.num_processes > 1:
            number = int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).max())
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for place in split(batch.lengths, self.pack_tokens, self.pack_rows, at_least=number):
            pack = batch.part(place)
            with self.compute_loss_context_manager():
                found = self.model_wrapped(labels=pack.labels, **model_inputs(pack))
            trained = (pack.labels != IGNORE).sum()
            sums += torch.stack([found["loss"].double(), found["right"].double(), trained.double()])
        return sums

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Do nothing, because `training_step` counts the tokens."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, because the Trainer would count padded batches."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.masters is None:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self._master_list(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.masters is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        return torch.nn.utils.get_total_norm([m.grad for m in self._master_list() if m.grad is not None])

    def _master_list(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
