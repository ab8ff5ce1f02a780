"""Every page: links have a target, no placeholder is left, and prose is wrapped at 100 columns so that diffs are readable."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "images").glob("*.md")])
WRITTEN_BY_A_PROGRAM = {"reference.md"}
PLACEHOLDER = re.compile(r"\b(TODO|FIXME|XXX|TBD|[A-Z]{4,}FIGURES|lorem ipsum)\b", re.IGNORECASE)


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines outside code fences, with their numbers from 1."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = [line.lstrip("#").strip() for _, line in _prose(page.read_text()) if re.match(r"#+\s", line)]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", head)).lower()) for head in heads}


def _dead_links(page: Path) -> Iterator[str]:
    for number, line in _prose(page.read_text()):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                yield f"{page.name}:{number}: {target}: no such file"
            elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
                yield f"{page.name}:{number}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert list(_dead_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_placeholder_is_left(page):
    found = [
        f"{page.name}:{n}: {line}"
        for n, line in enumerate(page.read_text().splitlines(), 1)
        if PLACEHOLDER.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in WRITTEN_BY_A_PROGRAM], ids=lambda p: str(p.relative_to(ROOT))
)
def test_prose_is_wrapped_at_100_columns(page):
    def may_be_long(line: str) -> bool:
        return line.lstrip().startswith(("|", "<", "#")) or "http" in line or " " not in line.strip()

    assert [
        f"{page.name}:{n}" for n, line in _prose(page.read_text()) if len(line) > 100 and not may_be_long(line)
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_command_is_wrapped_like_prose(page):
    """A backslash in the middle of a line shows that a command was wrapped like prose."""
    found = [f"{page.name}:{n}" for n, line in enumerate(page.read_text().splitlines(), 1) if " \\ --" in line]
    assert found == []


def test_a_dead_link_and_an_unwrapped_line_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Here\n[a](there.md) [b](#here) [c](#nowhere) `[d](code.md)`\n```\n[e](fenced.md)\n```\n")
    assert [line.split(": ")[1] for line in _dead_links(page)] == ["there.md", "#nowhere"]


DESIGN = (ROOT / "docs" / "design.md").read_text()
WRITTEN_BY_TOOLS = {"__pycache__"}


def _named_paths() -> set[str]:
    """Return the folders and modules in the first column of the design's table."""
    rows = [line.split("|")[1] for line in DESIGN.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([a-z_/.]+)`", row) if "/" in name}


def _folders(*parents: str) -> set[str]:
    """Return the package folders directly in some folders."""
    found = (p for parent in parents for p in (ROOT / parent).iterdir() if p.is_dir())
    return {f"{p.relative_to(ROOT)}/" for p in found if p.name not in WRITTEN_BY_TOOLS and any(p.glob("*.py"))}


def test_what_the_design_names_is_there():
    named = _named_paths()
    assert len(named) > 30 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "parent", ["grounding", "grounding/train", "grounding/evaluate", "operator/egm_operator", "operator", "."]
)
def test_the_design_names_every_package_folder_and_module(parent):
    named = _named_paths()
    missing = {f for f in _folders(parent) if not any(name == f or name.startswith(f) for name in named)}
    assert missing == set()


def test_the_design_names_every_module_beside_the_packages():
    modules = {f"grounding/{p.name}" for p in (ROOT / "grounding").glob("*.py")} - {"grounding/__init__.py"}
    assert modules - _named_paths() == set()
    operator = {p.name for p in (ROOT / "operator/egm_operator").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in operator if f"`{name}`" not in DESIGN} == set()


# ---- private words
PRIVATE = re.compile(
    r"\b(the house|in the house|roll call|nanny|last words|mend(s|ed|ing)?|teller|told_all|take_in)\b", re.IGNORECASE
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_use_the_terms_of_the_field(page):
    found = [
        f"{page.name}:{n}: {line}" for n, line in enumerate(page.read_text().splitlines(), 1) if PRIVATE.search(line)
    ]
    assert found == []


def test_the_glossary_names_each_word_once():
    rows = re.findall(
        r"^\| ([a-z -]+) \|", (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2], re.MULTILINE
    )
    assert len(rows) > 20 and len(rows) == len(set(rows))


OF_OTHERS = {
    "vlmeval/dataset/refcoco.py",
    "internvl_chat/eval/refcoco/evaluate_grounding.py",
    "convert_gpt_to_qwen3_sft.py",
    "mine.py",
}
"""Files of other projects, and of a user"""


def _tracked() -> list[str]:
    return [
        str(file.relative_to(ROOT))
        for folder in ("grounding", "operator", "bench", "hack", "images", "tests", "charts")
        for file in (ROOT / folder).rglob("*.py")
    ]


def test_modules_that_texts_name_exist():
    """Docstrings and pages name only modules that exist."""
    known = {f"/{name}" for name in _tracked()}
    texts = [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / "grounding").rglob("*.py"),
        *(ROOT / "operator").rglob("*.py"),
    ]
    lost = {
        f"{text.relative_to(ROOT)}: {name}"
        for text in texts
        if text.name not in {"CHANGELOG.md"}
        for name in re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)`", text.read_text())
        if name not in OF_OTHERS and not any(path.endswith(f"/{name}") for path in known)
    }
    assert lost == set()
