"""The page has the summary's figures, loads nothing from outside, escapes answers, and stays within its size limit."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grounding.cli import run as egm
from grounding.errors import UserError
from grounding.evaluate.compare import compare
from grounding.evaluate.results.reader import read_answers
from grounding.report import Caps, build, build_comparison, charts
from grounding.report.collect import Run, Training, collect
from grounding.report.gallery import chosen, thumbnail
from grounding.report.overview import sentence
from grounding.report.slices import KINDS, kinds
from grounding.scoring.doctor import diagnose, examine


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return samples.pictures(tmp_path / "pictures")


@pytest.fixture
def run_dir(tmp_path: Path, images: Path) -> Path:
    return samples.run(tmp_path / "demo", images)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def data(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    found: dict[str, Any] = orjson.loads(match[1])
    return found


def test_the_figures_are_the_summary_s(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    assert re.findall(r"<b[^>]*>([+\d.]+)</b>", page)[:3] == ["40.0", "70.0", "+30.0"]
    assert "interval 31.0 to 72.0" in page
    assert page.index("RefCOCO val") < page.index("RefCOCO+ testA") < page.index("RefCOCOg test")
    assert "reward of the rollouts" in page and "rl: validation" in page
    assert "12.5" in build(run_dir / "after").read_text()


def test_nothing_is_loaded_from_outside_and_no_answer_becomes_markup(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    parsed = _Page()
    parsed.feed(page)
    assert [t for t, _ in parsed.tags].count("script") == 3
    assert not [a for _, a in parsed.tags for name in a if name.startswith("on") or name == "style"]
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            assert not (attributes.get(name) or "").startswith(("http", "//"))
    assert not re.search(r"url\(|@import", page)
    found = data(page)
    assert any(samples.NASTY in s for s in found["sent"])
    assert any(samples.NASTY in t for a in found["answers"] for t in a["texts"].values())
    assert len(found["pictures"]) == 7 and all(p.startswith("data:image/") for p in found["pictures"].values())


def test_the_policy_names_the_script_and_the_stylesheet_as_they_are(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src &#39;none&#39;") and "unsafe" not in policy[1]
    for pattern in (r"<style>(.*?)</style>", r"<script>(.*?)</script>"):
        found = re.search(pattern, page, re.DOTALL)
        assert found
        assert base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode() in policy[1]


def test_hostile_names_are_escaped_everywhere(tmp_path: Path, images: Path) -> None:
    changes = {"file": samples.NASTY, "model": samples.NASTY, "prompt": samples.NASTY, "image": "../" + samples.NASTY}
    folder = samples.evaluation(tmp_path / "x", images, 5, **changes)
    (folder / "run_config.json").write_bytes(orjson.dumps({"images": [samples.NASTY], "limit": samples.NASTY}))
    (folder / "job.yaml").write_text(samples.NASTY)
    other = samples.evaluation(tmp_path / "y", images, 6, **changes)
    pages = [
        build(folder),
        build_comparison(compare(read_answers(folder), read_answers(other)), tmp_path / "c.html", ["<b>"]),
    ]
    for page in pages:
        assert (
            "<script>window" not in page.read_text()
            and "<img" not in page.read_text()
            and "<svg onload" not in page.read_text()
        )


def test_no_secret_of_a_manifest_is_in_the_page(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "x", images, 5)
    container = {"name": "main", "env": [{"name": "OPENAI_API_KEY", "value": "hunter-in-env"}]}
    spec = {
        "model": {"source": "m"},
        "podTemplate": {"spec": {"containers": [container]}},
        "endpoints": ["https://user:hunter-in-url@server.example/v1"],
    }
    job = {"apiVersion": "grounding.egm.dev/v1alpha1", "kind": "GroundingEvalJob", "metadata": {"name": "x"}}
    (folder / "job.yaml").write_bytes(orjson.dumps({**job, "spec": spec}))
    page = build(folder).read_text()
    assert "OPENAI_API_KEY" in page and "server.example" in page, "the page should show the job"
    assert "hunter" not in page


def test_no_headline_while_errors_remain(tmp_path: Path) -> None:
    page = build(samples.evaluation(tmp_path / "one", tmp_path, 5, errors=2)).read_text()
    assert "2 requests failed" in page and "<b>–</b>" in page
    assert "pictures could not be read" in page and data(page)["missing"] == 7


def test_the_page_says_who_answered_and_what_a_reader_must_know(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "one", images, 5)
    summary = orjson.loads((folder / "summary.json").read_bytes())
    served = [{"id": "m", "path": f"/models/{samples.NASTY}", "weight_version": "2", "answers": 9}, {"reply": 7}, None]
    more = {"served": served, "notes": [f"the server serves {samples.NASTY}", 5]}
    (folder / "summary.json").write_bytes(orjson.dumps(summary | more))
    page = build(folder).read_text()
    assert "served: m, weights from /models/&lt;/script&gt;" in page and ", weight version 2; a model without" in page
    assert '<p class="warn">The server serves &lt;/script&gt;' in page and "<script>window" not in page
    (folder / "summary.json").write_bytes(orjson.dumps(summary | {"served": 5, "notes": {"a": 1}}))
    assert "served:" not in build(folder).read_text()


def test_the_doctor_s_figures_are_in_the_page(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "one", images, 5)
    summary = orjson.loads((folder / "summary.json").read_bytes())
    assert "A second look" not in build(folder).read_text()
    found = asdict(diagnose([examine("[0.1, 0.1, 0.5, 0.5]", [6, 5, 32, 24], 64, 48, 0.0)] * 30))
    (folder / "summary.json").write_bytes(orjson.dumps(summary | {"doctor": found}))
    page = build(folder).read_text()
    assert '<th scope="row">box read as fractions (0..1)</th><td>30</td><td>100.00</td>' in page
    for odd in (7, {}, {"answers": 1}, {"answers": 1, "readings": [None, {"name": "yx", "acc": "x"}, {"name": []}]}):
        (folder / "summary.json").write_bytes(orjson.dumps(summary | {"doctor": odd}))
        build(folder)


def test_every_row_is_in_the_page_by_kind(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "one", images, 4, rows=60, errors=2)
    found = data(build(folder).read_text())
    names = [found["kinds"][k] for k in found["answers"][0]["kind"]]
    assert len(names) == 60 and names.count("failed") == 2 and {"unparsed", "truncated", "loose", "wrong"} < set(names)
    assert names.count("correct") == 22
    a = read_answers(folder)
    assert [KINDS[k] for k in kinds(a)] == names
    boxes = found["answers"][0]["box"]
    assert [boxes[c][names.index("correct")] for c in range(4)] == [4, 5, 20, 21]
    assert [boxes[c][names.index("failed")] for c in range(4)] == [-1] * 4


def test_a_run_without_evaluations_and_a_folder_with_nothing(tmp_path: Path, run_dir: Path) -> None:
    for name in ("before", "after"):
        shutil.rmtree(run_dir / name)
    page = build(run_dir).read_text()
    assert "rl: validation" in page and 'id="data"' not in page
    with pytest.raises(UserError, match="neither a run nor an evaluation"):
        build(tmp_path / "pictures")


def test_an_evaluation_that_was_cut_off_at_once_still_has_a_page(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "cut", images, 5)
    (folder / "summary.json").unlink()
    assert "not finished" in build(folder).read_text()
    for part in (folder / "results").iterdir():
        part.unlink()
    assert "not finished" in build(folder).read_text()


def test_pictures_and_texts_stay_within_their_caps(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "big", images, 5, rows=5000, errors=3)
    whole = data(build(folder).read_text())
    few = data(build(folder, caps=Caps(pictures=3, text_bytes=2000, text=40)).read_text())
    assert len(whole["pictures"]) == 7 and len(few["pictures"]) == 3 and len(few["sent"]) == 5000
    texts = few["answers"][0]["texts"].values()
    assert 0 < sum(len(t.encode()) for t in texts) <= 2000 and all(len(t) <= 42 for t in texts)
    size = len(next(iter(whole["pictures"].values())))
    assert len(data(build(folder, caps=Caps(picture_bytes=2 * size + 1)).read_text())["pictures"]) == 2
    assert data(build(folder, caps=Caps(pictures=0)).read_text())["pictures"] == {}


def test_the_first_pictures_are_of_every_file_and_kind(tmp_path: Path, images: Path) -> None:
    run = collect(samples.evaluation(tmp_path / "big", images, 5, rows=2001, errors=3))
    a = run.evaluations[0].answers
    kind = dict(zip(a.questions, kinds(a).tolist(), strict=True))
    groups = {(q.file, kind[q]) for q in a.questions}
    first = list(itertools.islice(chosen(run.evaluations), len(groups)))
    assert {(q.file, kind[q]) for q in first} == groups
    order = list(chosen(run.evaluations))
    assert sorted(order) == sorted(a.questions) and order == list(chosen(run.evaluations)) and list(chosen([])) == []


def test_the_comparison_s_page_holds_flips_only(tmp_path: Path, images: Path) -> None:
    a = samples.evaluation(tmp_path / "a", images, 4)
    b = samples.evaluation(tmp_path / "b", images, 7, model="n")
    assert egm(["compare", str(a), str(b), "--html", str(tmp_path / "c.html"), "--min-macro", "99"]) == 1
    page = (tmp_path / "c.html").read_text()
    found = data(page)
    assert len(found["sent"]) == 9 and "The gate fails." in page and "+30.00" in page
    correct = found["kinds"].index("correct")
    for x, y in zip(*(side["kind"] for side in found["answers"]), strict=True):
        assert (x == correct) != (y == correct)
    assert egm(["compare", str(a), str(a), "--html", str(tmp_path / "same.html")]) == 0
    same = (tmp_path / "same.html").read_text()
    assert "No answer flipped." in same and 'id="data"' not in same


def test_a_thumbnail_is_small_whatever_the_picture(tmp_path: Path) -> None:
    for mode, form in (("RGB", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")):
        out = io.BytesIO()
        Image.effect_noise((900, 700), 80).convert(mode).save(out, form)
        uri = thumbnail(out.getvalue())
        assert uri.startswith("data:image/webp;base64,") and len(uri) < 60_000
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as small:
            assert max(small.size) == 320


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(allow_infinity=True, allow_nan=True, width=32)), max_size=30))
def test_any_series_is_drawn(points: list[tuple[float, float]]) -> None:
    drawn = charts.lines("t", [charts.Series("s", points, "a", True)], "x")
    assert "nan" not in drawn.replace("<title>", "") and "inf" not in drawn


def test_no_label_of_the_x_axis_is_cut_off_at_the_right_end() -> None:
    drawn = charts.lines("t", [charts.Series("s", [(float(x), 1.0) for x in range(1, 701)], "a")], "step")
    found = re.findall(r'x="([\d.]+)" y="202" text-anchor="(\w+)">(\d+)<', drawn)
    assert found[-1] == ("548.0", "end", "700") and {anchor for _, anchor, _ in found[:-1]} == {"middle"}


def test_before_the_first_answer_the_sentence_names_a_training_that_is_not_finished(tmp_path: Path) -> None:
    line = {"time": 1.0, "stage": "sft", "totalSteps": 9, "metrics": {}}
    unfinished, done = ({**line, "step": step} for step in (4, 9))
    run = Run("r", trainings=[Training("a", "sft", [unfinished]), Training("b", "sft", [done])])  # type: ignore[list-item]
    assert sentence(run, None) == "Nothing has been measured yet; a is at step 4 of 9."
    run.trainings.reverse()
    assert sentence(run, None).endswith("a is at step 4 of 9.")
    run.trainings = [t for t in run.trainings if t.name == "b"]
    assert sentence(run, None).endswith("b is at step 9 of 9.")


def test_unreadable_answers_are_named_before_the_result_of_their_summary(tmp_path: Path, images: Path) -> None:
    folder = samples.evaluation(tmp_path / "x", images, 5)
    macro = orjson.loads((folder / "summary.json").read_bytes())["macro"]
    for part in (folder / "results").glob("part-*"):
        part.write_bytes(b'{"key": "x"}\n' * 3)
    (folder / "results.parquet").unlink(missing_ok=True)
    run = collect(folder)
    found = sentence(run, None)
    assert found.startswith("3 stored answers of x cannot be read. By its summary, x points at the right object in ")
    assert f"{100 * macro:.1f} %" in found
    assert sentence(run, None, ["The sweep's conclusion."]) == "The sweep's conclusion."


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_inside(low: float, span: float) -> None:
    found = charts.ticks(low, low + span)
    assert found == sorted(found) and len(found) <= 12
    assert all(low - 1e-6 * abs(low) - 1e-6 <= t <= low + span + 1e-6 * abs(low + span) + 1e-6 for t in found)
