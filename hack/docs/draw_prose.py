"""Draw prose of the project at random, for someone who has not written it to judge.

Usage: `python hack/docs/draw_prose.py --seed 11 --count 100`. A unit of prose is a paragraph, list
item or table row of a page, a paragraph of a docstring, a block of comment lines, or a message in
the code (an error, a help text, a label). Each is printed with its file, its line and the lines
around it. The same seed draws the same units as long as the files do not change.
"""

import argparse
import ast
import io
import random
import re
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEWEST_WORDS = 4
WORD = re.compile(r"(?<!\S)[\W_]*[A-Za-z]?[a-z']+[\W_]*(?!\S)")
MARKS_FOR_TOOLS = re.compile(r"#\s*(type:|noqa|pragma|fmt:)")
PLAIN = re.compile(r"[A-Za-z\s.,:;'…]")
LEAST_PLAIN = 0.85  # of a message's characters; less is code, such as a CEL rule or a command
HASH_COMMENTS = {".yaml", ".yml", ".toml", ".sh", ".tpl", ".train", ".infer", ".operator"}
STARTS_ITEM = re.compile(r"\s*([-*]|\d+\.|\|)\s")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, order=True)
class Unit:
    """A unit of prose: its file, and its first and last line, counted from 1."""

    file: str
    first: int
    last: int
    kind: str


def words(text: str) -> int:
    """Return how many words the text has; a name with dots, digits or underscores is none."""
    return len(WORD.findall(text))


def _paragraphs(lines: list[str], first: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last line of each paragraph, list item and table row."""
    start: int | None = None
    for number, line in enumerate([*lines, ""], first):
        ends = not line.strip() or STARTS_ITEM.match(line) or line.startswith("#")
        if ends and start is not None:
            yield start, number - 1
            start = None
        if line.startswith("#"):  # a heading is a unit of its own
            yield number, number
        elif line.strip() and start is None:
            start = number


def of_page(file: str, text: str) -> Iterator[Unit]:
    """Yield the paragraphs, list items and table rows of a Markdown page, without code blocks."""
    lines, fenced = text.splitlines(), False
    for at, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            lines[at] = ""
        elif fenced:
            lines[at] = ""
    for first, last in _paragraphs(lines, 1):
        if words("\n".join(lines[first - 1 : last])) >= FEWEST_WORDS:
            yield Unit(file, first, last, "page")


def _blocks(file: str, comments: dict[int, tuple[str, bool]]) -> Iterator[Unit]:
    """Yield comments; comments on consecutive lines of their own are one unit."""
    first: int | None = None
    for number in sorted(comments):
        own_line = comments[number][1]
        first = number if first is None else first
        follows = comments.get(number + 1)
        if own_line and follows and follows[1]:
            continue
        block = "\n".join(comments[line][0] for line in range(first, number + 1))
        if words(block) >= FEWEST_WORDS:
            yield Unit(file, first, number, "comment")
        first = None


def of_comments(file: str, text: str) -> Iterator[Unit]:
    """Yield the comments of a file whose comments begin with a hash sign."""
    comments = {}
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"(^|\s)#+ (.*)", line):
            comments[number] = (found[2], not line[: found.start()].strip())
    yield from _blocks(file, comments)


def _message(node: ast.AST) -> str:
    """Return the text of a string, with … for its fields, or nothing if the node is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(part) or "…" for part in node.values)
    return ""


def of_python(file: str, text: str) -> Iterator[Unit]:
    """Yield docstrings and comments of a Python file, and its messages if it is not a test."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not MARKS_FOR_TOOLS.match(token.string):
            own_line = not token.line[: token.start[1]].strip()
            comments[token.start[0]] = (token.string, own_line)
    yield from _blocks(file, comments)
    tree, lines = ast.parse(text), text.splitlines()
    seen: set[int] = set()  # nodes that are docstrings, or part of a string with fields
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            string = node.body[0].value  # type: ignore[attr-defined]
            seen.add(id(string))
            for first, last in _paragraphs(lines[string.lineno - 1 : string.end_lineno], string.lineno):
                if words("\n".join(lines[first - 1 : last])) >= FEWEST_WORDS:
                    yield Unit(file, first, last, "docstring")
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in seen:
            seen.update(id(part) for part in ast.walk(node))
            message = _message(node)
            plain = len(PLAIN.findall(message)) >= LEAST_PLAIN * len(message)
            if not file.startswith("tests/") and plain and words(message) >= FEWEST_WORDS:
                yield Unit(file, node.lineno, node.end_lineno or node.lineno, "message")


def of_file(file: str, text: str) -> Iterator[Unit]:
    """Yield the units of a file by the kind of file that it is."""
    path = Path(file)
    if path.suffix == ".md":
        yield from of_page(file, text)
    elif path.suffix == ".py":
        yield from of_python(file, text)
    elif path.suffix in HASH_COMMENTS or path.name == "Makefile":
        yield from of_comments(file, text)


def collect(root: Path) -> list[Unit]:
    """Return all units of the files that git knows, in a fixed order."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True)
    files = [file for file in listed.stdout.splitlines() if (root / file).is_file()]
    return sorted({unit for file in files for unit in of_file(file, _text(root / file))})


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a picture, for example
        return ""


def show(root: Path, unit: Unit, around: int) -> str:
    """Return the unit's place and lines, and lines around it; a bar marks the unit's own."""
    lines = _text(root / unit.file).splitlines()
    first, last = max(1, unit.first - around), min(len(lines), unit.last + around)
    shown = [
        f"{'|' if unit.first <= number <= unit.last else ' '} {lines[number - 1]}" for number in range(first, last + 1)
    ]
    return "\n".join([f"{unit.file}:{unit.first} ({unit.kind})", *shown])


def main() -> None:
    """Print the units that were drawn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--around", type=int, default=2, help="lines shown before and after each")
    arguments = parser.parse_args()
    units = collect(ROOT)
    drawn = random.Random(arguments.seed).sample(units, min(arguments.count, len(units)))
    for number, unit in enumerate(drawn, 1):
        print(f"{number}. {show(ROOT, unit, arguments.around)}\n")
    print(f"{len(drawn)} of {len(units)} units, seed {arguments.seed}")


if __name__ == "__main__":
    main()
