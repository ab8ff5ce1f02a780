"""Download what a manifest's jobs read, before they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from grounding.local.command import Order, works_of
from grounding.preflight import judge, probe
from grounding.preflight.command import needs
from grounding.preflight.facts import Remote
from grounding.runtime.verdicts import raise_failures
from grounding.storage import cache_folder, fetch, in_words


def _remotes(manifest: Path) -> tuple[Remote, ...]:
    """Ask for the size of all remote inputs. Raises an error that lists those that cannot be downloaded."""
    order = Order(manifest, Path("runs"))
    found = probe.inputs(needs(manifest, works_of(manifest), order.run_dir))
    disks = [probe.disk("cache", cache_folder())]
    raise_failures(judge.remotes(found, disks), f"The downloads of {manifest}", "Nothing was downloaded.")
    return found.remotes


def download(manifests: Sequence[Path], *, dry_run: bool, say: Callable[[str], None]) -> None:
    """Download the remote inputs of all jobs to the cache, in which `egm run` finds them; files that are there already are kept.

    With `dry_run`, only say how much is missing. Raises `EgmError` if a source does not exist or does not fit on the disk, before
    anything is downloaded.
    """
    found = {r.uri: r for manifest in manifests for r in _remotes(manifest)}
    for remote in found.values():
        amount = f"{in_words(remote.missing)} to download" if remote.missing else "complete"
        say(f"{remote.uri} ({remote.field}): {amount}")
    missing = sum(r.missing for r in found.values())
    if not found:
        say("The jobs read nothing from the hub or S3.")
    elif dry_run or not missing:
        say(
            f"{in_words(missing)} to download to {cache_folder()}; nothing was downloaded"
            if missing
            else "All is there."
        )
    else:
        for uri in found:
            say(f"{uri} -> {fetch(uri, say=say)}")
