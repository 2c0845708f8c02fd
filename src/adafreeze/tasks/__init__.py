"""Data and metrics of ``adafreeze train`` and ``compare``: one file a kind of task."""

from .adapters import adapter_names, add_adapter
from .causal_lm import CausalLM
from .data import Split, load_splits
from .pretrained import Source, load_tokenizer
from .regression import Regression
from .task import Task
from .text_classification import TextClassification

__all__ = [
    "CausalLM",
    "Regression",
    "Source",
    "Split",
    "Task",
    "TextClassification",
    "adapter_names",
    "add_adapter",
    "load_splits",
    "load_tokenizer",
]
