"""The reward that verl calls for each answer: `compute_score`, by the scoring profile `egm-reward`.

verl finds it by `reward.custom_reward_function`. It returns a dict, so that verl logs accuracy, IoU and parse rate of every validation; the
keys are the same for every answer, as verl requires. A row that cannot be scored gets score 0 and `parsed` 0 instead of an exception, because
one bad row must not end a run after days.
"""

from __future__ import annotations

import logging
from typing import Any

from grounding.boxes import resized
from grounding.jsontypes import JsonObject
from grounding.scoring import own_reward
from grounding.scoring.egm_reward import plain_parts, taught_iou

_log = logging.getLogger(__name__)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: JsonObject | None = None,
    *,
    reward_type: str = "mix",
    alpha: float = 0.5,
    threshold: float = 0.5,
    own_file: str | None = None,
    own_name: str = "",
    boxes: str = "relative",
    **_: Any,
) -> dict[str, float]:
    """Score one answer. `ground_truth`: 4 numbers in 0..1000 (list, tuple or array); `extra_info`: width, height (pixels) and split.

    `boxes` is `resized` for a model that answers in pixels of the picture as its processor resizes it (Qwen2.5-VL). Returns `score` (which
    RL maximises), `acc` (IoU >= threshold), `iou`, `parsed` (1 if a box was found) and `length` (characters of the answer).
    """
    try:
        info = extra_info or {}
        kind = "eval" if info.get("split") == "test" else reward_type
        answered = resized(int(info["width"]), int(info["height"])) if boxes == "resized" else None
        if own_file is not None and kind != "eval":
            return _own(own_file, own_name, data_source, solution_str, ground_truth, info, threshold, answered)
        if kind == "mix" and answered is None:
            iou = taught_iou(solution_str, ground_truth, info["width"], info["height"])
            if iou >= 0.0:  # nearly every answer
                acc = 1.0 if iou >= threshold else 0.0
                return {
                    "score": alpha * acc + (1.0 - alpha) * iou,
                    "acc": acc,
                    "iou": iou,
                    "parsed": 1.0,
                    "length": float(len(solution_str)),
                }
        width, height = int(info["width"]), int(info["height"])
        score, iou, passed, parsed = plain_parts(
            solution_str, ground_truth, width, height, kind, alpha, threshold, answered
        )
        return {
            "score": score,
            "acc": 1.0 if passed else 0.0,
            "iou": iou,
            "parsed": 1.0 if parsed else 0.0,
            "length": float(len(solution_str)),
        }
    except Exception:
        _log.exception(
            "a row could not be scored and gets score 0: data_source=%s extra_info=%s", data_source, extra_info
        )
        length = float(len(solution_str)) if isinstance(solution_str, str) else 0.0
        return {"score": 0.0, "acc": 0.0, "iou": 0.0, "parsed": 0.0, "length": length}


def _own(
    file: str,
    name: str,
    source: str,
    answer: str,
    truth: Any,
    info: JsonObject,
    threshold: float,
    answered: tuple[int, int] | None,
) -> dict[str, float]:
    """Return the user's score of an answer, with the metrics that every reward has."""
    score = own_reward.score_of(own_reward.load(file, name)(source, answer, truth, info))
    width, height = int(info["width"]), int(info["height"])
    _, iou, passed, parsed = plain_parts(answer, truth, width, height, "eval", 0.5, threshold, answered)
    return {
        "score": score,
        "acc": 1.0 if passed else 0.0,
        "iou": iou,
        "parsed": 1.0 if parsed else 0.0,
        "length": float(len(answer)),
    }
