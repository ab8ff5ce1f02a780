"""Drawing prose for a reader (hack/docs/draw_prose.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_prose", ROOT / "hack/docs/draw_prose.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _lines(units: object) -> list[tuple[int, int, str]]:
    return [(unit.first, unit.last, unit.kind) for unit in sorted(units)]  # type: ignore[call-overload]


def test_docstrings_comments_and_messages_of_python(draw: ModuleType) -> None:
    text = '''"""Return the first line of all.

A second paragraph follows here,
on two lines.
"""
# A comment of several words
# that continues here.
x = 1  # beside a statement it is a comment of its own
raise UserError(f"the file {x} is not what it should be")
y = "prompt_tokens_total of_vllm per_second since_start of"  # type: ignore
y = "self.a == 1 && has(self.b) || self.c > 2"
'''
    expected = [(1, 1, "docstring"), (3, 5, "docstring"), (6, 7, "comment"), (8, 8, "comment")]
    assert _lines(draw.of_file("a.py", text)) == [*expected, (9, 9, "message")]
    assert _lines(draw.of_file("tests/a.py", text)) == expected


def test_paragraphs_items_and_rows_of_a_page_without_its_code(draw: ModuleType) -> None:
    text = """# The title of this page
A paragraph of several words
on two lines.

- the first item of this list
- the second item of this list

```sh
a command of several words here
```

| one row of a table |
| another row of the table |
"""
    found = [(first, last) for first, last, _ in _lines(draw.of_file("a.md", text))]
    assert found == [(1, 1), (2, 3), (5, 5), (6, 6), (12, 12), (13, 13)]


def test_comments_of_other_files_and_nothing_of_data(draw: ModuleType) -> None:
    text = "# why this value was chosen\na: 1  # not enough\n"
    assert _lines(draw.of_file("values.yaml", text)) == [(1, 1, "comment")]
    assert _lines(draw.of_file("data.json", text)) == []


def test_the_units_of_a_checkout_have_a_fixed_order(draw: ModuleType, tmp_path: Path) -> None:
    for name in ("b.md", "a.md", "unknown.md"):
        (tmp_path / name).write_text("one sentence of the page\n")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "b.md", "a.md", "a.png"], cwd=tmp_path, check=True)
    assert [unit.file for unit in draw.collect(tmp_path)] == ["a.md", "b.md"]
    unit = draw.collect(tmp_path)[0]
    assert draw.show(tmp_path, unit, 2) == "a.md:1 (page)\n| one sentence of the page"
