"""Small evaluations for the tests of the report: pictures, rows, summaries. Used by tests/browser too."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

FILES = ("refcoco_val", "refcoco+_testA", "refcocog_test")
NASTY = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2"><svg onload=window.hacked=3>'


def png(width: int = 64, height: int = 48) -> bytes:
    """A white picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


def pictures(folder: Path, count: int = 7) -> Path:
    """A folder of pictures that the evaluations below are about."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png())
    return folder


def evaluation(folder: Path, images: Path, hits: int, rows: int = 30, errors: int = 0, **changes: Any) -> Path:
    """An evaluation of `rows` questions on 7 pictures, of which `hits` in ten are right and the first `errors` failed.

    Row 4's expression and every text and error hold markup; row 5 is unparsed, row 6 truncated where they are wrong.
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
    """A run: an evaluation before and one after a training."""
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
