from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from adafreeze.tasks.glue import GLUE
from adafreeze.tasks.metrics import measure

# Stored predictions of a classifier and of a regression, and what is right.
GUESS = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1])
TRUTH = np.array([1, 0, 0, 1, 0, 1, 1, 1, 0, 0])
STARS = np.array([4.1, 0.3, 2.2, 3.9, 1.0, 2.4])
GOLD = np.array([5.0, 0.0, 2.5, 3.0, 1.5, 2.0])


def test_classification_metrics_by_hand():
    # true positives 4, false 2; true negatives 3, false 1
    found = measure(["accuracy", "f1", "matthews_correlation"], GUESS, TRUTH)
    assert found["accuracy"] == 0.7 and found["f1"] == pytest.approx(2 * 4 / (2 * 4 + 2 + 1))
    assert found["matthews_correlation"] == pytest.approx((4 * 3 - 2 * 1) / (6 * 5 * 5 * 4) ** 0.5)


def test_correlations_by_hand():
    found = measure(["pearson", "spearmanr"], [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    # deviations (-4/3, -1/3, 5/3) and (-1, 1, 0); ranks (1, 2, 3) and (1, 3, 2): 1 - 6 * 2 / (3 * 8)
    assert found["pearson"] == pytest.approx(1 / (42 / 9 * 2) ** 0.5) and found["spearmanr"] == pytest.approx(0.5)


def test_every_metric_is_that_of_the_reference_library():
    names = ["accuracy", "f1", "f1_macro", "matthews_correlation"]
    assert measure(names, GUESS, TRUTH) == {
        "accuracy": metrics.accuracy_score(TRUTH, GUESS),
        "f1": metrics.f1_score(TRUTH, GUESS),
        "f1_macro": metrics.f1_score(TRUTH, GUESS, average="macro"),
        "matthews_correlation": metrics.matthews_corrcoef(TRUTH, GUESS),
    }
    assert measure(["mse", "pearson", "spearmanr"], STARS, GOLD) == {
        "mse": metrics.mean_squared_error(GOLD, STARS),
        "pearson": stats.pearsonr(STARS, GOLD)[0],
        "spearmanr": stats.spearmanr(STARS, GOLD)[0],
    }


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cola", {"matthews_correlation"}),
        ("mrpc", {"accuracy", "f1", "combined_score"}),
        ("qqp", {"accuracy", "f1", "combined_score"}),
        ("stsb", {"pearson", "spearmanr", "combined_score"}),
        *((name, {"accuracy"}) for name in ("sst2", "mnli", "qnli", "rte", "wnli")),
    ],
)
def test_a_task_of_glue_has_the_names_that_run_glue_logs(name, keys):
    found = measure(GLUE[name].metrics, GUESS, TRUTH)
    assert set(found) == keys
    if "combined_score" in keys:
        parts = [value for key, value in found.items() if key != "combined_score"]
        assert found["combined_score"] == pytest.approx(sum(parts) / 2)


@pytest.mark.filterwarnings("error")
def test_equal_predictions_have_zero_correlation():
    assert measure(["pearson", "spearmanr"], [1.0, 1.0], [0.0, 1.0]) == {"pearson": 0.0, "spearmanr": 0.0}
