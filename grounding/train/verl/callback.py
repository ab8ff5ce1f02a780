"""Module that verl's driver imports for the class in its configuration. The import also applies the patches of verl's trainer."""

from grounding.train.verl import hooks
from grounding.train.verl.hooks import MarkComplete

__all__ = ["MarkComplete"]

hooks.apply()
