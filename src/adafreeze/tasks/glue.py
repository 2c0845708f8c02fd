"""The nine tasks of GLUE (Wang et al. 2018): columns, classes and official metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .text_classification import Regression, TextClassification

__all__ = ["GLUE", "GLUE_DATASET", "Glue", "glue_task"]

GLUE_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Glue:
    """One task.

    Args:
        columns: text columns of the dataset on the Hub.
        classes: label names by id; empty: the label is a number.
        metrics: the official ones; if there are two, GLUE's score is their mean.
        validation: the split to evaluate on.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"


_PAIR = ("sentence1", "sentence2")
_F1 = ("accuracy", "f1", "combined_score")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": Glue(("sentence",), ("negative", "positive")),
    "mrpc": Glue(_PAIR, ("not_equivalent", "equivalent"), _F1),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate"), _F1),
    "stsb": Glue(_PAIR, (), ("pearson", "spearmanr", "combined_score")),
    "mnli": Glue(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), validation="validation_matched"
    ),
    "qnli": Glue(("question", "sentence"), _ENTAILMENT),
    "rte": Glue(_PAIR, _ENTAILMENT),
    "wnli": Glue(_PAIR, ("not_entailment", "entailment")),
}


def glue_task(name: str, **options: Any) -> TextClassification | Regression:
    """The task ``name`` of ``GLUE``; ``options`` are fields of its class.

    >>> glue_task("mrpc").text_column, glue_task("stsb").name
    (('sentence1', 'sentence2'), 'regression')
    """
    task = GLUE[name]
    options = {"text_column": task.columns, "metrics": task.metrics, **options}
    return TextClassification(classes=task.classes, **options) if task.classes else Regression(**options)
