"""Module that verl imports in every process of a run on the CPU (`VERL_USE_EXTERNAL_MODULES`). It only applies our patches."""

from grounding.train.verl import (  # the first one registers the platform that the second one looks up
    cpu_patches,
    patches,
    transfer_queue,
)

patches.apply()
cpu_patches.apply()
transfer_queue.apply()
