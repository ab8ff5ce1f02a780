"""docs/reference.md from the models: every field of both kinds with type, default and what it means. `make docs`; `--check` writes nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from grounding.api import KINDS
from grounding.api.explain import _notes, type_name
from grounding.api.manifest import submodel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"
HEAD = """\
# Reference

Every field of both kinds, written by `make docs` from the models that also give the CustomResourceDefinitions, `egm validate` and `egm
explain`. A preset may fill fields that have no default here ([jobs.md](jobs.md)).
"""


def fields(model: type[BaseModel], path: str) -> Iterator[str]:
    """A row a field, depth first."""
    for name, field in model.model_fields.items():
        here = f"{path}.{field.alias or name}"
        notes = "; ".join(_notes(field))
        text = " ".join((field.description or "").split()) + (f" *{notes}*" if notes else "")
        yield f"| `{here}` | {type_name(field.annotation)} | {text.replace('|', chr(92) + '|')} |"
        inner = submodel(field.annotation)
        if inner is not None:
            yield from fields(inner, here + ("[]" if type_name(field.annotation).startswith("[]") else ""))


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, kind in KINDS.items():
        parts.append(f"\n## {name} (`{kind.short_name}`)\n\n{kind.__doc__}\n")
        for part in ("spec", "status"):
            model = submodel(kind.model_fields[part].annotation)
            assert model is not None
            parts.append("\n".join(["", "| field | type | |", "|---|---|---|", *fields(model, part), ""]))
    return "".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == text else f"{PAGE.name} is out of date: make docs")
    PAGE.write_text(text)
