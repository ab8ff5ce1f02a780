"""Create the README's picture: the chart of the demo's own run, as a browser shows it.

    make demo && .venv/bin/python hack/docs/picture.py

Needs Chromium. Page and width are arguments; nothing is downloaded.
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
    """Return a headless Chromium's rendering of the selected elements of a page, at twice the screen's resolution."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        sys.exit("error: Chromium is not installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=2, offline=True
        )
        page = context.new_page()
        page.goto(page_file.resolve().as_uri())
        if page.locator("label[for=axis-flops]").count():  # choose the axis that does not depend on the machine's load
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
    parser.add_argument(
        "--selector", default=".views figure svg", help="CSS selector of the elements to show; empty: the whole page"
    )
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    if not given.page.is_file():
        sys.exit(f"error: {given.page} does not exist; `make demo` writes it")
    shown = picture(given.page, given.width, given.selector, "dark" if given.dark else "light")
    shown.save(given.out, quality=85)
    sys.stdout.write(f"{given.out}: {shown.width} x {shown.height} pixels\n")


if __name__ == "__main__":
    main()
