"""Pages that a command serves or has written: open them in this machine's browser, and serve until Ctrl-C."""

from __future__ import annotations

import os
import sys
import threading

import typer


def can_open() -> bool:
    """Return whether this machine shows windows. Without them, Python would start a browser for terminals, such as w3m, in this one."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))


def open_page(address: str) -> None:
    """Open an address in the browser, or say that there is none."""
    import webbrowser

    if not can_open() or not webbrowser.open(address):
        typer.echo(f"There is no browser on this machine; open it elsewhere: {address}", err=True)


def until_interrupted() -> None:
    """Wait for Ctrl-C. Raises `KeyboardInterrupt`."""
    threading.Event().wait()
