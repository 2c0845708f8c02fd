"""Deciding: tensors and numbers in, names out; knows no transformers and no PEFT."""

from .cka import CKAReference, cka_flops, linear_cka, unit_rows
from .policy import POLICIES, PolicyInput, choose
from .schedule import Losses, LossFall, Settling, cubic_ramp, measurement_steps
from .scores import SCORES, Score, random_score, resolve_score

__all__ = [
    "POLICIES",
    "SCORES",
    "CKAReference",
    "LossFall",
    "Losses",
    "Score",
    "Settling",
    "PolicyInput",
    "choose",
    "cka_flops",
    "cubic_ramp",
    "linear_cka",
    "measurement_steps",
    "random_score",
    "resolve_score",
    "unit_rows",
]
