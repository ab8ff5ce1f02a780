"""Write `grounding/api/pod_types.json`: field names and types of a Kubernetes pod template, from the installed `kubernetes` client.

The base installation has no Kubernetes client, but its `egm validate` also checks `podTemplate`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import orjson
from kubernetes.client import models

ROOT = "V1PodTemplateSpec"
OUT = Path(__file__).parents[2] / "grounding" / "api" / "pod_types.json"


def document() -> bytes:
    """Return the content of the file: the fields of each type, with the types that the client declares."""
    types: dict[str, dict[str, str]] = {}
    open_types = [ROOT]
    while open_types:
        name = open_types.pop()
        if name in types:
            continue
        model = getattr(models, name)
        types[name] = {model.attribute_map[attribute]: kind for attribute, kind in model.openapi_types.items()}
        found = (word for kind in types[name].values() for word in re.findall(r"\w+", kind))
        open_types += [word for word in found if hasattr(models, word)]
    return orjson.dumps(types, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


if __name__ == "__main__":
    OUT.write_bytes(document())
    sys.stdout.write(f"wrote: {OUT.name}\n")
