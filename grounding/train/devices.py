"""Check that the GPUs that a job requests are available."""

from __future__ import annotations

import os

from grounding.api import ResolvedTrainJob
from grounding.errors import Failure

NO_GPU = "-1"
"""Values of `$CUDA_VISIBLE_DEVICES` for a role without a GPU"""


def require(job: ResolvedTrainJob, model: str) -> None:
    """Raise `Failure` if the job asks for GPUs and CUDA does not start: a CPU would take months for the same steps."""
    import torch

    gpus = job.spec.resources.gpus_per_node
    if not gpus or model.startswith("tiny://") or os.environ.get("CUDA_VISIBLE_DEVICES") == NO_GPU:
        return
    if not torch.cuda.is_available():
        raise Failure(
            f"the job asks for {gpus} GPUs on each node, and CUDA does not start",
            field="spec.resources.gpusPerNode",
            hint="Check nvidia-smi and the driver's version; gpusPerNode: 0 trains on the CPU.",
        )
