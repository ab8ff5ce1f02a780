"""A patch of another package: what it replaces, why, until when, and the source that it was written for.

Importing a module with patches changes nothing. The modules that verl loads by name (`plugin*.py`, `callback.py`) call `apply`.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of another package."""

    owner: Any
    """The module or class that has the attribute"""
    name: str
    replacement: Any
    reason: str
    needless: str
    """Condition under which the patch can be removed"""
    source: str
    """Digest (`digest_of`) of the original source for which the replacement was written; empty if any source is accepted"""
    also: tuple[Any, ...] = ()
    """Further modules that have imported the attribute from `owner`"""
    wanted: Callable[[], bool] = lambda: True
    """Whether the patch applies in this process"""

    @property
    def title(self) -> str:
        """Return the full name of the replaced attribute."""
        return f"{self.owner.__name__}.{self.name}"

    @property
    def applied(self) -> bool:
        """Return whether the replacement is in place."""
        return vars(self.owner).get(self.name) is self.replacement

    def has_changed(self) -> bool:
        """Return whether the original differs from the one for which the patch was written. Call it before `apply`."""
        return bool(self.source) and digest_of(getattr(self.owner, self.name)) != self.source

    def apply(self) -> None:
        """Replace the attribute, once. Print a warning to stderr if the original is not the expected one."""
        if self.applied or not self.wanted():
            return
        if self.has_changed():
            print(  # noqa: T201
                f"rl: the source of {self.title} differs from the one that our patch was written for; another release is installed",
                file=sys.stderr,
                flush=True,
            )
        for owner in (self.owner, *self.also):
            setattr(owner, self.name, self.replacement)


def digest_of(original: Any) -> str:
    """Return a short digest of the source of a function or class; empty if it has none."""
    try:
        return hashlib.sha256(inspect.getsource(original).encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return ""


def apply(patches: Sequence[Patch]) -> None:
    """Apply patches in order."""
    for patch in patches:
        patch.apply()
