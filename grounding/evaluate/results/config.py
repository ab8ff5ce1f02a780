"""run_config.json, which is stored with the results: the conditions under which a folder's answers were given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import orjson

from grounding.jsontypes import JsonObject

FILE = "run_config.json"


class LeftOutRow(TypedDict):
    """A row of a file that was left out, and the reason."""

    file: str
    line: int
    kind: str
    image: str
    message: str


class RunConfig(TypedDict):
    """The file as this release writes it: what a report needs to find pictures and rows again, and what affects the answers."""

    model: str
    prompt: str
    scoring: str
    files: list[str]
    images: list[str]
    mode: str
    endpoints: list[str]
    concurrency: int
    request: Mapping[str, object]
    system: str
    send_images: str
    limit: int | None
    sampling: Mapping[str, object]
    body: Mapping[str, object]
    method: Mapping[str, object]
    truth: str | None
    left_out: list[LeftOutRow]
    max_errors: int
    asked_as: str | None
    settings: str


def read_config(folder: Path) -> JsonObject:
    """Return the run_config.json of a folder, which another release or a person may have written; empty if it is absent or unreadable."""
    try:
        value = orjson.loads((folder / FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
