"""The termination message of a role: JSON of at most 4096 bytes, which Kubernetes keeps when a container ends and the operator reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import orjson

from grounding.runtime import environment

LIMIT = 4096
Document = MutableMapping[str, Any]
Step = Callable[[Document], object]
"""Shortens a document, or does nothing if that is not possible"""


def without(*names: str) -> Step:
    """Return a step that removes the value at the path `names`."""

    def step(document: Document) -> None:
        for name in names[:-1]:
            document = document.get(name, {})
        document.pop(names[-1], None)

    return step


def fitting(document: Document, steps: Iterable[Step]) -> bytes:
    """Return a document as JSON, applying the shortening `steps` in order until it fits. Changes the document."""
    text = orjson.dumps(document)
    for step in steps:
        if len(text) <= LIMIT:
            break
        step(document)
        text = orjson.dumps(document)
    return text


def leave(message: Callable[[], bytes]) -> None:
    """Write a message to `$EGM_TERMINATION_LOG` if it is set. Ignore write errors, because the work is already done."""
    path = environment.of_process().termination_log
    if path is not None:
        with contextlib.suppress(OSError):
            path.write_bytes(message())  # a mounted file cannot be replaced, only written to
