"""Write results folders of the eight files' true size with invented answers, and measure the cost of their report.

    python bench/report/synthetic.py DIR [--rows 57457] [--images 9900] [--seed 1] [--report]

Writes DIR/a and DIR/b (two evaluations of the same questions) and real JPEGs of COCO's size in DIR/images: a few hundred distinct ones,
linked under as many names as there are images. With `--report`, builds the report and the comparison and prints seconds and bytes as JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import orjson
from PIL import Image, ImageDraw, ImageFilter

from grounding.boxes import iou as iou_of

FILES = {
    "refcoco_val": (10834, 1500),
    "refcoco_testA": (5657, 750),
    "refcoco_testB": (5095, 750),
    "refcoco+_val": (10758, 1500),
    "refcoco+_testA": (5726, 750),
    "refcoco+_testB": (4889, 750),
    "refcocog_val": (4896, 1300),
    "refcocog_test": (9602, 2600),
}
"""Numbers of expressions and images of each published file"""

COLOURS = {
    "red": (196, 52, 46),
    "green": (58, 140, 74),
    "blue": (52, 92, 180),
    "yellow": (226, 188, 62),
    "white": (236, 234, 226),
}
COLOURS |= {
    "black": (38, 38, 42),
    "orange": (224, 126, 44),
    "purple": (122, 76, 150),
    "pink": (224, 142, 168),
    "brown": (124, 86, 58),
}
FORMS = ("circle", "box", "triangle", "ring")
Thing = tuple[str, str, list[float]]
"""Colour, form, box in pixels"""


def picture(rng: random.Random, width: int, height: int) -> tuple[bytes, list[Thing]]:
    """Return a JPEG of some things on a noisy background, about as large as a photograph in COCO, and the list of the things."""
    ground = [
        Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height)) for _ in range(3)
    ]
    low = [rng.randint(60, 170) for _ in range(3)]
    image = Image.merge("RGB", [g.point(lambda v, k=k: k + v // 4) for g, k in zip(ground, low, strict=True)])
    draw, things = ImageDraw.Draw(image), []
    for _ in range(rng.randint(4, 7)):
        w, h = width * rng.uniform(0.12, 0.42), height * rng.uniform(0.15, 0.5)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        colour, form, box = rng.choice(list(COLOURS)), rng.choice(FORMS), [round(v, 2) for v in (x, y, x + w, y + h)]
        if form == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif form == "ring":
            draw.ellipse(box, outline=COLOURS[colour], width=int(min(w, h) / 5))
        elif form == "box":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(x, y + h), (x + w, y + h), (x + w / 2, y)], fill=COLOURS[colour])
        things.append((colour, form, box))
    grain = Image.effect_noise((width, height), 50).convert("RGB")
    out = io.BytesIO()
    Image.blend(image, grain, 0.16).filter(ImageFilter.GaussianBlur(0.6)).save(out, "JPEG", quality=93)
    return out.getvalue(), things


def expression(rng: random.Random, thing: Thing, width: int, long: bool) -> str:
    colour, form, (x1, _, x2, _) = thing
    side = "left" if x1 + x2 < width * 0.8 else "right" if x1 + x2 > width * 1.2 else "middle"
    form = {"box": "big box", "ring": "man with ring"}.get(form, form) if rng.random() < 0.3 else form
    if long:
        return f"the {colour} {form} that is on the {side} of the picture" + (
            ", next to the others" if rng.random() < 0.3 else ""
        )
    return rng.choice(
        (
            form,
            f"{colour} {form}",
            f"{form} {side}",
            f"{colour} {form} on the {side}",
            f"{side} {form}",
            f"second {form}",
        )
    )


def answered(rng: random.Random, row: dict[str, Any], others: list[list[float]], skill: float) -> dict[str, Any]:
    """Return an answer in the model's form: right, imprecise, on another object, without a box, truncated, or failed."""
    width, height, (x1, y1, x2, y2) = row["width"], row["height"], row["bbox"]
    luck = rng.random()
    near = 0.03 if luck < skill else 0.25
    other = luck >= skill + 0.04 and len(others) > 0
    x, y, u, v = rng.choice(others) if other else (x1, y1, x2, y2)
    dx, dy = (u - x) * near, (v - y) * near
    guess = [x + rng.gauss(0, dx), y + rng.gauss(0, dy), u + rng.gauss(0, dx), v + rng.gauss(0, dy)]
    guess = [min(max(v, 0.0), float(s)) for v, s in zip(guess, (width, height, width, height), strict=True)]
    tokens = int(rng.lognormvariate(4.6, 0.4) * (1 if near < 0.1 else 1.5))
    thought = f"The expression asks for {row['sent']}. " + "I compare the objects that fit, one after the other. " * (
        tokens // 14
    )
    box = [round(1000 * v / s) for v, s in zip(guess, (width, height, width, height), strict=True)]
    text = f'{thought}\n</think>\n\n```json\n[{{"bbox_2d": {box}, "label": "{row["sent"]}"}}]\n```'
    overlap = iou_of(guess, [x1, y1, x2, y2]) if guess[0] < guess[2] and guess[1] < guess[3] else 0.0
    made = {
        "text": text,
        "scaled_bbox": guess,
        "iou": overlap,
        "correct": overlap > 0.5,
        "outcome": "ok",
        "finish_reason": "stop",
    }
    if luck > 0.998:
        made |= {"text": thought, "scaled_bbox": None, "iou": 0.0, "correct": False, "outcome": "unparsed"}
    elif luck > 0.996:
        made |= {
            "text": thought * 3,
            "scaled_bbox": None,
            "iou": 0.0,
            "correct": False,
            "outcome": "truncated",
            "finish_reason": "length",
        }
    return made | {
        "prompt_tokens": 300,
        "completion_tokens": tokens,
        "latency_s": round(0.2 + tokens / 180, 4),
        "error": None,
    }


def write(folder: Path, rows: int, images: int, seed: int) -> tuple[Path, Path]:
    """Write two evaluations, `a` and `b`, of the same questions; return their folders."""
    rng = random.Random(seed)
    share, pool = rows / 57457, min(300, images)
    sizes = [rng.choice(((640, 480), (480, 640), (640, 427), (500, 375))) for _ in range(pool)]
    store = folder / "images"
    (store / "coco").mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    things: list[list[Thing]] = []
    for i in range(images):
        names.append(f"coco/COCO_train2014_{i:012d}.jpg")
        target = store / names[-1]
        if i < pool:
            data, found = picture(rng, *sizes[i])
            target.write_bytes(data)
            things.append(found)
        elif not target.exists():
            os.link(store / names[i % pool], target)
    questions: list[tuple[dict[str, Any], list[list[float]]]] = []
    start = 0
    for name, (n, of) in FILES.items():
        mine = [(start + k) % images for k in range(max(1, round(of * images / 9900)))]
        start += len(mine)
        total = max(1, round(n * share))
        for line in range(1, total + 1):
            number = mine[(line - 1) * len(mine) // total]
            (width, height), seen = sizes[number % pool], things[number % pool]
            thing = rng.choice(seen)
            row: dict[str, Any] = {"file": name, "line": line, "image": names[number]}
            row |= {
                "sent": expression(rng, thing, width, "cocog" in name),
                "width": width,
                "height": height,
                "bbox": thing[2],
            }
            questions.append((row, [other[2] for other in seen if other is not thing]))
    for side, skill, model in (("a", 0.9, "made-up-a"), ("b", 0.915, "made-up-b")):
        _evaluation(folder / side, questions, store, skill, model, seed)
    return folder / "a", folder / "b"


def _evaluation(
    out: Path,
    questions: list[tuple[dict[str, Any], list[list[float]]]],
    images: Path,
    skill: float,
    model: str,
    seed: int,
) -> None:
    from grounding.evaluate.results.reader import read_answers
    from grounding.evaluate.summary import interval
    from grounding.evaluate.summary_model import Summary

    (out / "results").mkdir(parents=True, exist_ok=True)
    common = {"model": model, "prompt": "qwen3", "scoring": "egm-eval"}
    with (out / "results" / "part-00000.jsonl").open("wb") as f:
        for i, (q, others) in enumerate(questions):
            # both sides use the same random number except for one row in eight, so most answers do not change
            rng = random.Random(f"{seed} {i} {skill if i % 8 == 0 else ''}")
            f.write(orjson.dumps({"key": f"{model}{i}"} | q | answered(rng, q, others, skill) | common) + b"\n")
    config = common | {"images": [str(images.absolute())], "mode": "throughput", "concurrency": 512}
    (out / "run_config.json").write_bytes(orjson.dumps(config))
    a = read_answers(out)
    files = []
    for k, name in enumerate(a.files):
        rows = a.file == k
        iou, latency = a.iou[rows], sorted(a.latency_s[rows].tolist())
        counts = {o: int((a.outcome[rows] == n).sum()) for n, o in ((2, "unparsed"), (3, "truncated"))}
        files.append(
            {"name": name, "n": int(rows.sum()), "total": int(rows.sum()), "acc": float(a.correct[rows].mean())}
            | counts
        )
        files[-1] |= {
            "acc75": float((iou > 0.75).mean()),
            "acc90": float((iou > 0.9).mean()),
            "mean_iou": float(iou.mean()),
        }
        files[-1] |= {"tokens_mean": float(a.tokens[rows].mean()), "latency_p50": latency[len(latency) // 2]}
        files[-1] |= {"latency_p90": latency[len(latency) * 9 // 10], "errors": 0}
    summary = common | {
        "total": len(a),
        "done": len(a),
        "errors": 0,
        "files": files,
        "reason": None,
        "mode": "throughput",
    }
    summary |= {"unparsed": sum(f["unparsed"] for f in files), "truncated": sum(f["truncated"] for f in files)}
    summary |= {"macro": sum(f["acc"] for f in files) / len(files), "micro": float(a.correct.mean())}
    summary |= {"ci95": interval(a.file, a.image, a.correct), "requests_per_second": 210.4, "wall_seconds": 273.0}
    (out / "summary.json").write_bytes(orjson.dumps(Summary.model_validate(summary).document()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=57457)
    parser.add_argument("--images", type=int, default=9900)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    a, b = write(arguments.folder, arguments.rows, arguments.images, arguments.seed)
    if not arguments.report:
        return
    from grounding.evaluate.compare import compare
    from grounding.evaluate.results.reader import read_answers
    from grounding.report import build, build_comparison

    figures: dict[str, Any] = {"rows": len(read_answers(b))}
    start = time.perf_counter()
    figures["report_bytes"] = build(b).stat().st_size
    figures["report_s"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    found = compare(read_answers(a), read_answers(b))
    figures["compare_s"], figures["flips"] = round(time.perf_counter() - start, 2), len(found.flips)
    figures["compare_page_bytes"] = build_comparison(found, arguments.folder / "compare.html").stat().st_size
    figures["compare_and_page_s"] = round(time.perf_counter() - start, 2)
    figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
