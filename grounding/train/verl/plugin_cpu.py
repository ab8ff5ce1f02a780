"""verl imports this module in every process of a run on the CPU (`VERL_USE_EXTERNAL_MODULES`). It applies our patches, and does nothing else."""

from grounding.train.verl import (  # the former registers the platform, before the latter asks for it
    cpu_patches,
    patches,
    transfer_queue,
)

patches.apply()
cpu_patches.apply()
transfer_queue.apply()
