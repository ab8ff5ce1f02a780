"""verl's driver imports this module for the class that its configuration names, and with it the patches of its trainer apply."""

from grounding.train.verl import hooks
from grounding.train.verl.hooks import MarkComplete

__all__ = ["MarkComplete"]

hooks.apply()
