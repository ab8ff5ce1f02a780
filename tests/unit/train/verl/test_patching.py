"""The effect of a patch on a module of the test, and the rule that all patches are in tables."""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest

from grounding.train.verl.patching import Patch, apply, digest_of

ROOT = Path(__file__).parents[4] / "grounding"


def original() -> str:
    return "theirs"


def ours() -> str:
    return "ours"


def a_module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.original = original  # type: ignore[attr-defined]
    return module


def a_patch(module: types.ModuleType, source: str = "", **more: object) -> Patch:
    return Patch(module, "original", ours, "Because.", "Never.", source, **more)  # type: ignore[arg-type]


def test_a_patch_replaces_a_name_wherever_it_was_taken_and_only_once() -> None:
    module, taker = a_module("one"), a_module("two")
    patch = a_patch(module, also=(taker,))
    assert not patch.applied and module.original() == "theirs"
    apply([patch, patch])
    assert patch.applied and module.original() == taker.original() == "ours"


def test_a_patch_that_is_not_wanted_here_does_nothing() -> None:
    module = a_module("one")
    apply([a_patch(module, wanted=lambda: False)])
    assert module.original() == "theirs"


@pytest.mark.parametrize(("source", "warned"), [("", False), (digest_of(original), False), ("0123456789ab", True)])
def test_another_source_than_the_expected_one_is_reported(
    source: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = a_patch(a_module("one"), source)
    assert patch.has_changed() == warned
    patch.apply()
    assert ("the source of one.original differs" in capsys.readouterr().err) == warned and patch.applied


def _foreign_assignments(file: Path) -> list[str]:
    """Return the assignments with which importing a module would change an imported package."""
    tree = ast.parse(file.read_text())
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    targets = [
        target
        for node in ast.walk(
            ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])
        )
        if isinstance(node, ast.Assign) and not _guarded(tree, node)
        for target in node.targets
    ]
    return [
        f"{file.name}:{t.lineno}: {ast.unparse(t)}"
        for t in targets
        if isinstance(t, ast.Attribute) and ast.unparse(t).partition(".")[0] in imported
    ]


def _guarded(tree: ast.Module, node: ast.AST) -> bool:
    """Return whether a node is under `if __name__ == "__main__"`, because a program may change anything."""
    mains = [n for n in tree.body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    return any(node in list(ast.walk(main)) for main in mains)


def test_importing_a_module_changes_no_other_package(tmp_path: Path) -> None:
    assert [found for file in ROOT.rglob("*.py") for found in _foreign_assignments(file)] == []
    (tmp_path / "bad.py").write_text("import os\nos.sep = 1\nif os:\n    os.linesep = 2\n")
    assert [found.split(": ")[1] for found in _foreign_assignments(tmp_path / "bad.py")] == ["os.sep", "os.linesep"]
