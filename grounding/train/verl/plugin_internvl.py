"""Module that verl imports in every process of a run with InternVL (`VERL_USE_EXTERNAL_MODULES`). It only applies the patches for it."""

from grounding.train.verl import internvl

internvl.apply()
