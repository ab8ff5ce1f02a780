"""Check that the GPUs that a job requests are available."""

from __future__ import annotations

import os

from grounding.api import ResolvedTrainJob
from grounding.errors import Failure

NO_GPU = "-1"
"""Value of `$CUDA_VISIBLE_DEVICES` for a role that must not use a GPU"""


def require(job: ResolvedTrainJob, model: str) -> None:
    """Raise `Failure` if the job wants GPUs and CUDA does not start, because the same training would take months on a CPU."""
    import torch

    gpus = job.spec.resources.gpus_per_node
    if not gpus or model.startswith("tiny://") or os.environ.get("CUDA_VISIBLE_DEVICES") == NO_GPU:
        return
    if not torch.cuda.is_available():
        raise Failure(
            f"the job needs {gpus} GPUs on each node, but CUDA does not start",
            field="spec.resources.gpusPerNode",
            hint="Check nvidia-smi and the driver's version; gpusPerNode: 0 trains on the CPU.",
        )
