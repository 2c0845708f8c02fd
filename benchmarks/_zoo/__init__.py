"""Tiny random models of every architecture that the installed transformers can build, with rows to train on."""

from .build import head_names, lora_targets
from .case import Case, Family, NotRunnable, collate, first_line
from .listing import families

__all__ = ["Case", "Family", "NotRunnable", "collate", "families", "first_line", "head_names", "lora_targets"]
