"""Compare the cost of one call of our reward, as verl makes it, with the reference's own function or a plain port of it.

    python bench/reward.py [--reference PATH/verl/verl/utils/reward_score/grounding.py] [--seconds 10] [--out bench/reward.json]

The reference's file is not part of this project; download it and pass its path. Without it, the plain port in `bench/scoring.py` is used. Both
functions are called by keyword with data_source, solution_str, ground_truth and extra_info, like verl's reward manager does. They run alternately
in one process in rounds of 200 answers, after a check that their scores are equal bit for bit. Time is the thread's CPU time, because a round is
shorter than a busy machine's time slice. A case's ratio is that of the fastest rounds. `mean_ratio` is over the realistic cases: reasoning of 300
to 2,000 characters and a JSON box."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from scoring import Row, plain_reward, rows

from grounding.train.rl.reward import compute_score

Call = dict[str, Any]
# words of reasoning, kind of answer, whether the case is realistic
CASES = [
    (40, "json", False),
    (60, "json", True),
    (150, "json", True),
    (250, "json", True),
    (400, "json", True),
    (300, "bare", False),
    (1500, "json", False),
    (1500, "loop", False),
]


def calls(sample: list[Row]) -> list[Call]:
    """Return the arguments that verl's reward manager passes for each row."""
    made = []
    for text, _, truth, width, height in sample:
        info = {"width": width, "height": height, "split": "train", "num_turns": 2, "rollout_reward_scores": {}}
        reward = {"reward_type": "mix", "alpha": 0.5, "threshold": 0.5}
        made.append(
            {"data_source": "grounding", "solution_str": text, "ground_truth": truth, "extra_info": info, **reward}
        )
    return made


def load(path: Path | None) -> tuple[str, Callable[..., float]]:
    """Return name and function of the implementation to compare with."""
    if path is None:

        def port(solution_str: str, ground_truth: list[float], extra_info: dict[str, Any], **_: Any) -> float:
            return plain_reward((solution_str, [], ground_truth, extra_info["width"], extra_info["height"]))

        return "plain port", port
    spec = importlib.util.spec_from_file_location("reference_reward", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return "reference", module.compute_score


def cost(function: Callable[..., Any], prepared: list[Call]) -> float:
    """Return the CPU time per call in microseconds, over one round."""
    begin = time.thread_time()
    for call in prepared:
        function(**call)
    return (time.thread_time() - begin) / len(prepared) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="the reference's grounding.py")
    parser.add_argument("--seconds", type=float, default=10.0, help="total time for all cases")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    name, theirs = load(args.reference)
    result: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine(), "against": name}
    result["cases"] = []
    for words, kind, realistic in CASES:
        sample = rows(words, kind, 200)
        prepared = calls(sample)
        mine, others, end = [], [], time.monotonic() + args.seconds / len(CASES)
        with contextlib.redirect_stdout(io.StringIO()):  # the reference prints one of a thousand calls
            for call in prepared:
                if compute_score(**call)["score"] != theirs(**call):
                    sys.exit(f"scores differ: {call!r}: {compute_score(**call)['score']} and {theirs(**call)}")
            while time.monotonic() < end or len(mine) < 20:
                mine.append(cost(compute_score, prepared))
                others.append(cost(theirs, prepared))
        result["cases"].append(
            {
                "answer": kind,
                "characters": round(statistics.mean(len(r[0]) for r in sample)),
                "realistic": realistic,
                "microseconds": round(min(mine), 2),
                "their_microseconds": round(min(others), 2),
                "ratio": round(min(others) / min(mine), 2),
                "ratio_of_medians": round(statistics.median(others) / statistics.median(mine), 2),
                "rounds": len(mine),
            }
        )
    result["mean_ratio"] = round(statistics.mean(c["ratio"] for c in result["cases"] if c["realistic"]), 2)
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
