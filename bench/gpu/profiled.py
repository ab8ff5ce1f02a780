"""Run `egm` with torch's profiler around three optimizer steps of SFT.

    python bench/gpu/profiled.py FOLDER role sft --job ... --data ... --model ... --out ...

It writes to FOLDER: `profile.json` (wall time by phase, the 25 operations with the most CPU time and the 25 with the most GPU time),
`cpu.txt` and `gpu.txt` (the profiler's own tables). The steps before the profiled ones run without the profiler.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from grounding.train.sft import trainer

FIRST, LAST, TOP = 6, 9, 25
PHASES = {"get_batch_samples": "data", "training_step": "update", "_clip_grad_norm": "clip"}


class Profile(TrainerCallback):  # type: ignore[misc]
    """Profiles the steps after `FIRST` up to and including `LAST`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.profiler, self.began = folder, None, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == FIRST:
            _wait()
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            self.profiler = profile(activities=activities)
            self.profiler.start()
            self.began = time.monotonic()
        if state.global_step == LAST and self.profiler is not None:
            _wait()
            wall = time.monotonic() - self.began
            self.profiler.stop()
            write(self.folder, self.profiler.key_averages(), wall)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write(folder: Path, events: Any, wall: float) -> None:
    """Write the tables of a profile; `wall` is its wall time in seconds."""
    by_cpu = sorted(events, key=lambda e: -e.self_cpu_time_total)
    by_gpu = sorted(events, key=lambda e: -e.self_device_time_total)

    def rows(some: list[Any]) -> list[dict[str, Any]]:
        return [
            {
                "name": e.key[:120],
                "calls": e.count,
                "cpu_self_ms": round(e.self_cpu_time_total / 1e3, 1),
                "gpu_self_ms": round(e.self_device_time_total / 1e3, 1),
            }
            for e in some[:TOP]
        ]

    phases = {
        e.key.removeprefix("egm: "): round(e.cpu_time_total / 1e6, 3) for e in events if e.key.startswith("egm: ")
    }
    kernels = [e for e in events if str(e.device_type).endswith("CUDA") and not e.key.startswith("egm: ")]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    found = {
        "steps": LAST - FIRST,
        "wall_s": round(wall, 3),
        "gpu_busy_s": round(busy, 3),
        "phases_s": phases,
        "gpu": rows(by_gpu) if torch.cuda.is_available() else [],
        "cpu": rows(by_cpu),
    }
    (folder / "cpu.txt").write_text(events.table(sort_by="self_cpu_time_total", row_limit=TOP))
    if torch.cuda.is_available():
        (folder / "gpu.txt").write_text(events.table(sort_by="self_cuda_time_total", row_limit=TOP))
    (folder / "profile.json").write_text(json.dumps(found, indent=1) + "\n")


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"egm: {name}"):
            return function(*args, **kwargs)

    return named


def main() -> None:
    """Add the profiler and names of phases to the trainer, then run `egm` with the remaining arguments."""
    folder, kind = Path(sys.argv[1]), trainer.PackedTrainer
    folder.mkdir(parents=True, exist_ok=True)
    begin, optimize = kind.__init__, trainer.MasterAdamW.step

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        backward = self.accelerator.backward
        self.accelerator.backward = _named(backward, "backward")
        self.add_callback(Profile(folder))

    kind.__init__ = started
    for method, name in PHASES.items():
        setattr(kind, method, _named(getattr(kind, method), name))
    trainer.pack_loss = _named(trainer.pack_loss, "forward")
    trainer.MasterAdamW.step = _named(optimize, "optimizer")
    sys.argv = ["egm", *sys.argv[2:]]
    from grounding.cli import main as egm

    egm()


if __name__ == "__main__":
    main()
