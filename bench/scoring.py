"""Compare the rows per second of the scoring profiles with those of a plain port of the same rules.

    python bench/scoring.py [--seconds 10] [--out bench/scoring.json]

The plain port below is a direct implementation of the rules that ignores speed: it tries every pattern on every text. Ours and the port run
alternately in short rounds in one process, so that a busy machine slows both. The result is the ratio of each pair of rounds. The answers of both
are compared first, because speed does not matter if the results are wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from grounding.scoring import egm_eval, egm_reward

Row = tuple[str, list[float], list[float], int, int]

# --- the plain port ---------------------------------------------------------------------------------------------------

N = r"[+-]?(?:\d*\.\d+|\d+)(?:[eE][+-]?\d+)?"
FOUR = r"\[\s*(" + N + r")\s*,\s*(" + N + r")\s*,\s*(" + N + r")\s*,\s*(" + N + r")\s*\]"


def plain_scale(box: list[float], w: int, h: int, clamp: bool) -> list[float]:
    if clamp:
        box = [min(max(v, 0.0), 1000.0) if math.isfinite(v) else 0.0 for v in box]
    size = [w, h, w, h]
    out = [max(0, min(round(v * s / 1000.0), s - 1)) for v, s in zip(box, size, strict=True)]
    for a, b, s in ((0, 2, w), (1, 3, h)):
        if out[a] == out[b] and s > 1:
            out[b] = min(out[a] + 1, s - 1)
    return [float(v) for v in out]


def plain_iou(a: list[float], b: list[float]) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])
    area_b = max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1])
    union = area_a + area_b - w * h
    return w * h / union if union > 0 else 0.0


def plain_eval(row: Row) -> tuple[list[float] | None, float]:
    text, bbox, _, w, h = row
    keyed = re.search(r'"bbox_2d"\s*:\s*' + FOUR, text)
    bare = re.search(FOUR, text)
    numbers = re.findall(N, text)
    if keyed:
        box = [float(v) for v in keyed.groups()]
    elif bare:
        box = [float(v) for v in bare.groups()]
    elif len(numbers) >= 4:
        box = [float(v) for v in numbers[-4:]]
    else:
        return None, 0.0
    scaled = plain_scale(box, w, h, clamp=True)
    return scaled, plain_iou(scaled, bbox)


def plain_find(text: str) -> list[float]:
    brackets = re.findall(r"\[([^\[\]]+)\]", text)
    numbers = re.findall(r"[-+]?\d*\.?\d+", brackets[-1] if brackets else text)
    numbers = numbers[:4] if brackets else numbers[-4:]
    if len(numbers) < 4:
        return []
    x1, y1, x2, y2 = (float(v) for v in numbers)
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def plain_reward(row: Row) -> float:
    text, _, truth, w, h = row
    answer = re.search(r"<answer>(.*?)</answer>", text, flags=re.DOTALL | re.IGNORECASE)
    box = (plain_find(answer.group(1)) if answer else []) or plain_find(text)
    if not box:
        return 0.0
    iou = plain_iou(plain_scale(box, w, h, clamp=False), plain_scale(truth, w, h, clamp=False))
    return 0.5 * (iou >= 0.5) + 0.5 * iou


# --- ours -------------------------------------------------------------------------------------------------------------


def our_eval(row: Row) -> tuple[list[float] | None, float]:
    scored = egm_eval.score_answer(row[0], row[1], row[3], row[4])
    return scored.scaled_bbox, scored.iou


def our_reward(row: Row) -> float:
    return egm_reward.reward(row[0], row[2], row[3], row[4])


# --- the answers ------------------------------------------------------------------------------------------------------

WORDS = ["the", "man", "in", "a", "red", "shirt", "stands", "left", "of", "2", "tables,", "near", "row", "3", "(about"]
WORDS += ["50%),", "behind", "it", "is", "an", "[old]", "chair"]


def rows(words: int, kind: str, count: int, seed: int = 7) -> list[Row]:
    """Return answers with about `words` words of reasoning. `kind`: `json` is the trained form, `bare` a list, `loop` a truncated repetition without
    a box."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        w, h = rng.choice([(640, 480), (480, 640), (500, 375)])
        x1, y1 = rng.randrange(0, 800), rng.randrange(0, 800)
        truth = [float(v) for v in (x1, y1, x1 + rng.randrange(20, 200), y1 + rng.randrange(20, 200))]
        box = [int(v) + rng.randrange(-20, 20) for v in truth]
        reasoning = " ".join(rng.choice(WORDS) for _ in range(words))
        tail = {
            "json": f'</think>\n\n```json\n[{{"bbox_2d": {box}, "label": "man"}}]\n```',
            "bare": f"</think>\n\n{box}",
            "loop": " so the box is x1=12 y1=" * 20,
        }[kind]
        pixels = [v * s / 1000 for v, s in zip(truth, (w, h, w, h), strict=True)]
        made.append((reasoning + tail, pixels, truth, w, h))
    return made


def rate(score: Callable[[Row], object], sample: list[Row]) -> float:
    """Return rows per second over one pass."""
    begin = time.perf_counter()
    for row in sample:
        score(row)
    return len(sample) / (time.perf_counter() - begin)


def compare(ours: Callable[[Row], object], plain: Callable[[Row], object], sample: list[Row], seconds: float) -> dict:
    for row in sample:
        if ours(row) != plain(row):
            sys.exit(f"results differ: {row!r}: {ours(row)} and {plain(row)}")
    mine, theirs, end = [], [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(mine) < 3:
        mine.append(rate(ours, sample))
        theirs.append(rate(plain, sample))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {
        "rows_per_second": round(statistics.median(mine)),
        "plain_rows_per_second": round(statistics.median(theirs)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "rounds": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="total time for all cases")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    kinds = [(40, "json"), (300, "json"), (300, "bare"), (1500, "json"), (1500, "loop")]
    result = {"python": platform.python_version(), "machine": platform.machine(), "cases": []}
    for words, kind in kinds:
        sample = rows(words, kind, 200)
        for profile, ours, plain in (("egm-eval", our_eval, plain_eval), ("egm-reward", our_reward, plain_reward)):
            case = {"profile": profile, "answer": kind, "characters": round(statistics.mean(len(r[0]) for r in sample))}
            result["cases"].append(case | compare(ours, plain, sample, args.seconds / len(kinds) / 2))
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
