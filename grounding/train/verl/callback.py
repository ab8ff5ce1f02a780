"""verl's driver imports this module for the class in its configuration; the import also applies the patches of its trainer."""

from grounding.train.verl import hooks
from grounding.train.verl.hooks import MarkComplete

__all__ = ["MarkComplete"]

hooks.apply()
