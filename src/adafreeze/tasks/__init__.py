"""Data and metrics of ``adafreeze train`` and ``compare``: one file a kind of task."""

from .adapters import adapter_names, add_adapter
from .causal_lm import CausalLM
from .data import Split, load_splits
from .generation import TextGeneration
from .glue import GLUE, GLUE_DATASET, glue_task
from .image_classification import ImageClassification
from .pretrained import Source, load_tokenizer
from .question_answering import QuestionAnswering
from .regression import Regression
from .task import Task
from .text_classification import TextClassification

__all__ = [
    "GLUE",
    "GLUE_DATASET",
    "CausalLM",
    "ImageClassification",
    "QuestionAnswering",
    "Regression",
    "Source",
    "Split",
    "Task",
    "TextClassification",
    "TextGeneration",
    "adapter_names",
    "add_adapter",
    "glue_task",
    "load_splits",
    "load_tokenizer",
]
