"""Pictures of the dashboards, from what a Prometheus holds: one PNG a dashboard, drawn by Grafana's published components in a headless Chromium.

    python hack/dashboards/pictures.py --prometheus http://127.0.0.1:9090 --out docs/pictures --minutes 15 --set training:job=egm8b-rl

There is no Grafana here: this asks Prometheus (plan.py says what), hands the answers to a page (page/) and takes its picture.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import BrowserContext, Error, Route, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))

import plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BOARDS = ROOT / "charts" / "egm" / "dashboards"
BUILT = ROOT / ".cache" / "pictures"
PACKAGES = HERE / "node_modules"
ICONS = PACKAGES / "@grafana" / "ui" / "dist" / "public" / "img" / "icons"
FONTS = {
    "inter/Inter-Regular.woff2": PACKAGES / "@fontsource" / "inter" / "files" / "inter-latin-400-normal.woff2",
    "inter/Inter-Medium.woff2": PACKAGES / "@fontsource" / "inter" / "files" / "inter-latin-500-normal.woff2",
    "roboto/L0xTDF4xlVMF-BfR8bXMIhJHg45mwgGEFl0_3vrtSM1J-gEPT5Ese6hmHSh0mQ.woff2": PACKAGES
    / "@fontsource"
    / "roboto-mono"
    / "files"
    / "roboto-mono-latin-400-normal.woff2",
}
"""Where Grafana's styles look for fonts -> where they lie."""
ADDRESS = "http://page.invalid/"  # answered below; no name is ever looked up
WIDTH = 1600
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
Wanted = Mapping[str, Sequence[str]]


def build() -> None:
    """The page as one script and one stylesheet."""
    if not (HERE / "node_modules").is_dir():
        raise plan.Mistake("the page's packages are not there: `npm ci` in hack/dashboards, or `make pictures`")
    command = [
        str(HERE / "node_modules" / ".bin" / "esbuild"), str(HERE / "page" / "main.jsx"), "--bundle", f"--outfile={BUILT / 'page.js'}",
        "--jsx=automatic", "--loader:.ttf=empty", "--minify", "--log-level=warning",
        '--define:process.env.NODE_ENV="production"',
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise plan.Mistake(f"esbuild: {done.stderr}")


class Prometheus:
    """Its HTTP API."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def __call__(self, path: str, **query: Any) -> Any:
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(query, doseq=True)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise plan.Mistake(f"{query}: {error.read().decode(errors='replace')}") from None
        except OSError as error:
            raise plan.Mistake(f"{self.address}: {error}") from None

    def ask(self, question: plan.Question, view: plan.View) -> Any:
        if question.instant:
            return self("query", query=question.expr, time=view.end)
        # whole steps, as Grafana aligns them: a picture a second later has the same points
        begin, end = (t - t % view.step for t in (view.begin, view.end))
        return self("query_range", query=question.expr, start=begin, end=end, step=view.step)


def choices(
    board: Mapping[str, Any], wanted: Wanted, prometheus: Prometheus, view: plan.View
) -> dict[str, tuple[str, ...]]:
    """Values of all variables, each by those before it."""
    found: dict[str, tuple[str, ...]] = {}
    for variable in plan.variables(board):
        series, label = plan.values_query(variable)
        match = {"match[]": plan.expand(series, found, view)}
        offered = prometheus(f"label/{label}/values", start=view.begin, end=view.end, **match)
        found[variable["name"]] = plan.choose(variable, wanted.get(variable["name"], ()), offered)
    return found


def told(
    board: Mapping[str, Any], wanted: Wanted, prometheus: Prometheus, view: plan.View
) -> tuple[dict[str, Any], list[str]]:
    """What the page needs to draw a board, and the titles of panels that would be empty."""
    if problems := plan.unknown(board):
        raise plan.Mistake("\n".join(problems))
    chosen = choices(board, wanted, prometheus, view)
    panels = [{**panel, "frames": []} for panel in plan.flat(board)]
    for question in plan.questions(board, chosen, view):
        panel = panels[question.panel]
        panel["frames"] += plan.frames(question, prometheus.ask(question, view), view, len(panel["targets"]) == 1)
    labels = [
        {"label": v.get("label") or v["name"], "values": ["All" if c == ".*" else c for c in chosen[v["name"]]]}
        for v in plan.variables(board)
    ]
    page = {
        "title": board["title"],
        "panels": panels,
        "variables": labels,
        "from": 1000 * view.begin,
        "to": 1000 * view.end,
    }
    return page, [panel["title"] for panel in panels if plan.empty(panel, panel["frames"])]


def _answer(route: Route) -> None:
    """The page, its script and stylesheet, and Grafana's icons, from files; anything else is not there."""
    path = urllib.parse.urlsplit(route.request.url).path.lstrip("/")
    icon, font = ICONS / path.removeprefix("public/build/img/icons/"), FONTS.get(path.removeprefix("public/fonts/"))
    if not path:
        route.fulfill(path=HERE / "page" / "index.html", content_type="text/html")
    elif path in ("page.js", "page.css"):
        route.fulfill(path=BUILT / path)
    elif path.startswith("public/") and icon.is_file():
        route.fulfill(path=icon, content_type="image/svg+xml")
    elif font:
        route.fulfill(path=font, content_type="font/woff2")
    else:
        route.abort()


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """A Chromium that reaches nothing."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise plan.Mistake("there is no Chromium on PATH; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        context = opened.new_context(
            viewport={"width": WIDTH, "height": 1000},
            color_scheme="dark",
            reduced_motion="reduce",
            timezone_id="UTC",
            locale="en-US",
        )
        context.route("**/*", _answer)
        yield context
        opened.close()


def draw(chromium: BrowserContext, data: Mapping[str, Any]) -> bytes:
    """The board as PNG, all of it."""
    complaints: list[str] = []
    page = chromium.new_page()
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.goto(ADDRESS)
    # all of it in sight from the beginning: tables draw what is
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in data["panels"])
    page.set_viewport_size({"width": WIDTH, "height": 40 * bottom + 100})
    page.evaluate("data => window.draw(data)", data)
    try:
        page.wait_for_function("document.body.dataset.drawn", timeout=60_000)
    except Error as error:
        raise plan.Mistake(f"{data['title']}: {'; '.join(complaints) or error}") from None
    if complaints:
        raise plan.Mistake(f"{data['title']}: {'; '.join(complaints)}")
    png = page.locator("#board").screenshot(animations="disabled")
    page.close()
    return png


def small(png: bytes) -> bytes:
    """The same picture in at most 256 colours: few are lost in a dark chart, and most of the bytes."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    out = io.BytesIO()
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def pictures(
    address: str, out: Path, view: plan.View, wanted: Mapping[str, Wanted], names: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Write a picture of each board; titles of empty panels by board. `wanted`: values of variables by board, `*` for all boards."""
    boards = {path.stem: json.loads(path.read_text()) for path in sorted(BOARDS.glob("*.json"))}
    if strange := [n for n in (*names, *wanted) if n not in (*boards, "*")]:
        raise plan.Mistake(f"there is no dashboard {', '.join(strange)}; there are {', '.join(boards)}")
    for name in (n for n in wanted if n != "*"):
        there = [v["name"] for v in plan.variables(boards[name])]
        if strange := [n for n in wanted[name] if n not in there]:
            raise plan.Mistake(
                f"{name}: there is no variable {', '.join(strange)}; there are {', '.join(there) or 'none'}"
            )
    BUILT.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    build()
    prometheus, empty = Prometheus(address), {}
    with browser() as chromium:
        for name in names or boards:
            data, empty[name] = told(boards[name], {**wanted.get("*", {}), **wanted.get(name, {})}, prometheus, view)
            (out / f"dashboard-{name}.png").write_bytes(small(draw(chromium, data)))
    return empty


def _wanted(texts: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for text in texts:
        head, equals, value = text.partition("=")
        board, colon, name = head.rpartition(":")
        if not equals or not name:
            raise plan.Mistake(f"--set {text}: VARIABLE=VALUE or DASHBOARD:VARIABLE=VALUE is meant")
        found.setdefault(board if colon else "*", {}).setdefault(name, []).append(value)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prometheus", required=True, help="its address, such as http://127.0.0.1:9090")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "pictures", help="folder for the pictures (docs/pictures)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="how much time they show, up to --end (60)")
    parser.add_argument("--end", type=float, help="in seconds since 1970 (now)")
    parser.add_argument("--scrape", type=float, default=15, help="seconds between two scrapes (15)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="[DASHBOARD:]VARIABLE=VALUE", help="may be given several times"
    )
    parser.add_argument("--complete", action="store_true", help="fail where a panel has no data")
    parser.add_argument("dashboards", nargs="*", help="names of files without .json (all)")
    asked = parser.parse_args()
    end = asked.end or time.time()
    view = plan.View(end - 60 * asked.minutes, end, max(asked.scrape, round(60 * asked.minutes / 300)), asked.scrape)
    try:
        empty = pictures(asked.prometheus, asked.out, view, _wanted(asked.set), asked.dashboards)
    except plan.Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    for name, titles in empty.items():
        path = asked.out / f"dashboard-{name}.png"
        print(f"{path}: {path.stat().st_size // 1000} kB" + (f"; without data: {', '.join(titles)}" if titles else ""))
    return int(asked.complete and any(empty.values()))


if __name__ == "__main__":
    sys.exit(main())
