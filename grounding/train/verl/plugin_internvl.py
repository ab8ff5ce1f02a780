"""verl imports this module in every process of a run with InternVL (`VERL_USE_EXTERNAL_MODULES`). It applies the patches for it."""

from grounding.train.verl import internvl

internvl.apply()
