from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from adafreeze.tasks import Regression


def test_a_line_is_fully_correlated_whatever_its_slope():
    found = Regression().compute_metrics(EvalPrediction(np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0, 2.0])))
    assert found["pearson"] == pytest.approx(1) and found["spearmanr"] == pytest.approx(1)
    assert found["mse"] == pytest.approx((1 + 4 + 9) / 3)


def test_one_number_a_row_is_kept():
    assert Regression().preprocess_logits(torch.ones(4, 1), torch.ones(4)).shape == (4,)
