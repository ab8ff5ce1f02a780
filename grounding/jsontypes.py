"""Types of JSON objects at the boundary of the library: unparsed input, and output documents."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
"""Unparsed data from outside: an object of YAML or JSON, a row of a user's file, an answer of a server, values of another library.

Its fields are unknown. The module that reads it converts it to a type before passing it on. `tests/unit/test_jsontypes.py` lists the
modules that may use this type.
"""

Document = dict[str, object]
"""An object to be written as JSON, or passed to a template or another library; our code does not read it"""
