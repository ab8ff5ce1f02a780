"""verl imports this module in every process of a run (`VERL_USE_EXTERNAL_MODULES`). It applies our patches, and does nothing else."""

from grounding.train.verl import patches, transfer_queue

patches.apply()
transfer_queue.apply()
