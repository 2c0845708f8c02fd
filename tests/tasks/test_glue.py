from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import EvalPrediction

from adafreeze.errors import DataError
from adafreeze.tasks import GLUE, Split, glue_task, load_splits
from adafreeze.tasks.data import check
from text_cases import bert_tokenizer, glue_rows, write


def fitted(name: str, as_text: bool):
    task, rows = glue_task(name), Dataset.from_list(glue_rows(name, as_text=as_text))
    check(task, Split(rows, "rows"))
    task.fit(Split(rows, "rows"))
    return task, rows


@pytest.mark.parametrize("name", sorted(GLUE))
def test_a_label_may_be_the_official_name_or_its_number(name):
    for as_text in (False, True):
        task, rows = fitted(name, as_text)
        assert task.prepare(rows, bert_tokenizer())["labels"][:] == [row["label"] for row in glue_rows(name)]
        if GLUE[name].classes:
            assert task.config_fields()["id2label"] == dict(enumerate(GLUE[name].classes))


def test_f1_is_of_the_equivalent_pairs_in_any_order_of_names():
    # In alphabetical order "equivalent" would be 0, and F1 that of the pairs that are not.
    task, rows = fitted("mrpc", as_text=True)
    truth = [task.names.index(label) for label in rows["label"]]
    guess = [int(label == "equivalent") for label in rows["label"][:-1]] + [0]
    found = task.compute_metrics(EvalPrediction(guess, truth))
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1)) and sum(truth) == 4


def test_a_label_that_glue_does_not_know(tmp_path):
    rows = glue_rows("rte", as_text=True)
    rows[2]["label"] = "neutral"
    with pytest.raises(DataError, match=r"line 3: the label 'neutral' is not one of entailment, not_entailment"):
        load_splits(glue_task("rte"), train_file=write(tmp_path / "a.jsonl", rows))


def test_labels_of_two_files_match_by_name():
    def split(names: list[str], labels: list[str]) -> Split:
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
        return Split(Dataset.from_dict({"sentence": ["a"] * len(labels), "label": labels}, features=features), names[0])

    task = glue_task("sst2")
    task.fit(split(["negative", "positive"], ["negative", "positive"]))
    assert task.label_ids(split(["positive", "negative"], ["negative", "positive"]).rows) == [0, 1]
