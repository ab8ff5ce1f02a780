"""The doctor of answers: every other way to read a box is recognised, and right answers are not reported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from grounding.boxes import iou, resized
from grounding.scoring import doctor, egm_eval, get_profile
from grounding.scoring.doctor import READINGS, Reading, diagnose, examine

VECTORS = [json.loads(s) for s in (Path(__file__).parent / "data" / "score_vectors.jsonl").read_text().splitlines()]


def rows(seed, n=40):
    """Return (relative box, pixel box, width, height): small boxes off the diagonal, so that no two readings agree."""
    draw = random.Random(seed)
    for _ in range(n):
        w, h = draw.randint(200, 640), draw.randint(200, 640)
        x, y = draw.randint(550, 780), draw.randint(120, 300)
        rel = (x, y, x + draw.randint(80, 200), y + draw.randint(60, 130))
        yield rel, tuple(v * (w, h)[i % 2] / 1000 for i, v in enumerate(rel)), w, h


WAYS = {
    "fractions": lambda r, p: [round(v / 1000, 4) for v in r],
    "pixels": lambda r, p: [round(v) for v in p],
    "yx": lambda r, p: [r[1], r[0], r[3], r[2]],
    "xywh": lambda r, p: [r[0], r[1], r[2] - r[0], r[3] - r[1]],
    "reversed": lambda r, p: [r[2], r[3], r[0], r[1]],
    "percent": lambda r, p: [round(v / 10, 2) for v in r],
    "cxcywh": lambda r, p: [(r[0] + r[2]) / 2, (r[1] + r[3]) / 2, r[2] - r[0], r[3] - r[1]],
}
IN_PIXELS = {
    "fractions": WAYS["fractions"],
    "relative": lambda r, p: list(r),
    "yx": lambda r, p: [p[1], p[0], p[3], p[2]],
    "xywh": lambda r, p: [p[0], p[1], p[2] - p[0], p[3] - p[1]],
    "reversed": lambda r, p: [p[2], p[3], p[0], p[1]],
    "percent": WAYS["percent"],
    "cxcywh": lambda r, p: [(p[0] + p[2]) / 2, (p[1] + p[3]) / 2, p[2] - p[0], p[3] - p[1]],
}
"""The readings for a profile that reads answers as pixels"""


def judged(answers, profile="egm-eval"):
    findings = []
    for text, truth, w, h in answers:
        p = get_profile(profile)
        scored = p.score_answer(text, truth, w, h, "scale").iou
        findings.append(examine(text, truth, w, h, scored, p.space, after=p.after_thinking))
    return diagnose(findings, profile)


@pytest.mark.parametrize("way", WAYS)
@given(st.integers(0, 2**32))
def test_answers_in_another_space_are_named_with_their_accuracy(way, seed):
    found = judged((str(WAYS[way](r, p)), p, w, h) for r, p, w, h in rows(seed))
    (reading,) = [r for r in found.readings if r.name == way]
    assert reading.looks >= 38 and reading.acc >= 0.95
    assert len(found.notes) == 1 and "Acc@0.5 would be" in found.notes[0]


@pytest.mark.parametrize("way", IN_PIXELS)
@pytest.mark.parametrize("profile", ["egm-eval-pixels", "answer-after-thinking-pixels"])
@given(st.integers(0, 2**32))
def test_answers_that_are_not_the_pixels_that_a_profile_takes_them_for_are_named(profile, way, seed):
    found = judged(((str(IN_PIXELS[way](r, p)), p, w, h) for r, p, w, h in rows(seed)), profile)
    (reading,) = [r for r in found.readings if r.name == way]
    assert reading.looks >= 30 and reading.acc >= 0.95 and len(found.notes) == 1
    plural = next(r.plural for r in READINGS if r.name == way)
    assert plural.partition(" (")[0] in found.notes[0]


@given(st.integers(0, 2**32))
def test_pixels_of_a_resized_picture_are_named(seed):
    def resized_box(p, w, h):
        wide, high = resized(w, h)
        return [round(v * s, 1) for v, s in zip(p, (wide / w, high / h) * 2, strict=True)]

    # pictures so small that the processor enlarges them
    small = [(r, tuple(v / 10 for v in p), w // 10, h // 10) for r, p, w, h in rows(seed)]
    small = [(r, tuple(v * s / 1000 for v, s in zip(r, (w, h) * 2, strict=True)), w, h) for r, _, w, h in small]
    answers = [(str(resized_box(p, w, h)), p, w, h) for _, p, w, h in small]
    assert "as Qwen2.5-VL resizes it" in judged(answers).notes[-1]
    assert judged(answers, "egm-eval-resized").notes == ()


def test_a_profile_that_reads_after_thinking_is_examined_there():
    answers = [(f"{list(r)}</think>{WAYS['yx'](r, p)}", p, w, h) for r, p, w, h in rows(7)]
    (note,) = judged(answers, "answer-after-thinking").notes
    assert "fit only if read as y before x" in note


@given(st.integers(0, 2**32))
def test_right_and_slightly_wrong_answers_get_no_note(seed):
    draw = random.Random(seed)
    shifted = ((str([v + draw.randint(-60, 60) for v in r]), p, w, h) for r, p, w, h in rows(seed))
    assert judged(shifted).notes == ()


def test_eight_fractions_are_said_in_words():
    found = judged((str(WAYS["fractions"](r, p)), p, w, h) for r, p, w, h in rows(1, 8))
    assert found.notes == ("8 of 8 boxes lie in 0..1; if read as fractions, Acc@0.5 would be 100.00",)


def test_a_draft_in_the_thoughts_is_named_and_the_profile_reads_behind_it():
    answers = [(f'the box "bbox_2d": [1, 1, 9, 9] no</think>"bbox_2d": {list(r)}', p, w, h) for r, p, w, h in rows(2)]
    found = judged(answers)
    assert (found.after_thinking_differs, found.after_thinking_acc, found.unended) == (40, 1.0, 0)
    assert "40 of 40 answers have a box after </think>" in found.notes[0]
    assert all(get_profile("answer-after-thinking").score_answer(*a, "scale").correct for a in answers)
    assert judged(answers, "answer-after-thinking").notes == ()


@given(st.sampled_from(VECTORS), st.text(max_size=30))
def test_the_profile_is_egm_eval_on_what_follows_the_last_end_of_thought(v, thought):
    score = get_profile("answer-after-thinking").score_answer
    truth, w, h = v["eval"]["bbox"], v["width"], v["height"]
    last = v["text"].rpartition("</think>")[2]
    expected = egm_eval.score_answer(last, truth, w, h, "scale")
    assert score(v["text"], truth, w, h, "scale") == expected
    assert score(thought + "</think>" + v["text"], truth, w, h, "scale") == expected


def test_answers_without_an_end_of_thought_are_counted_only_if_the_model_thinks():
    plain = [(str(list(r)), p, w, h) for r, p, w, h in rows(3)]
    assert judged(plain).unended is None
    mixed = [(f"hm</think>{t}" if i % 4 else t, p, w, h) for i, (t, p, w, h) in enumerate(plain)]
    found = judged(mixed)
    assert found.unended == 10 and "10 of 40 answers have no end of thought" in found.notes[0]


@given(st.text(), st.lists(st.floats(-10, 3000), min_size=4, max_size=4), st.integers(1, 3000), st.integers(1, 3000))
def test_any_text_can_be_examined(text, truth, w, h):
    for t in (text, f"[{text}]", "[1e999, nan, 2, 3]", None):
        diagnose([examine(t, truth, w, h, 0.0)])


boxes = st.one_of(
    st.lists(st.floats(-50, 1300), min_size=4, max_size=4), st.lists(st.floats(0, 1), min_size=4, max_size=4)
)


@given(boxes, st.data(), st.integers(1, 2000), st.integers(1, 2000), st.sampled_from(["relative", "pixels", "resized"]))
def test_no_reading_that_is_right_is_passed_over(box, data, w, h, space):
    truth = data.draw(st.lists(st.floats(0, 1), min_size=4, max_size=4))
    x, y = sorted((truth[0] * w, truth[2] * w)), sorted((truth[1] * h, truth[3] * h))
    truths = [(x[0], y[0], x[1], y[1])]
    for reading in READINGS:  # replace the true box by one close to the reading
        found = reading.read(tuple(box), w, h, space)
        if found is not None and 0 <= found[0] < found[2] <= w and 0 <= found[1] < found[3] <= h:
            truths.append(tuple(v + data.draw(st.floats(-9, 9)) for v in found))
    for truth in truths:
        right = [
            i
            for i, r in enumerate(READINGS)
            if (b := r.read(tuple(box), w, h, space)) is not None and iou(b, truth) > 0.5
        ]
        assert set(right) <= set(doctor._near(tuple(box), truth, w, h, space))


def test_a_note_needs_evidence():
    two = [(str(WAYS["pixels"](r, p)), p, w, h) for r, p, w, h in rows(4, 2)]
    assert judged(two).notes == () and diagnose([]).notes == ()
    assert diagnose([]).readings[0] == Reading("fractions", 0, 0.0)


def test_answers_in_pixels_have_a_profile():
    for r, p, w, h in rows(5):
        text = str(WAYS["pixels"](r, p))
        assert get_profile("egm-eval-pixels").score_answer(text, p, w, h, "scale").correct


@given(boxes, st.data(), st.integers(1, 2000), st.integers(1, 2000), st.sampled_from(["relative", "pixels", "resized"]))
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_the_findings_are_those_of_every_reading_by_itself(box, data, w, h, space):
    own = tuple(float(v) for v in box)
    near = [b for r in READINGS if (b := r.read(own, w, h, space)) is not None]
    truth = tuple(v + data.draw(st.floats(-9, 9)) for v in data.draw(st.sampled_from([own, *near])))
    assume(0 <= truth[0] < truth[2] <= w and 0 <= truth[1] < truth[3] <= h)
    scored = data.draw(st.sampled_from([0.0, 0.25, 0.3, 1.0]))
    found = examine(str(list(own)), truth, w, h, scored, space)
    for i, reading in enumerate(READINGS):
        other = reading.read(own, w, h, space)
        right = other is not None and iou(other, truth) > 0.5
        assert (found >> (6 + 2 * i)) & 3 == right + 2 * (right and scored <= 0.25), reading.name
