"""The tasks by the value of ``--task``."""

from __future__ import annotations

from .causal_lm import CausalLM
from .generation import TextGeneration
from .image_classification import ImageClassification
from .question_answering import QuestionAnswering
from .task import Task
from .text_classification import Regression, TextClassification

__all__ = ["TASKS"]

TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "regression": Regression,
    "causal-lm": CausalLM,
    "text-generation": TextGeneration,
    "question-answering": QuestionAnswering,
    "image-classification": ImageClassification,
}
