"""Two conditions that end an RL run: prompts without an answer, and gradients that are not numbers."""

from __future__ import annotations

import math

from grounding.train.rl import guard
from grounding.train.rl import resume as attempts

ACCURACY = "val-core/grounding/acc/mean@1"


def test_prompts_without_an_answer_are_counted_and_never_wrong() -> None:
    """11 of 52 validation pictures were missing: verl counts them as wrong in one figure and leaves them out of the other."""
    wanted = {("grounding", str(i)): 1 for i in range(52)}
    assert guard.failed_answers(wanted, [str(i) for i in range(11, 52)]) == (52, 11)
    assert guard.failed_answers(wanted, [str(i) for i in range(52)]) == (52, 0)
    assert guard.failed_answers({("grounding", "a"): 4, ("grounding", "b"): 4}, ["a", "a", "b", "a"]) == (8, 4)
    assert guard.failed_answers({}, []) == (0, 0)
    verl = {ACCURACY: 0.4, "val-aux/grounding/acc_success_only/mean@1": 0.5, guard.VALIDATED: 100}
    few = attempts.metrics({**verl, guard.FAILED_VALIDATION: 10})
    assert few == {"valAccuracy": 0.5, "valPrompts": 100, "valFailed": 10}
    assert guard.too_many_failed([few]) == ""
    many = attempts.metrics({**verl, guard.FAILED_VALIDATION: 11})
    assert many == {"valPrompts": 100, "valFailed": 11}, (
        "expected only the counts, because the accuracy of this validation is not valid"
    )
    assert guard.too_many_failed([few, many]) == "11 of 100 validation prompts got no answer; at most 10 % may fail"
    assert guard.too_many_failed([many, {"rollouts": 16.0}]) == "", "expected no error: the last step has no validation"
    assert guard.too_many_failed([]) == ""


def test_failed_rollouts_end_a_run_when_a_tenth_of_ten_steps_is_gone() -> None:
    def steps(*failed: int) -> list[dict[str, float]]:
        return [{"rollouts": 16.0, "rolloutsFailed": float(f)} for f in failed]

    assert guard.too_many_failed(steps(0, 4, 4, 4, 4)) == "", (
        "expected no error: 16 of 160 in ten steps are exactly 10 %"
    )
    assert (
        guard.too_many_failed(steps(12, 5))
        == "17 of 32 rollouts of the last 2 steps got no answer; at most 10 % may fail"
    )
    assert guard.too_many_failed(steps(12, *[0] * 9, 5)) == "", (
        "expected no error: only the last ten of eleven steps count"
    )


def test_five_steps_without_a_finite_gradient_end_the_run_and_name_the_first() -> None:
    def steps(*norms: float) -> list[tuple[int, dict[str, float]]]:
        return [(7 + i, {"gradNorm": norm}) for i, norm in enumerate(norms)]

    nan = math.nan
    assert guard.not_finite(steps(1.0, nan, nan, nan, nan)) == ""
    assert guard.not_finite(steps(1.0, nan, nan, math.inf, nan, nan)) == (
        "5 steps in a row have no finite gradient; the first was step 8"
    )
    assert guard.not_finite(steps(nan, nan, nan, nan, 1.0)) == guard.not_finite([]) == ""
    assert attempts.metrics({"actor/grad_norm": None, "critic/score/mean": 0.5, "x": None})["score"] == 0.5
    assert math.isnan(attempts.metrics({"actor/grad_norm": None})["gradNorm"]), "expected NaN for null in verl's file"
