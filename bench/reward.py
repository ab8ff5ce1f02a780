"""Answers per second of the reward as verl calls it, against the reference's own function or a plain port of it, side by side.

    python bench/reward.py [--reference PATH/verl/verl/utils/reward_score/grounding.py] [--seconds 10] [--out bench/reward.json]

The reference's file is not part of this project; fetch it and name it. Without it the plain port of `bench/scoring.py` stands in. Both are called
by keyword with data_source, solution_str, ground_truth and extra_info, as verl's reward manager does, and take turns in one process; scores
are compared first, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from scoring import Row, plain_reward, rate, rows

from grounding.train.reward import compute_score

KWARGS: dict[str, Any] = {"reward_type": "mix", "alpha": 0.5, "threshold": 0.5}


def called(function: Callable[..., Any], row: Row) -> Any:
    """One call as verl makes it."""
    info = {"width": row[3], "height": row[4], "split": "train", "num_turns": 2, "rollout_reward_scores": {}}
    return function(data_source="grounding", solution_str=row[0], ground_truth=row[2], extra_info=info, **KWARGS)


def load(path: Path | None) -> tuple[str, Callable[[Row], float]]:
    """Name and function of what ours is measured against."""
    if path is None:
        return "plain port", plain_reward
    spec = importlib.util.spec_from_file_location("reference_reward", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return "reference", lambda row: called(module.compute_score, row)


def ours(row: Row) -> float:
    return called(compute_score, row)["score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="the reference's grounding.py")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for all cases together")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    name, theirs = load(args.reference)
    kinds = [(40, "json"), (300, "json"), (300, "bare"), (1500, "json"), (1500, "loop")]
    result: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine(), "against": name}
    result["cases"] = []
    for words, kind in kinds:
        sample = rows(words, kind, 200)
        with contextlib.redirect_stdout(io.StringIO()):  # the reference prints one call in a thousand
            for row in sample:
                if ours(row) != theirs(row):
                    sys.exit(f"scores differ: {row!r}: {ours(row)} and {theirs(row)}")
            rounds = max(3, int(args.seconds / len(kinds) / (200 * 20e-6)))
            pairs = [(rate(ours, sample), rate(theirs, sample)) for _ in range(rounds)]
        ratios = [a / b for a, b in pairs]
        result["cases"].append(
            {
                "answer": kind,
                "characters": round(statistics.mean(len(r[0]) for r in sample)),
                "answers_per_second": round(statistics.median(a for a, _ in pairs)),
                "theirs_per_second": round(statistics.median(b for _, b in pairs)),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "rounds": rounds,
            }
        )
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
