"""How `egm --help` lists commands: whole first sentences, whatever the terminal's width."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperGroup


class Group(TyperGroup):
    """A group of commands whose help shows the whole first sentence of each, in as many lines as it takes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        rows = [(name, first_sentence(command.help or "")) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, as one line. Pure."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`])\. (?=[A-Z`])", paragraph)[0].removesuffix(".") + "."
