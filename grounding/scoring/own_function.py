"""Check a user's function in a Python file without running it, then load it once per process."""

from __future__ import annotations

import ast
import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from grounding.errors import UserError


@dataclass(frozen=True)
class Form:
    """The requirements on a user's function. `field` and `name_field` are the job's fields that name the file and the function."""

    arguments: tuple[str, ...]
    returns: str
    field: str
    name_field: str

    @property
    def sentence(self) -> str:
        """Return the signature for messages."""
        return f"It must be `def NAME({', '.join(self.arguments)})`, and return {self.returns}."


def inspect(file: Path, name: str, form: Form) -> None:
    """Check the function `name` in `file` without running anything. Raises `UserError` with file and line if the file is not Python, or has
    no such function, or its parameters are wrong.
    """
    if not file.is_file():
        raise UserError("no such file", file=file, field=form.field)
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        raise UserError(f"not valid Python: {error.msg}", file=file, line=error.lineno or 0, field=form.field) from None
    except ValueError as error:  # null bytes
        raise UserError(f"not valid Python: {error}", file=file, field=form.field) from None
    functions = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    found = functions.get(name)
    if found is None:
        known = ", ".join(functions) if functions else "none"
        hint = f"Its functions: {known}. Set {form.name_field} to one of them."
        raise UserError(f"has no function {name}", file=file, field=form.name_field, hint=hint)
    where = {"file": file, "line": found.lineno, "field": form.field, "hint": form.sentence}
    if isinstance(found, ast.AsyncFunctionDef):
        raise UserError(f"{name} is async", **where)  # type: ignore[arg-type]
    taken = found.args
    positional, wanted = len(taken.posonlyargs) + len(taken.args), len(form.arguments)
    required = positional - len(taken.defaults)
    keywords = [a.arg for a, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True) if default is None]
    if required > wanted or (positional < wanted and taken.vararg is None) or keywords:
        raise UserError(f"{name} cannot be called with {wanted} arguments", **where)  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def load(file: str, name: str) -> Callable[..., Any]:
    """Return the function. The file is executed once per process."""
    spec = importlib.util.spec_from_file_location("egm_own_function", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def failed(file: Path, name: str, answer: str, error: Exception, form: Form) -> UserError:
    """Return the `UserError` for an exception that the function has raised for an answer, with the line in the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    what = f"{name} failed for the answer {answer[:200]!r}: {type(error).__name__}: {error}"
    return UserError(what, file=file, line=(lines or [0])[-1] or 0, field=form.field, hint=form.sentence)
