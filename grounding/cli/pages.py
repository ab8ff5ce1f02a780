"""Pages that a command serves or has written: open them in this machine's browser, and serve until Ctrl-C."""

from __future__ import annotations

import os
import sys
import threading

import typer


def can_open() -> bool:
    """Return whether this machine can show windows. If not, Python would start a text browser, such as w3m, in this terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))


def open_page(address: str) -> None:
    """Open an address in the browser, or print it if there is no browser."""
    import webbrowser

    if not can_open() or not webbrowser.open(address):
        typer.echo(f"There is no browser on this machine. Open this address elsewhere: {address}", err=True)


def until_interrupted() -> None:
    """Wait for Ctrl-C. Raises `KeyboardInterrupt`."""
    threading.Event().wait()
