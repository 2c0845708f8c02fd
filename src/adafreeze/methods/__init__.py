"""Methods of training, one small class each: plain, SAFE, and its rivals."""

from .find import METHODS, find_method, in_order
from .method import Combined, Method, Setup
from .outcome import Outcome, outcome_of
from .summary import Difference, Row, default_metric, summarize

__all__ = [
    "METHODS",
    "Combined",
    "Method",
    "Setup",
    "find_method",
    "in_order",
    "Difference",
    "Outcome",
    "Row",
    "default_metric",
    "outcome_of",
    "summarize",
]
