"""A real Chromium, driven by Playwright, without network; tests/unit/report/samples.py becomes importable as `samples`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "report"))

expect.set_options(timeout=20_000)  # long, because the machine may be busy

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return this machine's Chromium. If there is none, skip the test; in CI, which installs it, fail."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no Chromium")
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open a page from its file, offline; fail if it writes errors to the console, throws, or requests anything else."""
    contexts, complaints, asked = [], [], []

    def visit(path: Path, fragment: str = "", *, width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: complaints.append(f"thrown: {e}"))
        page.on("dialog", lambda d: (complaints.append(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
        page.goto(path.resolve().as_uri() + fragment)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("file://") and url.split("#")[0].endswith(".html") for url in asked), asked
