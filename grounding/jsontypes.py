"""Objects of JSON at the edges of the library: unparsed ones that come in, and documents that go out."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
"""Unparsed data from outside: an object of YAML or JSON, a row of a user's file, an answer of a server, values of another library.

Nothing is known of its fields. The module that reads it turns it into a type before it hands it on; which modules may name this type is
listed in `tests/unit/test_jsontypes.py`.
"""

Document = dict[str, object]
"""An object on its way out, which only a writer of JSON, a template or another library reads"""
