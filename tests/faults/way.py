"""A whole job without a model: train -> checkpoint -> upload -> restore -> model -> evaluate -> results.

Every write uses the product's own modules; only the arithmetic of a step is replaced by a hash. `attempt` is one
process of the job on one node, and `look` returns what a reader finds at the end.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson

from grounding.evaluate import ownership
from grounding.evaluate.engines import Sampling
from grounding.evaluate.reply import Reply
from grounding.evaluate.results.parquet import write_parquet
from grounding.evaluate.results.replica import Remote
from grounding.evaluate.results.writer import Results, read_rows, score_row
from grounding.evaluate.summary import summarise
from grounding.evaluate.worklist import read_worklist, settings_digest
from grounding.failpoints import failpoint
from grounding.files import atomic_write, damaged, is_published, publish, read_json, sha256_of, write_json
from grounding.models.content import content_of
from grounding.progress import ProgressWriter, read_progress
from grounding.scoring import get_profile
from grounding.storage import open_store, send
from grounding.train import identity
from grounding.train.checkpoints import local as checkpoints
from grounding.train.checkpoints import upload as uploads

STEPS, EVERY, KEEP, ROWS = 6, 2, 2, 5
WHO = identity.Identity({"seed": 1, "hyperparameters.maxSteps": STEPS}, "model", "data")


def _step(weights: bytes) -> bytes:
    return b"".join(hashlib.sha256(weights[i : i + 32] + bytes([i // 32])).digest() for i in range(0, len(weights), 32))


def attempt(out: Path, uri: str) -> None:
    """Run the job to its end from whatever earlier attempts have left in `out` and in the store `uri`, a folder or S3."""
    store = open_store(uri)
    with identity.locked(out):
        identity.enter(out, WHO)
        uploads._enter(store, WHO)
        if not (out / uploads.PROGRESS).exists() and store.find(uploads.PROGRESS) is not None:
            store.download(uploads.PROGRESS, out / uploads.PROGRESS)
        uploads.restore(store, out / "checkpoints")
        if not is_published(out / "model"):
            _train(out, store)
        send(out / "model", store.uri + "/model", last="egm-manifest.json")
        _evaluate(out, uri)


def _train(out: Path, store: Any) -> None:
    newest = checkpoints.newest(out / "checkpoints")
    done, weights = 0, bytes(4096)
    if newest is not None:
        done, weights = newest.step, (newest.path / "model.safetensors").read_bytes()
    writer = ProgressWriter(out / uploads.PROGRESS, "sft", STEPS, done)
    for step in range(done + 1, STEPS + 1):
        weights = _step(weights)
        writer.step(step, {"loss": float(weights[0])})
        if step % EVERY == 0:
            folder = out / "checkpoints" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
                (folder / name).write_bytes(weights if name == "model.safetensors" else weights[:1000])
                failpoint("save.file", name)
            writer.sync()
            checkpoints.mark_complete(folder)
            checkpoints.keep_newest(out / "checkpoints", KEEP)
            failpoint("save.pruned", folder.name)
            store.upload(out / uploads.PROGRESS, uploads.PROGRESS)
            made = checkpoints.peek(out / "checkpoints")
            assert made is not None
            uploads.push(store, made)
            uploads.prune(store, KEEP)
    writer.close()
    with publish(out / "model", identity.facts(out)) as folder:
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_text("{}")


def _files(out: Path) -> list[Path]:
    """Write the evaluation's input, a file of `ROWS` expressions, and return it."""
    file = out / "refcoco_val.jsonl"
    if not file.exists():
        lines = [
            orjson.dumps(
                {"image": f"{i}.png", "sent": f"thing {i}", "bbox": [10, 10, 60, 60], "width": 100, "height": 100}
            )
            for i in range(ROWS)
        ]
        with atomic_write(file) as f:
            f.write(b"\n".join(lines) + b"\n")
    return [file]


def _evaluate(out: Path, uri: str) -> None:
    """Evaluate with answers that are a hash of the weights. The product's own code writes rows, copy, table and summary."""
    weights, results, remote = (out / "model" / "model.safetensors").read_bytes(), out / "eval", f"{uri}/eval"
    ownership.enter(results, remote, ownership.Owner({"model": "m"}, content_of(str(out / "model"))))
    settings, profile = settings_digest("m", "qwen3", Sampling()), get_profile("egm")
    work = read_worklist(_files(out), settings)
    with Results(results, work, profile.name, Remote(results, remote)) as rows:
        for number in map(int, rows.done.pending(retry_errors=True)):
            box = [b % 99 for b in hashlib.sha256(weights + bytes([number])).digest()[:4]]
            text = str([*(min(box[i], box[i + 2]) for i in (0, 1)), *(max(box[i], box[i + 2]) + 1 for i in (0, 1))])
            expression = work.expression(number)
            rows.add(number, score_row(work.key(number), expression, Reply(text, "stop"), "m", "qwen3", profile, ""))
            if number % 2:
                rows.roll()
                rows.replicate()
        write_json(results / "summary.json", summarise(work, rows.done, scoring=profile.name).document())
        rows.roll()
        write_parquet(results, work)
        rows.replicate(patient=True)


def look(out: Path, uri: str, copy: Path) -> dict[str, Any]:
    """Return what a reader finds: weights, curve and table, here and in the store, which is downloaded to `copy`.

    Raises an error for damaged files.
    """
    store = open_store(uri)
    for entry in store.entries():
        if entry.name.startswith(("model/", "eval/")):
            store.download(entry.name, copy / entry.name)
    assert not damaged(out / "model") and not damaged(copy / "model")
    curve = [(line["step"], line["metrics"]) for line in read_progress(out / uploads.PROGRESS)]
    weights, sent = (sha256_of(place / "model" / "model.safetensors") for place in (out, copy))
    here, there = (read_json(place / "eval" / "summary.json") for place in (out, copy))
    assert here == there and here["done"] == here["total"] == ROWS
    answers = [{row["key"]: row["text"] for row in read_rows(place / "eval")} for place in (out, copy)]
    assert answers[0] == answers[1]
    assert (out / "eval" / "results.parquet").read_bytes() == (copy / "eval" / "results.parquet").read_bytes()
    return {"weights": weights, "sent": sent, "curve": curve, "table": here["files"], "answers": answers[0]}
