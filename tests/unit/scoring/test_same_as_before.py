"""The scores of 12,000 answers stay the same bit for bit, and rewards to 9 digits.

The answers are drawn here from a fixed seed, without the project's code. `EXPECTED` are SHA-256 digests of all results,
computed at commit 862afb1, except the last one, which was computed later, with rounded scores. Change a digest only if
you change a profile on purpose, and then change its name, too.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from grounding.scoring import egm_reward, get_profile

ANSWERS, SEED = 12_000, 862
EXPECTED = {
    "egm-eval": "58a2e191e6d6e721c3009da392562100ca976d03773c9dd307293ca89059632f",
    "vlmevalkit": "a0ca1a7f1e321c4668d9886f07daf7774c53ca5fa6fc53638d8271061e6f687c",
    "egm-reward": "e42f7cc24a3d18ddea2765f3bd3b4b36d2f8c9e77fe9ce9021218f18c629e3ab",
}
WORDS = [
    "the",
    "box",
    "is",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "```json",
    "label",
    "５",
    "1e3",
    "NaN",
    "], [",
]


def number(chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.6:
        return str(chance.randrange(1001))
    if kind < 0.8:
        return f"{chance.uniform(-5, 1005):.3f}"
    return chance.choice(["0", "1000", "0.5", "-0", "1e2", ".25", "999.9999", "12345678901", "9e999", "1e-320"])


def answer(chance: random.Random) -> str:
    def box() -> str:
        inside = ", ".join(number(chance) for _ in range(chance.choice([4, 4, 4, 4, 3, 5, 8])))
        form = chance.choice(
            ['{{"bbox_2d": [{}]}}', '"bbox_2d" : [ {} ]', "[{}]", "[[{}]]", "({})", "{}", "<box>{}</box>"]
        )
        return form.format(inside)

    parts = [box() if chance.random() < 0.5 else chance.choice(WORDS) for _ in range(chance.randrange(8))]
    return chance.choice([" ", "", "\n"]).join(parts)


def questions() -> Iterator[tuple[str, list[float], int, int, str, str]]:
    chance = random.Random(SEED)
    for _ in range(ANSWERS):
        width, height = chance.choice([(640, 480), (480, 640), (1, 1), (333, 1000), (1920, 1080)])
        x, y = sorted(chance.uniform(0, width) for _ in range(2)), sorted(chance.uniform(0, height) for _ in range(2))
        kind = chance.choice(egm_reward.REWARD_TYPES[:5])
        yield answer(chance), [x[0], y[0], x[1], y[1]], width, height, chance.choice(["scale", "keep", "inverse"]), kind


def digests() -> dict[str, str]:
    found = {name: hashlib.sha256() for name in EXPECTED}
    for text, box, width, height, remap, kind in questions():
        for name in ("egm-eval", "vlmevalkit"):
            s = get_profile(name).score_answer(text, box, width, height, remap)
            found[name].update(repr((s.scaled_bbox, s.iou, s.correct, s.parsed)).encode())
        truth = [1000 * v / side for v, side in zip(box, (width, height, width, height), strict=True)]
        parts = egm_reward.reward_parts(text, truth, width, height, reward_type=kind)
        # the last bit of an exponential depends on the processor
        found["egm-reward"].update(repr((round(parts.score, 9), parts.iou, parts.passed, parts.parsed)).encode())
    return {name: digest.hexdigest() for name, digest in found.items()}


def test_12000_answers_are_scored_as_before() -> None:
    assert digests() == EXPECTED
