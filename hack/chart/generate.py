"""Write the generated parts of the chart: `make chart`. `--check` writes nothing and fails if a file is out of date.

charts/egm/templates/crd-*.yaml    the CustomResourceDefinitions of `egm crds`, with the keep policy and the off switch
charts/egm/README.md               the table of values, from the comments of values.yaml
charts/egm/dashboards/*.json       the dashboards of hack/chart/dashboards
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grounding.api.crd import crds
from grounding.api.crd import text as written

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "egm"
BEGIN, END = "<!-- values: written by `make chart` -->", "<!-- end of values -->"

_HEAD = """\
{{- /* Made by `make chart` from grounding/api; do not edit. */ -}}
{{- if .Values.crds.install }}
"""
_META = """\
metadata:
  name: NAME
  labels:
    {{- include "egm.labels" . | nindent 4 }}
  {{- if .Values.crds.keep }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
"""


def crd_templates() -> dict[Path, str]:
    """Return the template of each CustomResourceDefinition by its path."""
    found = {}
    for name, definition in crds().items():
        text = written(definition)
        if "{{" in text:  # Helm would interpret it
            raise SystemExit(f"{name}: contains {{{{, which generate.py does not escape")
        meta = f"metadata:\n  name: {definition['metadata']['name']}\n"
        assert text.count(meta) == 1
        text = text.replace(meta, _META.replace("NAME", definition["metadata"]["name"]))
        found[CHART / "templates" / f"crd-{name}"] = _HEAD + text + "{{- end }}\n"
    return found


@dataclass(frozen=True)
class Value:
    """A row of the table of values."""

    path: str
    default: str
    text: str


def values(text: str) -> Iterator[Value]:
    """Yield every key that has a `# --` comment. Raises `SystemExit` if a key without children has none."""
    comment: list[str] = []
    parents: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("# -- "):
            comment = [stripped.removeprefix("# -- ")]
            continue
        if comment and stripped.startswith("# "):
            comment.append(stripped.removeprefix("# "))
            continue
        found = re.match(r"( *)([A-Za-z]+):(?: (.*))?$", line)
        if found is None:
            if not stripped:
                comment = []
            continue
        depth, key, default = len(found[1]), found[2], found[3] or ""
        parents = [(d, k) for d, k in parents if d < depth]
        if default:
            if not comment and not any(d < depth and k == "resources" for d, k in parents):
                raise SystemExit(f"values.yaml:{number}: {key} has no comment `# -- ...`")
            if comment:
                yield Value(".".join([*(k for _, k in parents), key]), default, " ".join(comment))
        elif comment:  # the comment describes a mapping as a whole
            following = [ln for ln in text.splitlines()[number:] if ln.strip()]
            inner = []
            for ln in following:
                if len(ln) - len(ln.lstrip()) <= depth:
                    break
                inner.append(ln.strip())
            yield Value(".".join([*(k for _, k in parents), key]), "{" + ", ".join(inner) + "}", " ".join(comment))
        parents.append((depth, key))
        comment = []


def readme() -> dict[Path, str]:
    """Return README.md with the current table of values."""
    path = CHART / "README.md"
    text = path.read_text()
    rows = ["| key | default | |", "|---|---|---|"]
    for value in values((CHART / "values.yaml").read_text()):
        default = value.default.replace("|", "\\|")
        default = f"`{default}`" if len(default) < 60 else "see values.yaml"
        rows.append(f"| `{value.path}` | {default} | {value.text.replace('|', chr(92) + '|')} |")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return {path: before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + after}


def boards() -> dict[Path, str]:
    """Return the JSON of the dashboards by path."""
    from dashboards import everything as made

    return {CHART / "dashboards" / name: text for name, text in made().items()}


def everything() -> dict[Path, str]:
    """Return the content of all generated files by path."""
    return crd_templates() | readme() | boards()


def main() -> int:
    """Write the files, or check them with `--check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if a file is out of date")
    options = parser.parse_args()
    stale = [p for p, text in everything().items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(everything()[path])
        sys.stderr.write(f"{'out of date' if options.check else 'wrote'}: {path.relative_to(ROOT)}\n")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
