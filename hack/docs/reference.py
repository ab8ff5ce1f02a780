"""Write the generated parts of the documentation: `make docs`. `--check` only checks them.

docs/reference.md lists every field of both kinds. The tables of environment variables and of benchmarks are sections of other pages, between
two comments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import benchmarks
from egm_operator import settings
from pydantic import BaseModel

from grounding.api import KINDS, checks
from grounding.api.explain import notes, type_name
from grounding.api.manifest import submodel
from grounding.runtime.environment import Environment, RlEnvironment, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "reference.md"
PARTS = {
    "benchmarks.md": {"results of make bench": benchmarks.results, "conditions of make bench": benchmarks.conditions},
    "images.md": {
        "variables of a role": lambda: table(Environment),
        "variables of verl": lambda: table(RlEnvironment),
    },
    "operator.md": {"settings of the operator": settings.table, "rules of the operator": checks.table},
}
"""Page -> title of a section -> function that generates it"""
HEAD = """\
# Reference

Every field of both kinds, written by `make docs` from the models that also give the CustomResourceDefinitions, `egm validate` and `egm
explain`. The default of a hyperparameter is shown for each method, with the presets that differ from it
([jobs.md](jobs.md)).
"""


def fields(model: type[BaseModel], path: str) -> Iterator[str]:
    """Yield one row per field, depth first."""
    for name, field in model.model_fields.items():
        here = f"{path}.{field.alias or name}"
        known = "; ".join(notes(model, field))
        text = " ".join((field.description or "").split()) + (f" *{known}*" if known else "")
        yield f"| `{here}` | {type_name(field.annotation)} | {text.replace('|', chr(92) + '|')} |"
        inner = submodel(field.annotation)
        if inner is not None:
            yield from fields(inner, here + ("[]" if type_name(field.annotation).startswith("[]") else ""))


def page() -> str:
    """Return the content of docs/reference.md."""
    parts = [HEAD]
    for name, kind in KINDS.items():
        parts.append(f"\n## {name} (`{kind.short_name}`)\n\n{kind.__doc__}\n")
        for part in ("spec", "status"):
            model = submodel(kind.model_fields[part].annotation)
            assert model is not None
            parts.append("\n".join(["", "| field | type | |", "|---|---|---|", *fields(model, part), ""]))
    return "".join(parts)


def filled(text: str, title: str, part: str) -> str:
    """Return a page with one of its sections replaced."""
    begin, end = f"<!-- {title}: make docs -->\n", "<!-- end -->"
    before, _, rest = text.partition(begin)
    assert rest, f"the page has no section that begins with {begin.strip()!r}"
    return f"{before}{begin}{part}{end}{rest.partition(end)[2]}"


def pages() -> dict[Path, str]:
    """Return the expected content of every page with a generated part."""
    made = {PAGE: page()}
    for name, parts in PARTS.items():
        text = (DOCS / name).read_text()
        for title, make in parts.items():
            text = filled(text, title, make())
        made[DOCS / name] = text
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        if path.exists() and path.read_text() == text:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{path.name} is out of date; run `make docs`")
        path.write_text(text)
