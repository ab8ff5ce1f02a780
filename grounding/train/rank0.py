"""The context of rank 0's training, for both trainers: uploads, `/progress`, tracking, termination message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from grounding.api import ResolvedTrainJob
from grounding.runtime.grace import Stop
from grounding.train import identity
from grounding.train.checkpoints import upload as uploads
from grounding.train.checkpoints.own_disks import OwnDisks
from grounding.train.monitoring import telemetry, tracking


@contextlib.contextmanager
def surrounded(
    job: ResolvedTrainJob,
    out: Path,
    gpus: int,
    stop: Stop | None = None,
    who: identity.Identity | None = None,
    disks: OwnDisks | None = None,
) -> Iterator[tracking.Log]:
    """Continue from the job's output, and upload to it as long as the training runs. `disks`: the pods share no folder.

    Yields the function that receives the metrics of each step. `who` is compared with all existing work; raises `UserError` if the work
    belongs to another job.
    """
    with contextlib.ExitStack() as end:
        end.enter_context(identity.locked(out))
        if token := identity.restart_asked(job):
            identity.set_aside(out, token)
        if who is not None:
            for change in identity.enter(out, who):
                print(f"the job has changed and continues with the new value: {change}", flush=True)  # noqa: T201
        with uploads.kept(job, out, stop, who, disks) as uploader:
            told = telemetry.source_of(
                job,
                out,
                gpus=gpus,
                uri=uploader.newest if uploader else None,
                problem=(lambda: uploader.problem) if uploader else (lambda: ""),
                uploaded=(lambda: uploader.moment) if uploader else (lambda: None),
                stopping=(lambda: stop.notice) if stop is not None else (lambda: ""),
            )
            end.callback(telemetry.leave, told)  # runs after the uploader has ended
            try:
                with telemetry.serve(told), tracking.tracked(job, out) as log:
                    yield log
            finally:
                telemetry.leave(told)  # written again after the upload of the newest checkpoint, if there is time
