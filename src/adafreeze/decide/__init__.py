"""Deciding: tensors and numbers in, unit names out. Imports neither transformers nor PEFT."""

from .cka import CKAReference, cka_flops, linear_cka, unit_rows
from .policy import POLICIES, PolicyInput, choose, is_prefix_only, prefix_only
from .run_length import Progress, RunLength
from .schedule import Losses, LossFall, Settling, cubic_ramp, measurement_steps
from .scores import SCORES, Captures, Score, random_score, resolve_score

__all__ = [
    # scores
    "SCORES",
    "Captures",
    "Score",
    "random_score",
    "resolve_score",
    "CKAReference",
    "cka_flops",
    "linear_cka",
    "unit_rows",
    # policies
    "POLICIES",
    "PolicyInput",
    "choose",
    "is_prefix_only",
    "prefix_only",
    # schedule
    "LossFall",
    "Losses",
    "Progress",
    "RunLength",
    "Settling",
    "cubic_ramp",
    "measurement_steps",
]
