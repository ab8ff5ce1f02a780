"""Write grounding/api/verl_keys.txt from the installed verl; `--check` only checks it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML

from grounding.api.verl_keys import KEYS


def keys(node: object, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration, including those of sections, each with the type of its value."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            here = f"{path}.{name}" if path else str(name)
            yield f"{here} {kind(value)}"
            yield from keys(value, here)


def kind(value: object) -> str:
    """Return the name of a value's type; `any` if the file does not define it."""
    if isinstance(value, Mapping):
        return "section" if value else "mapping"
    if isinstance(value, str):
        return "any" if "${" in value or value == "???" else "text"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "list" if isinstance(value, list) else "any"


def text() -> str:
    """Return the expected content of the file for the installed verl."""
    spec = find_spec("verl")
    assert spec is not None
    assert spec.origin is not None
    config = Path(spec.origin).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    return "\n".join(sorted(set(keys(YAML(typ="safe").load(config))))) + "\n"


if __name__ == "__main__":
    made = text()
    if "--check" in sys.argv and KEYS.read_text() != made:
        sys.exit("verl_keys.txt is out of date; run `python hack/docs/verl_keys.py`")
    if "--check" not in sys.argv:
        KEYS.write_text(made)
