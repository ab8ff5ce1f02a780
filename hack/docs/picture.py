"""The README's picture: the chart of the demo's own run, as a browser shows it.

    make demo && .venv/bin/python hack/docs/picture.py

Needs Chromium. The page and the width are arguments; nothing is fetched.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]


def picture(page_file: Path, width: int, selector: str, scheme: str = "light") -> Image.Image:
    """Return what a headless Chromium shows of the elements of a page, twice as large as on the screen."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        sys.exit("error: no Chromium here; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=2, offline=True
        )
        page = context.new_page()
        page.goto(page_file.resolve().as_uri())
        if page.locator("label[for=axis-flops]").count():  # what no other load of the machine changes
            page.locator("label[for=axis-flops]").click()
        shot = (
            page.locator(selector).locator("visible=true").first.screenshot()
            if selector
            else page.screenshot(full_page=True)
        )
        browser.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "runs/demo/report/demo-scaling.html")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs/pictures/scaling.webp")
    parser.add_argument("--width", type=int, default=760)
    parser.add_argument("--selector", default=".views figure svg", help="what of the page; empty: all of it")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    if not given.page.is_file():
        sys.exit(f"error: {given.page} is not there; `make demo` writes it")
    shown = picture(given.page, given.width, given.selector, "dark" if given.dark else "light")
    shown.save(given.out, quality=85)
    sys.stdout.write(f"{given.out}: {shown.width} x {shown.height} pixels\n")


if __name__ == "__main__":
    main()
