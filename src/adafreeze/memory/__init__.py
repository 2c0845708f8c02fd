"""What a training step holds, and how it is kept small: rehearsal, plan, budget, activation checkpointing."""

from .rehearsal import Rehearsal, rehearse

__all__ = ["Rehearsal", "rehearse"]
