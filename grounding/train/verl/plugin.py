"""Module that verl imports in every process of a run (`VERL_USE_EXTERNAL_MODULES`). It only applies our patches."""

from grounding.train.verl import patches, transfer_queue

patches.apply()
transfer_queue.apply()
