"""What surrounds the training of rank 0, whichever trainer it is: its output followed elsewhere, `/progress`, tracking, last words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from grounding.api import GroundingTrainJob
from grounding.train import telemetry, tracking, uploads


@contextlib.contextmanager
def surrounded(job: GroundingTrainJob, out: Path, gpus: int) -> Iterator[tracking.Log]:
    """Around the training: continues from what the job's output has and leaves there what is made. Gives what takes the metrics of each step."""
    with contextlib.ExitStack() as end, uploads.kept(job, out) as uploader:
        told = telemetry.source_of(job, out, gpus=gpus, uri=uploader.newest if uploader else None)
        end.callback(telemetry.leave, told)
        try:
            with telemetry.serve(told), tracking.tracked(job, out) as log:
                yield log
        finally:
            telemetry.leave(told)  # and again when the newest checkpoint is where it belongs, should there be time
