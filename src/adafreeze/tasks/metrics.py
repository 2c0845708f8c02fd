"""Metrics by the names that transformers' run_glue logs, each computed by scikit-learn or SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["measure"]


def measure(names: Sequence[str], guess: Any, truth: Any) -> dict[str, float]:
    """The metrics ``names`` of predictions ``guess`` against labels ``truth``, both of shape (rows,).

    ``f1`` is that of label 1; ``combined_score`` is the mean of the other metrics, as GLUE's leaderboard averages them.

    >>> measure(["accuracy", "f1", "combined_score"], [1, 1, 0, 0], [1, 0, 0, 0])["accuracy"]
    0.75
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn import metrics

    functions = {
        "accuracy": lambda: metrics.accuracy_score(truth, guess),
        "f1": lambda: metrics.f1_score(truth, guess, average="binary", pos_label=1, zero_division=0),
        "f1_macro": lambda: metrics.f1_score(truth, guess, average="macro", zero_division=0),
        "matthews_correlation": lambda: metrics.matthews_corrcoef(truth, guess),
        "mse": lambda: metrics.mean_squared_error(truth, guess),
        "pearson": lambda: _correlation(pearsonr, guess, truth),
        "spearmanr": lambda: _correlation(spearmanr, guess, truth),
    }
    found = {name: float(functions[name]()) for name in names if name != "combined_score"}
    if "combined_score" in names:
        found["combined_score"] = sum(found.values()) / len(found)
    return found


def _correlation(function: Any, guess: Any, truth: Any) -> float:
    # 0 where the correlation is undefined (one row, or all predictions equal): NaN is not JSON.
    if len(truth) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of constant input
        value = float(function(guess, truth)[0])
    return value if math.isfinite(value) else 0.0
