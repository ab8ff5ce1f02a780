"""Access to a server: an API key, further headers, and the user's own certificate authority.

The values are secrets. They come from the environment and go only into requests: they are never written to a file, log, summary or
command line. `hide` removes them from a server's messages, because some servers repeat the key that they refuse.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grounding.errors import UserError

HIDDEN = "(hidden)"
_HEADER = "EGM_HEADER"
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class Access:
    """Secret headers of every request, and the file of certificates that replaces the system's."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: Path | None = None

    def hide(self, text: str) -> str:
        """Return `text` without the secrets."""
        for value in self.headers.values():
            text = text.replace(value.removeprefix("Bearer "), HIDDEN)
        return text

    def context(self) -> ssl.SSLContext:
        """Return the TLS context of an https connection. Raises `UserError` for a file that contains no certificate."""
        if self.ca_file is None:
            return ssl.create_default_context()
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except ssl.SSLError as error:
            text = f"contains no certificates in PEM form ({error.reason or error})"
            raise UserError(text, file=self.ca_file, field="--ca-file") from None


def header_variable(header: str) -> str:
    """Return the environment variable that holds the value of a job's header; its name ends in X_TEAM for the header `X-Team`."""
    return f"{_HEADER}_" + header.upper().replace("-", "_")


def access_of(
    environ: Mapping[str, str], key_variable: str, headers: Iterable[str] = (), ca_file: Path | None = None
) -> Access:
    """Read the access to a server from environment variables. Raises `UserError`.

    `key_variable` is the name of the API key's variable, which may be unset. Each item of `headers` is `NAME=VARIABLE`; that
    variable must be set.
    """
    found: dict[str, str] = {}
    if key := environ.get(key_variable, "").strip():
        found["Authorization"] = f"Bearer {_checked(key, key_variable)}"
    for header in headers:
        name, _, variable = header.partition("=")
        if not _NAME.fullmatch(name) or not variable:
            raise UserError(f"expected NAME=VARIABLE, found {header!r}", field="--header-env")
        if not (value := environ.get(variable, "").strip()):
            raise UserError(f"the environment variable {variable} is not set", field="--header-env")
        found[name] = _checked(value, variable)
    return Access(found, ca_file)


def _checked(value: str, variable: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise UserError("the value has characters that are not allowed in an HTTP header", field=f"${variable}")
    return value
