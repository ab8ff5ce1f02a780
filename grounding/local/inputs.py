"""The state of a job's inputs, to detect whether the inputs of a finished job have changed.

Files are not read completely. If a state differs, the job's roles are started, and they compare the content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from grounding.api import Job
from grounding.data.jobdata import sources
from grounding.data.tars import parts_of
from grounding.errors import EgmError
from grounding.files import digest_of
from grounding.storage import Transfer, is_remote, listing, locate

_BRIEF = Transfer(patience_s=5.0)


def inputs_of(job: Job) -> tuple[str, ...]:
    """Return the paths and URIs that the job reads: data, pictures, model, and the user's reward or scoring code. Pure."""
    found = [source for source, _ in sources(job, prepares=True)]
    found += [m.source for m in job.spec.models if m.source and not m.source.startswith("tiny://")]
    if job.kind == "GroundingTrainJob" and job.spec.reward.file:
        found.append(job.spec.reward.file)
    if job.kind == "GroundingEvalJob" and job.spec.scoring_file:
        found.append(job.spec.scoring_file)
    return tuple(dict.fromkeys(found))


def states(inputs: Sequence[str]) -> dict[str, str]:
    """Return the state of each input, which changes with its content. The state is empty if the input is missing or unreadable."""
    return {each: _state(each) for each in inputs}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the inputs whose state is known and has changed. Pure."""
    return [each for each, state in now.items() if state and before.get(each) and before[each] != state]


def _state(source: str) -> str:
    with suppress(EgmError, OSError):
        if is_remote(source):
            return digest_of(listing(source, _BRIEF))
        path = locate(source).folder
        if path.is_dir():
            files = [Path(top, name) for top, _, names in os.walk(path, followlinks=True) for name in names]
        else:
            files = [path] if path.is_file() else parts_of(path)
        found = [(os.path.relpath(f, path), f.stat()) for f in sorted(files)]
        return digest_of([[n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for n, s in found]) if found else ""
    return ""
