"""Training methods that ``adafreeze compare`` compares: plain, SAFE and its rivals."""

from .find import METHODS, find_method, in_order
from .method import Combined, Method, Setup
from .outcome import Outcome, outcome_of
from .summary import Difference, Row, default_metric, summarize

__all__ = [
    # what a method is
    "Combined",
    "Method",
    "Setup",
    # which methods there are
    "METHODS",
    "find_method",
    "in_order",
    # results
    "Difference",
    "Outcome",
    "Row",
    "default_metric",
    "outcome_of",
    "summarize",
]
