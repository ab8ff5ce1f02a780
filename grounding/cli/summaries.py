"""List commands in `egm --help` with their complete first sentence, whatever the width of the terminal."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperGroup


class Group(TyperGroup):
    """A group of commands. Its help shows the complete first sentence of each command, on several lines if needed."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        rows = [(name, first_sentence(command.help or "")) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, as one line. Pure."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`])\. (?=[A-Z`])", paragraph)[0].removesuffix(".") + "."
