"""A patch of another package: what it replaces, why, until when, and the source that it was written for.

Importing a module with patches changes nothing. `apply` does, and is called by the modules that verl loads by name (`plugin*.py`,
`callback.py`).
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
    """One attribute of another package that is replaced."""

    owner: Any
    """The module or class that has it"""
    name: str
    replacement: Any
    reason: str
    needless: str
    """When the patch can be removed"""
    source: str
    """Digest of the original's source (`digest_of`) that the replacement was written for; empty if it does not depend on that"""
    also: tuple[Any, ...] = ()
    """Further modules that have imported the name from `owner`"""
    wanted: Callable[[], bool] = lambda: True
    """Whether the patch applies in this process"""

    @property
    def title(self) -> str:
        """Return the full name of what is replaced."""
        return f"{self.owner.__name__}.{self.name}"

    @property
    def applied(self) -> bool:
        """Return whether the replacement is in place."""
        return vars(self.owner).get(self.name) is self.replacement

    def has_changed(self) -> bool:
        """Return whether the original, which must not be replaced yet, differs from the one that the patch was written for."""
        return bool(self.source) and digest_of(getattr(self.owner, self.name)) != self.source

    def apply(self) -> None:
        """Replace it once. Print a warning to stderr if the original is not the expected one."""
        if self.applied or not self.wanted():
            return
        if self.has_changed():
            print(  # noqa: T201
                f"rl: {self.title} is not the source that our patch was written for; installed is another release",
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
    """Apply patches in their order."""
    for patch in patches:
        patch.apply()
