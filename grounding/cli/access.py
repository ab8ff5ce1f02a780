"""Command-line options for servers that require more than an API key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HeaderEnvOption = Annotated[
    list[str],
    typer.Option(
        "--header-env", help="NAME=VARIABLE: a header with its value in that environment variable; repeatable."
    ),
]
CaFileOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Certificates (PEM) to trust for https.")
]
