"""The live page in a real browser, while a real `egm run` measures a model behind a server that answers slowly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
from contrast import POOR_CONTRAST
from odd_server import OddServer, http
from playwright.sync_api import Browser, Page, expect

from grounding.view.server import Server

pytestmark = pytest.mark.browser

JOB = """\
apiVersion: grounding.egm.dev/v1alpha1
kind: GroundingEvalJob
metadata: {name: measured}
spec:
  model: {source: m}
  endpoints: [URL]
  data: {shapes: {seed: 3, perFile: 5, train: 8}}
  prompt: qwen3
  scoring: egm
  concurrency: 2
"""


def answer(question: str, n: int) -> list[Any]:
    """Answer after a short delay, with a box that is right for some questions."""
    box = [100 + 60 * (len(question) % 5), 100, 500, 500]
    text = json.dumps([{"bbox_2d": box}])
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return [0.5, http({"model": "m", "choices": [choice], "usage": usage})]


class Live:
    """The server of the live page, and its open pages in the browser. An error in the browser's console fails the test."""

    def __init__(self, browser: Browser, root: Path) -> None:
        self.browser, self.server = browser, Server(root)
        self.server.start()
        self.url = self.server.url
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.received = 0

    def visit(self, *, width: int = 1280, scheme: str = "light", query: str = "") -> Page:
        context = self.browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.complaints.append(f"thrown: {e}"))
        page.on("request", lambda r: self.asked.append(r.url) if not r.url.startswith("data:") else None)
        page.on("response", self._count)
        page.goto(self.url + query)
        return page

    def _count(self, response: Any) -> None:
        if "/picture/" not in response.url and not response.url.startswith("data:"):
            self.received += int(response.headers.get("content-length", 0))


@pytest.fixture
def live(browser: Browser, tmp_path: Path) -> Iterator[Live]:
    (tmp_path / "runs").mkdir()
    one = Live(browser, tmp_path / "runs")
    yield one
    one.server.stop()
    for context in browser.contexts:
        context.close()
    assert one.complaints == []
    assert all(url.startswith(one.url) for url in one.asked), one.asked


@pytest.mark.timeout(300)
def test_a_run_is_followed_from_its_first_answer_to_its_result(live: Live, tmp_path: Path) -> None:
    server = OddServer(answer)
    server.pages["/v1/models"] = {"data": [{"id": "m"}]}
    (tmp_path / "job.yaml").write_text(JOB.replace("URL", server.url))
    command = [sys.executable, "-m", "grounding.cli", "run", "-f", "job.yaml", "--no-preflight", "--view"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path)
    try:
        while not (
            found := re.search(r"^Live page: (http://127\.0\.0\.1:\d+/\S+/)(\?run=job)$", log.read_text(), re.M)
        ):
            assert child.poll() is None, log.read_text()
            time.sleep(0.1)
        live.url = found[1]
        page = live.visit(width=390, scheme="dark", query=found[2])
        expect(page.locator(".phase.running")).to_be_visible(timeout=60_000)
        expect(page.get_by_text("so far").first).to_be_visible(timeout=90_000)
        expect(page.get_by_role("heading", name="Newest answers")).to_be_visible()
        picture = page.locator(".strip image").first
        assert picture.evaluate("e => fetch(e.getAttribute('href')).then(r => r.status)") == 200
        seen = page.locator(".result").inner_text()
        expect(page.locator(".result")).not_to_have_text(seen, timeout=60_000)  # more answers appear without a reload
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(POOR_CONTRAST) == []
        expect(page.locator(".phase.succeeded")).to_be_visible(timeout=120_000)
        expect(page.locator(".result")).to_contain_text("% of 40 answers (95 % interval", timeout=60_000)
        expect(page.locator("#pulse")).to_contain_text("All jobs have succeeded. The run has ended", timeout=60_000)
        assert live.received < 1_000_000
        assert child.wait(60) == 0, log.read_text()
    finally:
        if child.poll() is None:
            os.kill(child.pid, signal.SIGTERM)
            child.wait(60)
        server.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_has_contrast_and_works_by_keyboard(live: Live, tmp_path: Path, width: int, scheme: str) -> None:
    images = samples.pictures(tmp_path / "pictures")
    for name in ("one", "two"):
        samples.run(tmp_path / "runs" / name, images)
    page = live.visit(width=width, scheme=scheme, query="?run=one")
    expect(page.get_by_role("heading", name="Worst answers")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".jobs").evaluate("e => e.parentElement.scrollWidth - e.parentElement.clientWidth") <= 0
    assert page.evaluate(POOR_CONTRAST) == []
    drawing = page.locator(".strip .card > svg").first
    drawing.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.get_by_label("two", exact=True).focus()
    page.keyboard.press("Space")  # select a second run in addition to the first one
    expect(page.get_by_role("rowheader", name="two/after").first).to_be_visible()
    assert "run=one" in page.url and "run=two" in page.url
    page.get_by_role("link", name="The page as a static report").click()
    expect(page.locator("#count")).to_contain_text("of 30")


def test_the_page_turns_to_a_run_that_begins_and_keeps_nothing_of_the_one_before(live: Live, tmp_path: Path) -> None:
    samples.run(tmp_path / "runs" / "one", samples.pictures(tmp_path / "pictures"))
    page = live.visit()
    expect(page.get_by_role("heading", name="Worst answers")).to_be_visible()
    (tmp_path / "runs" / "two").mkdir()
    later = (tmp_path / "runs" / "one" / "run.json").stat().st_mtime + 10
    (tmp_path / "runs" / "two" / "run.json").write_text('{"jobs": []}')
    os.utime(tmp_path / "runs" / "two" / "run.json", (later, later))
    expect(page.get_by_role("heading", name="two", exact=True)).to_be_visible()
    expect(page.locator(".result")).to_have_text("Nothing has been measured yet.")
    expect(page.get_by_role("heading", name="Worst answers")).to_be_hidden()
    link = page.get_by_role("link", name="The page as a static report")
    assert str(link.get_attribute("href")).endswith("report?run=two")


def test_a_page_says_that_its_server_has_ended(live: Live, tmp_path: Path) -> None:
    samples.run(tmp_path / "runs" / "one", samples.pictures(tmp_path / "pictures"))
    page = live.visit()
    expect(page.locator("#pulse")).to_have_text("Nothing is running.")
    live.server.stop()
    expect(page.locator("#pulse")).to_contain_text("Start egm view again")
    live.complaints = [c for c in live.complaints if "Failed to load resource: net::ERR_" not in c]
