"""The command line `egm`, a thin layer: each module of this folder adds one group of commands.

Exit codes: 0 success, 1 failure, 2 a mistake of the caller, 130 stopped by Ctrl-C. A traceback is shown only with `EGM_DEBUG=1`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from grounding.cli.summaries import Group
from grounding.errors import EgmError, from_os_error, printable
from grounding.runtime import environment

app = typer.Typer(
    name="egm",
    cls=Group,
    help="Visual grounding, from data to the eight-file RefCOCO evaluation: on this machine or on Kubernetes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# typer has its own copy of click and does not export its usage errors' base class
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("egm-grounding"))
        raise typer.Exit


@app.callback()
def _egm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


# this is the order in `egm --help`: commands that users need first come first
for _area in [
    "jobs_api",
    "plan",
    "init",
    "render",
    "run",
    "doctor",
    "setup",
    "cluster",
    "serve",
    "ask",
    "evaluate",
    "view",
    "report",
    "compare",
    "export",
    "checkpoint",
    "score",
    "rescore",
    "data",
    "role",
]:
    importlib.import_module(f"grounding.cli.{_area}").register(app)


def _debug() -> bool:
    """Return whether errors show their traceback. An invalid variable counts as false, because it must not hide the error itself."""
    try:
        return environment.of_process().debug
    except EgmError:
        return False


def _complain(error: EgmError) -> int:
    if _debug():
        raise error
    sys.stderr.write(f"error: {printable(str(error))}\n")
    return error.exit_code


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    raise SystemExit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code. An error that is not a bug is printed as one paragraph on stderr."""
    try:
        code = app(argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except EgmError as error:
        return _complain(error)
    except _UsageProblem as error:
        # typer's text has pydantic's prefix, and lists the empty default of an option as a choice
        error.message = error.message.replace("Value error, ", "").replace("is not one of '', ", "is not one of ")  # type: ignore[attr-defined]
        error.show()  # type: ignore[attr-defined]
        return 2
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return 130
    except BrokenPipeError:  # `egm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _complain(from_os_error(error))
    except ModuleNotFoundError as error:
        from grounding.errors import UserError, from_checkout

        missing = (error.name or "").split(".")[0]
        if missing not in {"torch", "transformers", "verl", "ray", "accelerate", "torchvision"}:
            raise
        return _complain(
            UserError(
                f"this command needs {missing}, which is not installed",
                hint=from_checkout("cpu"),
            )
        )
