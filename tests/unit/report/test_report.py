"""The page: figures of the summary, nothing from outside, no answer that becomes markup."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.errors import UserError
from grounding.report import build, charts
from grounding.report.collect import MAX_PICTURES, Run, chosen, collect

FILES = ("refcoco_val", "refcoco+_testA", "refcocog_test")
NASTY = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'


def _png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(out, "PNG")
    return out.getvalue()


def _evaluation(folder: Path, images: Path, hits: int, rows: int = 30, errors: int = 0) -> None:
    (folder / "results").mkdir(parents=True)
    lines = []
    for i in range(rows):
        correct, failed = i % 10 < hits, i < errors
        row: dict[str, Any] = {
            "key": f"{folder.name}-{i}",
            "file": FILES[i % 3],
            "line": i + 1,
            "image": f"{i % 7}.png",
        }
        row |= {
            "sent": f"the red circle {i} {NASTY if i == 4 else ''}",
            "width": 64,
            "height": 48,
            "bbox": [4, 4, 20, 20],
        }
        row |= {"text": None if failed else f"{NASTY} [1, 2, 3, 4]", "scaled_bbox": [4.0, 5.0, 20.0, 21.0]}
        row |= {"iou": 0.9 if correct else 0.2, "correct": correct and not failed}
        row |= {"outcome": "error" if failed else "ok", "error": "HTTP 500" if failed else None}
        lines.append(orjson.dumps(row))
    (folder / "results" / "part-0001.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    files = [
        {"name": n, "n": rows // 3, "acc": hits / 10, "mean_iou": 0.61, "acc75": 0.5, "acc90": 0.25} for n in FILES
    ]
    macro = None if errors else hits / 10
    summary: dict[str, Any] = {"total": rows, "done": rows - errors, "errors": errors, "unparsed": 0, "truncated": 0}
    summary |= {"macro": macro, "micro": macro, "ci95": {"macro": [0.31, 0.72], "micro": [0.3, 0.7]}, "files": files}
    summary |= {"requests_per_second": 12.5, "model": "m", "reason": f"{errors} requests failed" if errors else None}
    (folder / "summary.json").write_bytes(orjson.dumps(summary))
    (folder / "run_config.json").write_bytes(orjson.dumps({"images": [str(images)]}))
    (folder / "state.json").write_bytes(b"{}")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    images = tmp_path / "pictures"
    images.mkdir()
    for i in range(7):
        (images / f"{i}.png").write_bytes(_png())
    run = tmp_path / "demo"
    _evaluation(run / "before", images, 4)
    _evaluation(run / "after", images, 7)
    train = run / "rl"
    train.mkdir()
    (train / "state.json").write_bytes(b"{}")
    metrics = [{"score": s / 20, "valAccuracy": s / 15 if s % 5 == 0 else None} for s in range(11)]
    lines = [{"time": 1.0, "stage": "rl", "step": s, "totalSteps": 10, "metrics": m} for s, m in enumerate(metrics)]
    (train / "progress.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (run / "run.json").write_bytes(orjson.dumps({"jobs": ["rl", "before", "after"]}))
    return run


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _gallery(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="gallery">(.*?)</script>', page, re.DOTALL)
    assert match
    return orjson.loads(match[1])


def test_the_figures_are_the_summary_s(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    assert re.findall(r"<b>(\d+\.\d)</b>", page)[:2] == ["40.0", "70.0"]
    assert "+30.0" in page and "interval 31.0 to 72.0" in page and "12.5" in page
    assert page.index("RefCOCO val") < page.index("RefCOCO+ testA") < page.index("RefCOCOg test")
    assert "reward of the rollouts" in page and "rl: validation" in page


def test_nothing_is_loaded_from_outside_and_no_answer_becomes_markup(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    parsed = _Page()
    parsed.feed(page)
    assert [t for t, _ in parsed.tags].count("script") == 2
    assert not [a for _, a in parsed.tags if "onerror" in a]
    for _, attributes in parsed.tags:
        for name in ("src", "href"):
            assert not (attributes.get(name) or "").startswith(("http", "//"))
    assert not re.search(r"url\(|@import", page)
    gallery = _gallery(page)
    assert any(NASTY in i["sent"] for i in gallery["items"])
    assert all(p.startswith("data:image/") for p in gallery["pictures"].values())


def test_no_headline_while_errors_remain(tmp_path: Path) -> None:
    _evaluation(tmp_path / "one", tmp_path, 5, errors=2)
    page = build(tmp_path / "one").read_text()
    assert "2 requests failed" in page and "<b>–</b>" in page
    assert "pictures could not be read" in page


def test_a_run_without_evaluations_and_a_folder_with_nothing(tmp_path: Path, run_dir: Path) -> None:
    for name in ("before", "after"):
        shutil.rmtree(run_dir / name)
    page = build(run_dir).read_text()
    assert "rl: validation" in page and 'id="gallery"' not in page
    with pytest.raises(UserError, match="neither a run nor an evaluation"):
        build(tmp_path / "pictures")


def test_the_gallery_is_capped_and_holds_every_file_and_outcome(tmp_path: Path) -> None:
    _evaluation(tmp_path / "big", tmp_path, 5, rows=20_001, errors=3)
    run = collect(tmp_path / "big")
    kept = chosen(run)
    assert len(kept) == len(set(kept)) == MAX_PICTURES == len(_gallery(build(tmp_path / "big").read_text())["items"])
    rows = {run.evaluations[0].question(r): r for r in run.evaluations[0].rows.values()}
    groups = {(r["file"], r["outcome"], r["correct"]) for r in rows.values()}
    assert {(rows[q]["file"], rows[q]["outcome"], rows[q]["correct"]) for q in kept} == groups
    assert chosen(run) == kept and chosen(Run("empty")) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(allow_infinity=True, allow_nan=True, width=32)), max_size=30))
def test_any_series_is_drawn(points: list[tuple[float, float]]) -> None:
    drawn = charts.lines("t", [charts.Series("s", points, "a", True)], "x")
    assert "nan" not in drawn.replace("<title>", "") and "inf" not in drawn


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_inside(low: float, span: float) -> None:
    found = charts.ticks(low, low + span)
    assert found == sorted(found) and len(found) <= 12
    assert all(low - 1e-6 * abs(low) - 1e-6 <= t <= low + span + 1e-6 * abs(low + span) + 1e-6 for t in found)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("hash_", "count"), [("", 30), ("file=refcoco_val", 10), ("outcome=fixed", 9), ("text=circle+12", 1)]
)
def test_filters_in_a_real_browser(run_dir: Path, tmp_path: Path, hash_: str, count: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    url = build(run_dir).resolve().as_uri() + "#" + hash_
    done = subprocess.run([browser, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=60)
    assert f"{count} shown" in done.stdout, done.stderr[-500:]
    assert done.stdout.count('<article class="card">') == count
