"""Measure training at real size on the GPUs of one host: the product's own trainer on random weights of real shapes, and variants of its parts.

    python bench/gpu/train.py --size 4b --out DIR

`--size` is tiny (on a CPU, for a rehearsal), 2b, 4b or 8b. Each part runs in a separate process, so that its memory is free for the next one:
  kernel  the attention kernel against sdpa in float64, the patch embedding as a matrix product, the rate of a large matrix product
  loop    the product's packs, loss, masters and kernels in a loop, by variant (tokens and rows of a pack, kernels, recomputed layers)
  role    `egm role prepare` and `egm role sft` with the preset: progress lines, then three steps under torch's profiler (`profiled.py`)
  update  RL's update: the body of the model on packed rows of 700 tokens, by attention
  sharded `egm role sft` with the preset on `--gpus` GPUs of this host, with the model sharded over them: progress lines, memory of each GPU
  stopped one training of six steps on `--gpus` GPUs without a stop; beside it, the same is stopped by SIGTERM after two steps, refused with one
          GPU fewer if that is one, and continued: losses and final weights of both
Writes DIR/train.json and the profiler's tables. A rate is 6 x trained parameters x tokens / seconds, without recomputed activations and
attention.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import model as shapes
import torch
from profiled import FIRST

from grounding.data.images import open_images
from grounding.local.process import TOKEN
from grounding.models import attention, families
from grounding.models.fused import use_fused_kernels
from grounding.models.patch_embedding import use_matrix_product
from grounding.runtime import processes
from grounding.train.sft import trainer as sft
from grounding.train.sft.data import PackingCollator, SftDataset, load_rows
from grounding.train.sft.masters import MasterAdamW, to_bfloat16
from grounding.train.sft.packing import Batch, split

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES: dict[str, dict[str, Any]] = {
    "2b": {
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
        "vision_config": {"out_hidden_size": 2048},
    },
    "4b": {},
    "8b": {
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
    "tiny": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [1],
        },
    },
}


def say(**what: Any) -> dict[str, Any]:
    print(json.dumps(what), flush=True)
    return what


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def draw_picture(path: Path) -> None:
    """Write a JPEG of 640 x 480: noise and a red square."""
    from PIL import Image, ImageDraw

    picture = Image.effect_noise((640, 480), 80).convert("RGB")
    ImageDraw.Draw(picture).rectangle((50, 60, 300, 200), fill=(200, 30, 30))
    picture.save(path, quality=85)


def rows_of(folder: Path, number: int) -> None:
    """Draw rows, with one picture for every four rows and 30 to 80 words before the box."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    words = [
        "the",
        "red",
        "green",
        "blue",
        "yellow",
        "circle",
        "square",
        "triangle",
        "is",
        "that",
        "left",
        "right",
        "of",
        "and",
        "a",
    ]
    rows, name = [], ""
    for i in range(number):
        if i % 4 == 0:
            name = f"img/{i}.jpg"
            draw_picture(folder / name)
        reason = " ".join(draw.choice(words) for _ in range(draw.randint(30, 80)))
        answer = reason + '\n</think>\n\n```json\n[{"bbox_2d": [78, 125, 468, 416], "label": "the red square"}]\n```'
        ask = "<image>\nLocate the red square, output its bbox coordinates using JSON format."
        turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
        rows.append({"id": i, "image": name, "height": 480, "width": 640, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))


def folder_of(size: str, out: Path) -> Path:
    """Write configuration and processor of a model size, and return the folder."""
    if not (out / "config.json").exists():
        shapes.build(out)
        config = json.loads((out / "config.json").read_text())
        for key, value in SIZES[size].items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (out / "config.json").write_text(json.dumps(config))
    return out


def build(folder: Path) -> Any:
    """Create the model with random weights on the device, in bfloat16 on a GPU."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    config = AutoConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attention.choose())
    torch.set_default_dtype(torch.float32)
    families.freeze_vision(model)
    return model.train()


def save(model: Any, folder: Path) -> None:
    """Write the weights for the role unless they exist."""
    if not (folder / "model.safetensors").exists() and not (folder / "model.safetensors.index.json").exists():
        model.save_pretrained(folder, max_shard_size="5GB")


def batches_of(folder: Path, data: Path, rows: int, steps: int, processor: Any, token: int) -> list[Batch]:
    """Return the batches of some steps, on the device."""
    found = load_rows(data / "train.json")
    examples = SftDataset(found, processor)
    dtype = torch.bfloat16 if CUDA else torch.float32
    collate = PackingCollator(open_images(data), processor, token, 8192, dtype)
    made = []
    for step in range(steps):
        began = time.monotonic()
        batch = collate([examples[(step * rows + i) % len(found)] for i in range(rows)])["batch"]
        say(rows=rows, tokens=sum(batch.lengths), trained=batch.trained, collate_s=round(time.monotonic() - began, 2))
        made.append(batch.to(DEVICE))
    return made


def measured(
    model: Any, parameters: int, batches: list[Batch], tokens: int, repeat: int, optimizer: Any, rows: int | None = None
) -> dict[str, Any]:
    """Run optimizer steps; return the medians without the first two steps."""
    times: list[dict[str, float]] = []
    loss = torch.zeros(())
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for step in range(repeat):
        sync()
        began = time.monotonic()
        batch = batches[step % len(batches)]
        total = torch.zeros((), device=DEVICE)
        for place in split(batch.lengths, tokens, rows):
            pack = batch.part(place)
            loss = model(labels=pack.labels, items=float(batch.trained), **sft.model_inputs(pack))["loss"]
            loss.backward()
            total += loss.detach()
        sync()
        middle = time.monotonic()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        sync()
        times.append({"s": time.monotonic() - began, "update": middle - began, "loss": float(total)})
    warm = times[2:] or times
    seconds = statistics.median(t["s"] for t in warm)
    count = statistics.mean(sum(b.lengths) for b in batches)
    return {
        "tokens_step": count,
        "packs": len(split(batches[0].lengths, tokens, rows)),
        "s": round(seconds, 3),
        "optimizer_s": round(seconds - statistics.median(t["update"] for t in warm), 3),
        "tok_s": round(count / seconds),
        "tflops": round(6 * parameters * count / seconds / 1e12, 1),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if CUDA else 0.0,
        "loss": round(times[-1]["loss"], 4),
        "first_s": round(times[0]["s"], 2),
    }


def part_loop(size: str, work: Path, variants: list[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """Time the product's packs in a loop for each variant; a variant continues with the model that the previous one has changed."""
    from transformers import AutoProcessor

    folder = folder_of(size, work / f"model-{size}")
    data = work / "data"
    if not data.exists():
        rows_of(data, max(rows * 4, 64))
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 50176}
    model = build(folder)
    if not CUDA:
        use_matrix_product()
    save(model, folder)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(size=size, parameters=sum(p.numel() for p in model.parameters()), trained=parameters)
    batches = batches_of(folder, data, rows, 2, processor, model.config.image_token_id)
    masters = to_bfloat16(model)
    optimizer = MasterAdamW([{"params": list(masters)}], masters, lr=1e-5, fused=CUDA)
    sft.use_pack_loss(model)
    layers, results = model.model.language_model.layers, []
    for variant in variants:
        try:
            if variant.get("liger"):
                say(liger=use_fused_kernels(model))
            if variant.get("matrix"):
                use_matrix_product()
            sft.recompute(model, variant.get("recomputed", 0)) if variant.get("recomputed") else None
            if not variant.get("recomputed"):
                for layer in layers:
                    layer.gradient_checkpointing = False
            figures = measured(
                model, parameters, batches, variant["tokens"], variant.get("repeat", 5), optimizer, variant.get("rows")
            )
            results.append(say(**variant, **figures))
        except Exception as error:
            traceback.print_exc()
            results.append(say(**variant, failed=f"{type(error).__name__}: {str(error)[:300]}"))
            optimizer.zero_grad()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return results


def part_update(size: str, work: Path, tokens: int, liger: bool) -> list[dict[str, Any]]:
    """Time forward and backward passes of the model's body on packed rows of 700 tokens, as in `verl`'s update."""
    model = build(folder_of(size, work / f"model-{size}"))
    if liger:
        use_fused_kernels(model)
    body, length = model.model.language_model, min(700, tokens // 2)
    parameters = sum(p.numel() for p in body.parameters())
    number, results, seen = tokens // length, [], {}
    positions = torch.arange(length, device=DEVICE).repeat(number)[None].expand(4, 1, -1)
    ids = torch.randint(0, 1000, (1, number * length), device=DEVICE)
    for name, recomputed in ((attention.NAME, True), (attention.NAME, False), ("sdpa", True)):
        body.set_attn_implementation(name)
        body.gradient_checkpointing_enable(
            {"use_reentrant": False}
        ) if recomputed else body.gradient_checkpointing_disable()
        times = []
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(4):
                sync()
                began = time.monotonic()
                hidden = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
                hidden.float().pow(2).mean().backward()
                model.zero_grad(set_to_none=True)
                sync()
                times.append(time.monotonic() - began)
            seen[name] = hidden[0, :50, :8].detach().float()
            seconds, count = min(times[1:]), number * length
            figures = {"tok_s": round(count / seconds), "tflops": round(6 * parameters * count / seconds / 1e12, 1)}
            memory = round(torch.cuda.max_memory_allocated() / 1e9, 1) if CUDA else 0.0
            results.append(
                say(
                    attention=name,
                    recomputed=recomputed,
                    liger=liger,
                    tokens=count,
                    s=round(seconds, 3),
                    **figures,
                    memory_gb=memory,
                )
            )
        except Exception as error:
            results.append(
                say(attention=name, recomputed=recomputed, failed=f"{type(error).__name__}: {str(error)[:300]}")
            )
        hidden = None
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache() if CUDA else None
    if len(seen) == 2:
        results.append(say(largest_difference=float((seen[attention.NAME] - seen["sdpa"]).abs().max())))
    return results


def seconds_of(call: Callable[[], Any], repeat: int = 10) -> float:
    """Return the mean seconds of a call, after three warm-up calls."""
    for _ in range(3):
        call()
    sync()
    began = time.monotonic()
    for _ in range(repeat):
        call()
    sync()
    return (time.monotonic() - began) / repeat


def part_kernel() -> list[dict[str, Any]]:
    """Compare the kernel and its gradients with sdpa in float64, for grouped queries and two head widths; time two products."""
    dtype, side, patches = (torch.bfloat16, 8192, 12_544) if CUDA else (torch.float32, 256, 196)
    one, two = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    results = [say(product=side, tflops=round(2 * side**3 / seconds_of(lambda: one @ two) / 1e12, 1))]
    convolution = torch.nn.Conv3d(3, 1024, (2, 16, 16), (2, 16, 16), device=DEVICE, dtype=dtype)
    pixels = torch.randn(patches, 3, 2, 16, 16, device=DEVICE, dtype=dtype)
    flat, weight = pixels.reshape(patches, -1), convolution.weight.reshape(1024, -1)
    with torch.no_grad():
        apart = convolution(pixels).reshape(patches, -1) - torch.nn.functional.linear(flat, weight, convolution.bias)
        results.append(
            say(
                patches=patches,
                convolution_ms=round(1e3 * seconds_of(lambda: convolution(pixels)), 3),
                product_ms=round(
                    1e3 * seconds_of(lambda: torch.nn.functional.linear(flat, weight, convolution.bias)), 3
                ),
                largest_difference=float(apart.abs().max()),
            )
        )
    for heads, groups, width, causal in ((32, 8, 128, True), (16, 16, 72, False)):
        lengths = [1, 700, 33, 207, 512]
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE, dtype=torch.int32)
        rows = attention.Rows(ends, max(lengths))
        torch.manual_seed(1)
        shape = (sum(lengths), heads, width)
        exact = [
            torch.randn(s, device=DEVICE, dtype=torch.float64)
            for s in (shape, (shape[0], groups, width), (shape[0], groups, width), shape)
        ]
        errors = {}
        outs = []
        for dtype in (torch.float64, torch.bfloat16 if CUDA else torch.float32):
            q, k, v = (t.detach().to(dtype, copy=True).requires_grad_() for t in exact[:3])
            out = attention.attend(q, k, v, rows, scale=width**-0.5, causal=causal)
            (out * exact[3].to(dtype)).sum().backward()
            outs.append([t.double() for t in (out.detach(), q.grad, k.grad, v.grad)])
        for name, one, two in zip(("out", "dq", "dk", "dv"), *outs, strict=True):
            errors[name] = float((one - two).norm() / one.norm())
        results.append(say(kernel=attention.kernel(), heads=heads, groups=groups, width=width, relative_errors=errors))
    return results


def part_sharded(
    size: str, work: Path, changed: dict[str, Any], deadline: float, out_log: Path, gpus: int
) -> dict[str, Any]:
    """Run `egm role sft` on several GPUs; kill it before the last step, so that no large checkpoint is written.

    On a CPU, the ranks are processes (gloo), for a rehearsal. A GPU's peak memory is measured by nvidia-smi twice per second.
    """
    began = time.monotonic()
    hyperparameters = {"maxSteps": 12, **changed}
    job = prepared_job(size, work, hyperparameters, gpus)
    gc.collect()
    torch.cuda.empty_cache() if CUDA else None
    command = [*job.role, "sft", *job.where, "--model", str(job.model), "--out", str(job.out)]
    mark = uuid.uuid4().hex
    environment = {**job.environment, TOKEN: mark}
    if not CUDA:  # the role starts one rank per GPU, but there is none
        ranks = ["-m", "torch.distributed.run", f"--nproc-per-node={gpus}", "--master-addr=127.0.0.1"]
        command = [sys.executable, *ranks, *command[1:]]
        environment = {**environment, "EGM_SFT_SHARD": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    say(prepared_s=round(time.monotonic() - began, 1))
    began, progress, lines, peaks = time.monotonic(), job.out / "progress.jsonl", [], [0] * gpus
    first = None
    with (out_log / "sharded.log").open("wb") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    last = hyperparameters["maxSteps"] - 1
    while child.poll() is None and time.monotonic() - began < deadline and len(lines) < last:
        time.sleep(0.5)
        if CUDA:
            peaks = [max(pair) for pair in zip(peaks, used_mib(gpus), strict=True)]
        if progress.exists():
            lines = whole_lines(progress)
            first = first or (round(time.monotonic() - began, 1) if lines else None)
    if child.poll() is None:
        processes.kill(lambda: processes.marked(TOKEN, mark))
    code = child.wait()
    text = (out_log / "sharded.log").read_text()
    return say(
        size=size,
        gpus=gpus,
        changed=changed,
        steps=len(lines),
        first_step_s=first,
        exit=code,
        told=[line for line in text.splitlines() if line.startswith("sft:")],
        losses=[line["metrics"].get("loss") for line in lines],
        median=medians(lines[2:]),
        memory_peak_mib=peaks,
        **({} if lines else {"log": text[-3000:]}),
    )


def part_stopped(
    size: str, work: Path, changed: dict[str, Any], deadline: float, logs: Path, gpus: int
) -> dict[str, Any]:
    """Compare a training that is stopped by SIGTERM and continued with one that is not. Both have six steps and packs of a fixed size."""
    steps = 6
    hyperparameters = {"maxSteps": steps, "saveEvery": 100, "tokensPerGpu": 4096, "warmupSteps": 1, **changed}
    straight = prepared_job(size, work, hyperparameters, gpus)
    stopped = prepared_job(size, work, hyperparameters, gpus, name="stopped")
    fewer = prepared_job(size, work, hyperparameters, gpus - 1, name="fewer")
    gc.collect()
    torch.cuda.empty_cache() if CUDA else None
    until = time.monotonic() + deadline
    facts: dict[str, Any] = {"size": size, "gpus": gpus, "changed": changed}

    def begin(job: Prepared, out: Path, log: str) -> subprocess.Popen[bytes]:
        command = [*job.role, "sft", *job.where, "--model", str(job.model), "--out", str(out)]
        ranks = [
            sys.executable,
            "-m",
            "grounding.train.sft.torchrun",
            f"--nproc-per-node={gpus}",
            "--master-addr=127.0.0.1",
        ]
        environment = job.environment
        if not CUDA and job is not fewer:
            command = [*ranks, f"--master-port={29500 + len(log)}", *command[1:]]
            environment = {**environment, "EGM_SFT_SHARD": "1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        with (logs / f"{log}.log").open("wb") as sink:
            return subprocess.Popen(
                command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(child: subprocess.Popen[bytes]) -> int | str:
        try:
            return child.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return f"killed at the deadline ({child.wait()})"

    whole = begin(straight, straight.out, "straight")
    child, progress = begin(stopped, stopped.out, "stopped"), stopped.out / "progress.jsonl"
    while (
        child.poll() is None
        and time.monotonic() < until
        and not (progress.exists() and len(whole_lines(progress)) >= 2)
    ):
        time.sleep(0.05)
    began = time.monotonic()
    child.terminate()
    facts["stopped"] = {
        "exit": ended(child),
        "seconds": round(time.monotonic() - began, 1),
        "steps": len(whole_lines(progress)),
    }
    if gpus == 2:
        facts["one_gpu"] = {
            "exit": ended(begin(fewer, stopped.out, "fewer")),
            "said": (logs / "fewer.log").read_text()[-600:],
        }
    facts["continued"] = {"exit": ended(begin(stopped, stopped.out, "continued"))}
    facts["straight"] = {"exit": ended(whole)}
    for name, job in (("straight", straight), ("continued", stopped)):
        facts[name]["losses"] = [line["metrics"].get("loss") for line in whole_lines(job.out / "progress.jsonl")]
        if facts[name]["exit"]:
            facts[name]["log"] = (logs / f"{name}.log").read_text()[-2500:]
    facts["weights"] = apart(straight.out / "model", stopped.out / "model")
    return say(**facts)


def apart(one: Path, two: Path) -> dict[str, Any]:
    """Compare the weights of two models: how many tensors differ, and the largest difference relative to the tensor's largest value."""
    from safetensors import safe_open

    different, worst, number = 0, 0.0, 0
    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as a, safe_open(two / file.name, "pt") as b:
            for name in a.keys():  # noqa: SIM118
                x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
                gap = float((x - y).abs().max() / x.abs().max().clamp_min(1e-12))
                number, different, worst = number + 1, different + (gap > 0), max(worst, gap)
    return {"tensors": number, "different": different, "largest_relative_difference": worst}


def whole_lines(progress: Path) -> list[dict[str, Any]]:
    """Return the complete progress lines."""
    return [json.loads(line) for line in progress.read_text().splitlines() if line.endswith("}")]


def medians(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each metric over the progress lines."""
    warm = [line["metrics"] for line in lines]
    names = sorted({name for line in warm for name in line})
    return {n: round(statistics.median(line[n] for line in warm if line.get(n) is not None), 4) for n in names}


def used_mib(gpus: int) -> list[int]:
    """Return the memory in use on each GPU in MiB."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return [int(word) for word in said[:gpus]] if len(said) >= gpus else [0] * gpus


@dataclass(frozen=True)
class Prepared:
    """A job with prepared data and a written model. `role` and `where` are the first arguments of a role's command."""

    role: list[str]
    where: list[str]
    model: Path
    out: Path
    environment: dict[str, str]


def prepared_job(size: str, work: Path, changed: dict[str, Any], gpus: int, name: str = "out") -> Prepared:
    """Write model, rows and job file, and run `egm role prepare`."""
    folder, data, out = folder_of(size, work / f"model-{size}"), work / "data", work / f"{name}-{time.time():.0f}"
    if not list(folder.glob("model*.safetensors")):
        model = build(folder)
        save(model, folder)
        del model
        gc.collect()
        torch.cuda.empty_cache() if CUDA else None
    if not data.exists():
        rows_of(data, 512)
    spec = {
        "preset": "egm-8b-sft" if size == "8b" else "egm-4b-sft",
        "model": {"source": str(folder)},
        "data": {"train": [str(data / "train.json")], "images": [str(data)]},
        "resources": {"nodes": 1, "gpusPerNode": gpus},
        "hyperparameters": {"maxSteps": 50, "saveEvery": 10000, **changed},
    }
    out.mkdir(parents=True)
    (out / "job.json").write_text(json.dumps({**JOB, "spec": spec}))
    role = [sys.executable, "-m", "grounding.cli", "role"]
    where = ["--job", str(out / "job.json"), "--data", str(out / "data")]
    # a job for GPUs only runs on a CPU if GPUs are hidden from it
    environment = {**os.environ, **({} if CUDA else {"CUDA_VISIBLE_DEVICES": "-1"})}
    subprocess.run([*role, "prepare", *where], check=True, env=environment)
    return Prepared(role, where, folder, out, environment)


JOB = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingTrainJob", "metadata": {"name": "bench"}}


def part_role(size: str, work: Path, changed: dict[str, Any], deadline: float, tables: Path) -> dict[str, Any]:
    """Run the roles like a job; kill them after the last step, so that no large checkpoint is written."""
    job = prepared_job(size, work, changed, 1)
    began = time.monotonic()
    with (job.out / "log").open("wb") as log:
        program = [sys.executable, str(Path(__file__).parent / "profiled.py"), str(job.out / "profile"), "role", "sft"]
        command = [*program, *job.where, "--model", str(job.model), "--out", str(job.out)]
        child = subprocess.Popen(
            command, env=job.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    progress, profile, lines, first = job.out / "progress.jsonl", job.out / "profile" / "profile.json", [], None
    while child.poll() is None and time.monotonic() - began < deadline and not profile.exists():
        time.sleep(0.2)
        if progress.exists():
            lines = whole_lines(progress)
            first = first or (time.monotonic() - began if lines else None)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    text = (job.out / "log").read_text()
    told = [line for line in text.splitlines() if line.startswith("sft:")]
    result = {
        "size": size,
        "changed": changed,
        "steps": len(lines),
        "first_step_s": first and round(first, 1),
        "exit": code,
        "told": told,
        "median": medians(lines[2:FIRST]),
    }
    if profile.exists():
        result["profile"] = json.loads(profile.read_text())
        for table in (job.out / "profile").glob("*.txt"):
            shutil.copy(table, tables / table.name)
    else:
        result["log"] = text[-2500:]
    return say(**result)


VARIANTS = [
    {"tokens": 11000, "liger": True},
    {"tokens": 16384, "recomputed": 36, "liger": True},
    {"tokens": 16384, "recomputed": 36, "rows": 8, "liger": True},
    {"tokens": 11000, "matrix": True, "liger": True},
]
"""Packs as in the role, with all layers recomputed, and also of at most 8 rows; patches as a matrix product"""


def part(name: str, a: argparse.Namespace) -> Any:
    """Run one part."""
    attention.use()
    if name == "kernel":
        return part_kernel()
    if name == "loop":
        return part_loop(a.size, a.work, json.loads(a.variants) if a.variants else VARIANTS, a.rows)
    if name == "update":
        return [result for liger in (False, True) for result in part_update(a.size, a.work, a.update_tokens, liger)]
    if name == "sharded":
        return part_sharded(a.size, a.work, json.loads(a.set), a.deadline, a.out, a.gpus)
    if name == "stopped":
        return part_stopped(a.size, a.work, json.loads(a.set), a.deadline, a.out, a.gpus)
    return part_role(a.size, a.work, json.loads(a.set), a.deadline, a.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="4b")
    parser.add_argument("--parts", default="kernel,loop,role")
    parser.add_argument("--variants", help="JSON list: tokens, rows, recomputed, liger, matrix, repeat.")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--gpus", type=int, default=2, help="GPUs of the parts `sharded` and `stopped`.")
    parser.add_argument("--set", default="{}", help="JSON: further hyperparameters of the role's job.")
    parser.add_argument("--update-tokens", type=int, default=25_200)
    parser.add_argument("--deadline", type=float, default=150.0, help="Seconds that a part may take.")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-train"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.part:
        (a.out / f"part-{a.part}.json").write_text(json.dumps(part(a.part, a)))
        return 0
    name = torch.cuda.get_device_name() if CUDA else "no GPU"
    report: dict[str, Any] = {
        "machine": f"{name}; {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}",
        "size": a.size,
    }
    for name in a.parts.split(","):
        began = time.monotonic()
        child = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--part", name], start_new_session=True)
        try:
            code: int | str = child.wait(a.deadline + 30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            code = f"killed after {a.deadline + 30:.0f} s"
        found = a.out / f"part-{name}.json"
        report[name] = json.loads(found.read_text()) if found.exists() else {"failed": code}
        found.unlink(missing_ok=True)
        report.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        (a.out / "train.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
