"""Metrics by the names that transformers' run_glue logs, each computed by scikit-learn or SciPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ._text import number

__all__ = ["METRICS", "measure"]


def measure(names: Sequence[str], guess: Any, truth: Any) -> dict[str, float]:
    """The metrics ``names`` of predictions ``guess`` against labels ``truth``, both of shape (rows,).

    ``combined_score`` is the mean of the others, as GLUE averages them for its leader board.

    >>> measure(["accuracy", "f1", "combined_score"], [1, 1, 0, 0], [1, 0, 0, 0])["accuracy"]
    0.75
    """
    found = {name: float(METRICS[name](truth, guess)) for name in names if name != "combined_score"}
    if "combined_score" in names:
        found["combined_score"] = sum(found.values()) / len(found)
    return found


def _accuracy(truth: Any, guess: Any) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(truth, guess)


def _f1(truth: Any, guess: Any) -> float:
    from sklearn.metrics import f1_score

    return f1_score(truth, guess, average="binary", pos_label=1, zero_division=0)


def _f1_macro(truth: Any, guess: Any) -> float:
    from sklearn.metrics import f1_score

    return f1_score(truth, guess, average="macro", zero_division=0)


def _matthews(truth: Any, guess: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(truth, guess)


def _mse(truth: Any, guess: Any) -> float:
    from sklearn.metrics import mean_squared_error

    return mean_squared_error(truth, guess)


def _pearson(truth: Any, guess: Any) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, truth, guess)


def _spearman(truth: Any, guess: Any) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, truth, guess)


def _correlation(function: Callable[[Any, Any], Any], truth: Any, guess: Any) -> float:
    # 0 where it is undefined (all predictions equal): they explain nothing, and NaN is not JSON.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, for constant input
        value = number(function(guess, truth)[0]) if len(truth) > 1 else None
    return 0.0 if value is None else value


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,  # of the label with id 1
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "mse": _mse,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
