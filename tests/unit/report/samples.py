"""Small evaluations for the tests of the report: pictures, rows, summaries. Used by tests/browser too."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from grounding.evaluate.sweep_models import Part, listing

FILES = ("refcoco_val", "refcoco+_testA", "refcocog_test")
NASTY = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"><svg onload=window.hacked=3>'


def png(width: int = 64, height: int = 48) -> bytes:
    """Return a white picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


def pictures(folder: Path, count: int = 7) -> Path:
    """Return a folder with the pictures of the evaluations below."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png())
    return folder


def evaluation(folder: Path, images: Path, hits: int, rows: int = 30, errors: int = 0, **changes: Any) -> Path:
    """Return an evaluation of `rows` questions on 7 pictures, of which `hits` in ten are right and the first `errors` failed.

    Row 4's expression and every text and error contain markup; if they are wrong, row 5 is unparsed and row 6
    truncated.
    """
    (folder / "results").mkdir(parents=True)
    lines = []
    for i in range(rows):
        failed = i < errors
        hit = i % 10 < hits and not failed
        outcome = (
            "error" if failed else "unparsed" if i == 5 and not hit else "truncated" if i == 6 and not hit else "ok"
        )
        row: dict[str, Any] = {
            "key": f"{folder.name}-{i}",
            "file": FILES[i % 3],
            "line": i + 1,
            "image": f"{i % 7}.png",
        }
        row |= {
            "sent": f"the red circle {i} {NASTY if i == 4 else ''}",
            "width": 64,
            "height": 48,
            "bbox": [4, 4, 20, 20],
        }
        row |= {"text": None if failed else f"{NASTY} [1, 2, 3, 4]", "error": f"HTTP 500 {NASTY}" if failed else None}
        row |= {
            "scaled_bbox": [4.0, 5.0, 20.0, 21.0] if outcome == "ok" else None,
            "outcome": outcome,
            "latency_s": 0.1,
        }
        row |= {"iou": None if failed else 0.9 if hit else 0.0 if outcome != "ok" else 0.3 if i % 2 else 0.05}
        row |= {"correct": hit, "completion_tokens": 10 + i, "model": "m", "prompt": "qwen3", "scoring": "egm-eval"}
        lines.append(orjson.dumps(row | changes))
    (folder / "results" / "part-0001.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    files = [
        {"name": n, "n": rows // 3, "acc": hits / 10, "mean_iou": 0.61, "acc75": 0.5, "acc90": 0.25} for n in FILES
    ]
    macro = None if errors else hits / 10
    summary: dict[str, Any] = {"total": rows, "done": rows - errors, "errors": errors, "unparsed": 0, "truncated": 0}
    summary |= {"macro": macro, "micro": macro, "ci95": {"macro": [0.31, 0.72], "micro": [0.3, 0.7]}, "files": files}
    summary |= {"requests_per_second": 12.5, "model": "m", "reason": f"{errors} requests failed" if errors else None}
    (folder / "summary.json").write_bytes(orjson.dumps(summary))
    config = {"images": [str(images)], "model": changes.get("model", "m"), "prompt": "qwen3", "scoring": "egm-eval"}
    (folder / "run_config.json").write_bytes(orjson.dumps(config))
    (folder / "state.json").write_bytes(b"{}")
    return folder


def run(folder: Path, images: Path) -> Path:
    """Return a run with an evaluation before and after a training."""
    evaluation(folder / "before", images, 4)
    evaluation(folder / "after", images, 7)
    train = folder / "rl"
    train.mkdir()
    (train / "state.json").write_bytes(b"{}")
    metrics = [{"score": s / 20, "valAccuracy": s / 15 if s % 5 == 0 else None} for s in range(11)]
    lines = [{"time": 1.0, "stage": "rl", "step": s, "totalSteps": 10, "metrics": m} for s, m in enumerate(metrics)]
    (train / "progress.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (folder / "run.json").write_bytes(orjson.dumps({"jobs": ["rl", "before", "after"]}))
    return folder


def sweep(folder: Path, images: Path, thinking: tuple[int, ...] = (0, 16)) -> Path:
    """Return a sweep of two settings: no thought and one answer, and 16 tokens of thought and four answers."""
    listed = []
    for number, hits in enumerate((4, 7)):
        name = ("think-0", "think-16_samples-4")[number]
        method: dict[str, int] = {"thinking_budget": thinking[number]} | ({"samples": 4} if number else {})
        own = evaluation(folder / "settings" / name, images, hits)
        summary = orjson.loads((own / "summary.json").read_bytes())
        summary["costs"] = {
            "questions": 30,
            "prompt_tokens": 71.0,
            "thought_tokens": 16.0 * 4 * number,
            "answer_tokens": 20.0 * (1 + 3 * number),
            "generated_tokens": 20.0 + 124.0 * number,
            "flops": 4e8 * (1 + number),
            "flops_formula": "by formula",
            "parameters": 6e5,
            "latency_mean": 0.2 + number,
            "latency_p50": 0.2 + number,
            "latency_p90": 0.3 + number,
            "latency_p99": 0.4 + number,
            "concurrency": 4,
            "serving_seconds": 10.0,
            "gpu_seconds": 0.0,
            "gpu_seconds_per_question": 0.0,
            "money": None,
            "currency": None,
        }
        if number:
            steps = [
                {"n": n}
                | {k: {"macro": v * (0.7 + 0.1 * n / 4)} for k, v in (("medoid", 1), ("mean", 0.98), ("first", 0.9))}
                for n in range(1, 5)
            ]
            for step in steps:
                step["oracle"] = {"macro": 0.7 + 0.05 * step["n"]}
            summary["samples"] = {"count": 4, "accuracy_at_1": 0.65, "by_number": steps}
        (own / "summary.json").write_bytes(orjson.dumps(summary))
        config = orjson.loads((own / "run_config.json").read_bytes()) | {"method": method}
        (own / "run_config.json").write_bytes(orjson.dumps(config))
        listed.append({"name": name, "folder": f"settings/{name}", "method": method})
    (folder / "sweep.json").write_bytes(orjson.dumps({"model": "m", "settings": listed}))
    return folder


def sweep_over_models(folder: Path, images: Path) -> Path:
    """Return the same sweep of two models; the larger one needs four times as many operations."""
    parts = [Part("small", "hf://x/small"), Part("large", "hf://x/large")]
    for number, part in enumerate(parts):
        for setting in (sweep(folder / part.folder, images) / "settings").iterdir():
            summary = orjson.loads((setting / "summary.json").read_bytes())
            summary["model"] = part.model
            summary["costs"]["flops"] *= 1 + 3 * number
            summary["costs"]["parameters"] *= 1 + 3 * number
            (setting / "summary.json").write_bytes(orjson.dumps(summary))
    (folder / "sweep.json").write_bytes(orjson.dumps(listing(parts)))
    return folder
