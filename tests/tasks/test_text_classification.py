from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction

from adafreeze.tasks import Regression, Split, TextClassification
from text_cases import bert_tokenizer


def fitted(labels: list, **options) -> tuple[TextClassification, Dataset]:
    rows = Dataset.from_dict({"text": ["good film"] * len(labels), "other": ["bad"] * len(labels), "label": labels})
    task = TextClassification(**options)
    task.columns(rows.column_names)
    task.fit(Split(rows, "rows"))
    return task, rows


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([10, 2, 10], ["2", "10"], [1, 0, 1]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),
        ([True, False], ["false", "true"], [1, 0]),
    ],
)
def test_labels_of_any_kind_become_ids(labels, names, ids):
    task, rows = fitted(labels)
    assert task.names == names and task.config_fields()["num_labels"] == len(names)
    assert task.prepare(rows, bert_tokenizer())["labels"][:] == ids


def test_pairs_have_token_types():
    task, rows = fitted(["a", "b"], text_column=("text", "other"))
    prepared = task.prepare(rows, bert_tokenizer())
    assert prepared[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert set(prepared.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_rows_are_cut_and_padded_as_asked():
    task, rows = fitted(["a", "b"], max_length=3)
    assert len(task.prepare(rows, bert_tokenizer())[0]["input_ids"]) == 3
    task, rows = fitted(["a", "b"], max_length=9, pad_to_max_length=True)
    tokenizer = bert_tokenizer()
    batch = task.collator(tokenizer)(list(task.prepare(rows, tokenizer)))
    assert batch["input_ids"].shape == (2, 9)


def test_metrics_of_two_labels_and_of_more():
    task, _ = fitted(["a", "b"])
    found = task.compute_metrics(EvalPrediction(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])))
    assert found["accuracy"] == 0.75 and found["f1"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    task, _ = fitted(["a", "b", "c"])
    assert "f1" not in task.compute_metrics(EvalPrediction(np.array([0, 1]), np.array([0, 1])))


def test_a_line_of_any_slope_has_correlation_1():
    found = Regression().compute_metrics(EvalPrediction(np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0, 2.0])))
    assert found["pearson"] == pytest.approx(1) and found["spearmanr"] == pytest.approx(1)
    assert found["mse"] == pytest.approx((1 + 4 + 9) / 3)


def test_one_number_a_row_is_kept():
    assert Regression().preprocess_logits(torch.ones(4, 1), torch.ones(4)).shape == (4,)
