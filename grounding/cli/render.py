"""`egm render`: print the objects that the operator would create for a manifest. The implementation is in the operator's package, which is
an optional dependency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def render(
    files: Annotated[list[Path], typer.Option("-f", "--filename", help="Manifest; may be given more than once.")],
    namespace: Annotated[str, typer.Option("-n", "--namespace", help="Namespace of jobs that give none.")] = "default",
) -> None:
    """Print the Kubernetes objects that the operator would create, with the settings from the environment (docs/operator.md)."""
    import importlib
    import os

    from grounding.errors import UserError, from_checkout

    try:  # imported by name, because this package must not depend on the operator's
        settings, found = (importlib.import_module(f"egm_operator.{m}") for m in ("settings", "render"))
    except ModuleNotFoundError as error:
        raise UserError(
            f"this command needs {error.name}, which is not installed",
            hint=from_checkout("operator"),
        ) from None
    typer.echo(found.render(files, settings.load(os.environ), namespace), nl=False)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(render)
