"""Remove possible secrets from a job, for reports, tracking and other data that people share. Pure."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "(hidden)"
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def without_secrets(document: Any) -> Any:
    """Return plain data in which every literal value of a podTemplate's environment, every command with its arguments, and every user and
    password in a URL is replaced.

    References to Secrets are kept, because they contain only names.
    """
    if isinstance(document, dict):
        return {
            key: _without_environment(value) if key in ("podTemplate", "podTemplates") else without_secrets(value)
            for key, value in document.items()
        }
    if isinstance(document, list):
        return [without_secrets(value) for value in document]
    return _USERINFO.sub(HIDDEN, document) if isinstance(document, str) else document


def _without_environment(template: Any) -> Any:
    if isinstance(template, list):
        return [_without_environment(value) for value in template]
    if not isinstance(template, dict):
        return without_secrets(template)
    hidden = {}
    for key, value in template.items():
        if key == "env" and isinstance(value, list):
            hidden[key] = [_named_only(entry) for entry in value]
        elif key in ("args", "command") and isinstance(value, list):
            hidden[key] = [HIDDEN for _ in value]  # arguments may also contain keys
        else:
            hidden[key] = _without_environment(value)
    return hidden


def _named_only(entry: Any) -> Any:
    return {k: HIDDEN if k == "value" else v for k, v in entry.items()} if isinstance(entry, dict) else HIDDEN
