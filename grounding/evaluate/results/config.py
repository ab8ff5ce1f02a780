"""run_config.json: under which conditions a folder's answers were given, beside its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import orjson

from grounding.jsontypes import JsonObject

FILE = "run_config.json"


class LeftOutRow(TypedDict):
    """A row of a file that was not asked, and why."""

    file: str
    line: int
    kind: str
    image: str
    message: str


class RunConfig(TypedDict):
    """What a report needs to find pictures and rows again, and what decides the answers, as this version writes it."""

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
    """Return the run_config.json of a folder, which another version or a person may have written; empty if there is none that can be read."""
    try:
        value = orjson.loads((folder / FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
