"""The reward that verl calls once an answer: `compute_score`, by the scoring profile `egm-reward`.

Set as `reward.custom_reward_function`. It returns a dict, so that verl logs accuracy, IoU and parse rate of every validation; the keys are the
same for every answer, as verl wants. A row that cannot be scored gets 0 with `parsed` 0 instead of an exception: one bad row must not kill
a reward worker days into a run.
"""

from __future__ import annotations

import logging
from typing import Any

from grounding.scoring.egm_reward import reward_parts

_log = logging.getLogger(__name__)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    reward_type: str = "mix",
    alpha: float = 0.5,
    threshold: float = 0.5,
    **_: Any,
) -> dict[str, float]:
    """Score one answer. `ground_truth`: 4 numbers in 0..1000 (list, tuple or array); `extra_info` holds width, height (pixels) and split.

    Returns `score` (what RL maximises), `acc` (IoU >= threshold), `iou` and `parsed` (1 where a box was found).
    """
    try:
        info = extra_info or {}
        parts = reward_parts(
            solution_str,
            ground_truth,
            int(info["width"]),
            int(info["height"]),
            split=info.get("split"),
            reward_type=reward_type,
            alpha=alpha,
            threshold=threshold,
        )
    except Exception:
        _log.exception("a row could not be scored and counts 0: data_source=%s extra_info=%s", data_source, extra_info)
        return {"score": 0.0, "acc": 0.0, "iou": 0.0, "parsed": 0.0}
    score, iou, passed, parsed = parts
    return {"score": float(score), "acc": float(passed), "iou": float(iou), "parsed": float(parsed)}
