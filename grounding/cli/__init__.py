"""The command line `egm`: thin. Each module of this folder adds one group of commands.

Exit codes: 0 done, 1 failure, 2 the caller's mistake, 130 stopped by Ctrl-C. No traceback unless `EGM_DEBUG=1`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from grounding.errors import EgmError, from_os_error

app = typer.Typer(
    name="egm",
    help="Visual grounding, from data to the eight-file RefCOCO evaluation: on this machine or on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# typer carries its own copy of click, whose base of usage errors it does not export
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("egm-grounding"))
        raise typer.Exit


@app.callback()
def _egm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


# the order of `egm --help`: what a user meets first stands first
for _area in [
    "jobs_api",
    "render",
    "run",
    "cluster",
    "serve",
    "evaluate",
    "report",
    "compare",
    "export",
    "checkpoint",
    "score",
    "data",
    "role",
]:
    importlib.import_module(f"grounding.cli.{_area}").register(app)


def _complain(error: EgmError) -> int:
    if os.environ.get("EGM_DEBUG") == "1":
        raise error
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    raise SystemExit(run(argv))


def run(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Any error that is not a bug is one paragraph on stderr."""
    try:
        code = app(argv, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except EgmError as error:
        return _complain(error)
    except _UsageProblem as error:
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
        from grounding.errors import UserError

        missing = (error.name or "").split(".")[0]
        if missing not in {"torch", "transformers", "verl", "ray", "accelerate", "torchvision"}:
            raise
        return _complain(
            UserError(
                f"this command needs {missing}, which is not installed",
                hint="Install the extra that holds it: `pip install 'egm-grounding[cpu]'` on a machine without a GPU.",
            )
        )
