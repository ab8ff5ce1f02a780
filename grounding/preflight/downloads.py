"""Download what a manifest's jobs read, before they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from grounding.local.command import Order, planned_jobs
from grounding.preflight import judge, probe
from grounding.preflight.command import needs
from grounding.preflight.facts import Remote
from grounding.runtime.verdicts import raise_failures
from grounding.storage import cache_folder, fetch, in_words


def _remotes(manifests: Sequence[Path]) -> tuple[Remote, ...]:
    """Ask for the size of all remote inputs. Raises an error that lists those that cannot be downloaded, or if they do not fit together."""
    wanted = [n for m in manifests for n in needs(m, planned_jobs(m, writes=False), Order(m, Path("runs")).run_dir)]
    found = probe.inputs(wanted)
    disks = [probe.disk("cache", cache_folder())]
    what = f"The downloads of {', '.join(map(str, manifests))}"
    raise_failures(judge.remotes(found, disks), what, "Nothing was downloaded.")
    return found.remotes


def _state(remote: Remote) -> str:
    if remote.problem:
        return f"could not be checked: {remote.problem}; the files downloaded before are kept"
    return f"{in_words(remote.missing)} to download" if remote.missing else "complete"


def download(manifests: Sequence[Path], *, dry_run: bool, say: Callable[[str], None]) -> None:
    """Download the remote inputs of all jobs to the cache, in which `egm run` finds them; files that are there already are kept.

    With `dry_run`, only say how much is missing. Raises `EgmError` if a source does not exist or the sum does not fit on the disk, before
    anything is downloaded.
    """
    say("asking the hub and the stores for the sizes")
    found = _remotes(manifests)
    for remote in found:
        say(f"{remote.uri} ({remote.field}): {_state(remote)}")
    missing = sum(r.missing for r in found)
    if not found:
        say("The jobs read nothing from the hub or S3.")
    elif missing and dry_run:
        say(f"{in_words(missing)} to download to {cache_folder()}; nothing was downloaded")
    elif missing:
        for remote in found:
            if not remote.problem:
                say(f"{remote.uri} -> {fetch(remote.uri, say=say)}")
    elif any(r.problem for r in found):
        say("Nothing was downloaded. The same command checks again.")
    else:
        say("All is there.")
