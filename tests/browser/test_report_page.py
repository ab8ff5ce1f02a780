"""The report and the comparison in a real browser: from a file, without network, on a phone and on a desktop, in dark and light mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import samples
from contrast import POOR_CONTRAST
from playwright.sync_api import Page, expect

from grounding.evaluate.compare import compare
from grounding.evaluate.results.reader import read_answers
from grounding.report import build, build_comparison, build_scaling

pytestmark = pytest.mark.browser
Open = Callable[..., Page]


@pytest.fixture
def run_page(tmp_path: Path) -> Path:
    return build(samples.run(tmp_path / "demo", samples.pictures(tmp_path / "pictures")))


@pytest.fixture
def one_page(tmp_path: Path) -> Path:
    images = samples.pictures(tmp_path / "pictures")
    return build(samples.evaluation(tmp_path / "one", images, 5, rows=120, errors=2))


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    images = samples.pictures(tmp_path / "pictures")
    a = samples.evaluation(tmp_path / "a", images, 4, rows=120)
    b = samples.evaluation(tmp_path / "b", images, 7, rows=120, model="n")
    return build_comparison(compare(read_answers(a), read_answers(b)), tmp_path / "compare.html", ["It fell."])


@pytest.fixture(params=["one model", "two models"])
def scaling(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    make = samples.sweep if request.param == "one model" else samples.sweep_over_models
    return build_scaling([make(tmp_path / "sweep", samples.pictures(tmp_path / "pictures"))], tmp_path / "scaling.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_costs_are_switched_without_a_script_and_the_page_fits(
    visit: Open, scaling: Path, width: int, scheme: str
) -> None:
    page = visit(scaling, width=width, scheme=scheme)
    shown = page.locator(".views figure:visible")
    expect(shown).to_have_count(1)
    expect(shown).to_have_class("view-latency")
    page.get_by_role("radio", name="Generated tokens").focus()
    page.keyboard.press("Space")
    expect(shown).to_have_class("view-tokens")
    page.keyboard.press("ArrowRight")
    expect(shown).to_have_class("view-flops")
    expect(
        shown.get_by_text("beats no thought").first
    ).to_be_visible()  # the statements below are about the selected cost
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(POOR_CONTRAST) == []
    assert page.locator("svg[role=img]").evaluate_all("all => all.every(e => e.getAttribute('aria-label'))")


def background(page: Page) -> int:
    """Return the brightness of the page's background, 0..765."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(v) for v in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.parametrize(
    ("fragment", "count"),
    [
        ("", 30),
        ("#file=refcoco_val", 10),
        ("#flip=won", 9),
        ("#flip=lost", 0),
        ("#text=CIRCLE+12", 1),
        ("#job=0&kind=correct", 12),
        ("#kind=not-correct&file=refcocog_test", 3),
        ("#kind=nonsense&file=none", 30),
    ],
)
def test_a_fragment_sets_the_filter(visit: Open, run_page: Path, fragment: str, count: int) -> None:
    page = visit(run_page, fragment)
    expect(page.locator("#count")).to_have_text(f"{count} of 30")
    expect(page.locator("#cards article.card")).to_have_count(min(count, 24))


def test_the_filter_works_by_hand_and_the_address_follows(visit: Open, one_page: Path) -> None:
    page = visit(one_page)
    expect(page.locator("#cards article.card")).to_have_count(24)
    page.get_by_role("button", name="Show 24 more").click()
    expect(page.locator("#cards article.card")).to_have_count(48)
    page.get_by_label("outcome").select_option("failed")
    expect(page.locator("#count")).to_have_text("2 of 120")
    assert page.url.endswith("#kind=failed")
    page.get_by_label("outcome").select_option("")
    page.get_by_label("expression").fill("circle 11")
    expect(page.locator("#count")).to_have_text("11 of 120")  # the matches are 11 and 110 to 119
    page.reload()
    expect(page.locator("#count")).to_have_text("11 of 120")
    page.get_by_label("expression").fill("")
    page.get_by_label("order").select_option("long")
    expect(page.locator("#cards article.card q").first).to_contain_text("circle 119")
    page.get_by_label("order").select_option("file")
    expect(page.locator("#cards article.card .soft").first).to_contain_text("line 1")


def test_the_worst_come_first_with_their_boxes(visit: Open, one_page: Path) -> None:
    page = visit(one_page, "#kind=loose")
    card = page.locator("#cards article.card").first
    expect(card.locator("rect.truth")).to_have_attribute("x", "4")
    expect(card.locator("rect.guess")).to_have_attribute("height", "16")
    expect(card.locator("image")).to_have_count(1)
    expect(card.locator("svg")).to_have_attribute(
        "aria-label", "the red circle 9 . True box 4, 4, 20, 20 of 64 by 48 pixels. loose box, IoU 0.30"
    )
    assert page.evaluate("document.querySelector('article image').getBoundingClientRect().width") > 100
    ious = page.locator("#cards article.card .kind").all_inner_texts()
    assert ious == sorted(ious)


def test_a_number_of_the_table_leads_to_its_answers(visit: Open, one_page: Path) -> None:
    page = visit(one_page)
    page.locator("a.pick[href*='kind=failed']").last.press("Enter")
    expect(page.locator("#count")).to_have_text("2 of 120")
    expect(page.get_by_label("outcome")).to_have_value("failed")
    assert page.evaluate("window.scrollY") > 0
    assert page.evaluate("document.activeElement.name") == "file"


@pytest.mark.parametrize("name", ["run_page", "one_page", "comparison"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(visit: Open, request: pytest.FixtureRequest, name: str, width: int) -> None:
    page = visit(request.getfixturevalue(name), width=width)
    expect(page.locator("#cards article.card").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_dark_and_light_follow_the_system_and_the_button(visit: Open, one_page: Path, scheme: str, dark: bool) -> None:
    page = visit(one_page, scheme=scheme)
    assert (background(page) < 200) == dark
    button = page.get_by_role("button", name="Theme")
    button.click()
    expect(button).to_have_text("Theme: light")
    assert background(page) > 600
    button.press("Enter")
    expect(button).to_have_text("Theme: dark")
    assert background(page) < 200
    page.reload()
    assert background(page) < 200
    button.click()
    assert (background(page) < 200) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(visit: Open, one_page: Path, scheme: str) -> None:
    """Every element with text has a contrast of at least 4.5 to 1 (WCAG AA)."""
    page = visit(one_page, scheme=scheme)
    assert page.evaluate(POOR_CONTRAST) == []


def test_a_hostile_answer_does_nothing(visit: Open, one_page: Path, comparison: Path) -> None:
    for path in (one_page, comparison):
        page = visit(path, "#pictured=off&order=file")
        while page.locator("#more").is_visible():
            page.locator("#more").click()
        for details in page.locator("article details").all():
            details.evaluate("e => e.open = true")
        page.wait_for_timeout(100)
        assert page.evaluate("window.hacked") is None
        assert page.locator("article img, article script").count() == 0
        expect(page.locator("article pre", has_text="onerror").first).to_be_visible()


def test_the_policy_stops_what_would_get_through(visit: Open, one_page: Path, tmp_path: Path) -> None:
    """Even if escaping failed, the page's policy would stop a foreign script."""
    broken = tmp_path / "broken.html"
    hole = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'><a href='javascript:window.hacked=3' id=h>x</a>"
    broken.write_text(one_page.read_text().replace("<main>", "<main>" + hole))
    page = visit(one_page)
    # not opened by `visit`, which fails on any console message: the browser logs an error when the policy blocks the script
    context = page.context.browser.new_context(offline=True)
    other = context.new_page()
    other.goto(broken.as_uri())
    other.locator("#h").click()
    expect(other.locator("#cards article.card").first).to_be_visible()
    assert other.evaluate("window.hacked") is None
    context.close()


def test_the_comparison_shows_flips_only(visit: Open, comparison: Path) -> None:
    page = visit(comparison, "#pictured=off")
    expect(page.locator("#count")).to_have_text("36 of 36")
    expect(page.locator(".warn.gate")).to_contain_text("It fell.")
    page.locator("#more").click()
    for card in page.locator("#cards article.card").all():
        kinds = [k.split(",")[0] for k in card.locator(".kind").all_inner_texts()]
        assert len(kinds) == 2 and (kinds[0] == "correct") != (kinds[1] == "correct")
    page.get_by_label("change").select_option("lost")
    expect(page.locator("#count")).to_have_text("0 of 36")


def test_without_javascript_the_tables_stand(browser: object, one_page: Path) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(one_page.as_uri())
    expect(page.get_by_role("rowheader", name="RefCOCO val").first).to_be_visible()
    expect(page.locator("noscript .warn")).to_be_visible()
    context.close()
