"""Data and metrics of ``adafreeze train`` and ``compare``: one file per kind of task, listed in ``table``."""

from .adapters import adapter_names, add_adapter
from .causal_lm import CausalLM
from .data import Split, load_splits
from .generation import TextGeneration
from .glue import GLUE, GLUE_DATASET, glue_task
from .image_classification import ImageClassification
from .pretrained import Source, load_tokenizer
from .question_answering import QuestionAnswering
from .table import TASKS
from .task import Task
from .text_classification import Regression, TextClassification

__all__ = [
    "GLUE",
    "GLUE_DATASET",
    "TASKS",
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
