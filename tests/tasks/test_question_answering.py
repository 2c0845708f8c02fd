from __future__ import annotations

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from adafreeze.errors import DataError
from adafreeze.tasks import QuestionAnswering, Split, load_splits
from adafreeze.tasks.squad import best_span, span_of
from text_cases import bert_tokenizer, nested, questions, write


def best(start: list[float], end: list[float], n_best: int = 20, max_tokens: int = 30):
    """The best span of a window with the tokens [CLS] w0 w1 ... of five characters each, w0 at character 0."""
    starts = np.array([-1, *(5 * i for i in range(len(start) - 1))])
    ends = np.where(starts < 0, -1, starts + 4)
    return best_span(starts, ends, np.array(start), np.array(end), n_best, max_tokens)[1]


def test_the_best_pair_of_start_and_end_wins():
    assert best([0, 1, 5, 0], [0, 0, 1, 4]) == (5, 14)
    assert best([9, 1, 5, 0], [9, 0, 1, 4]) == (5, 14)  # [CLS] is no span


def test_a_span_runs_forward_and_is_not_too_long():
    assert best([0, 1, 0, 5], [0, 6, 0, 1]) == (0, 4)  # 1 + 6, not 5 + 6 backwards
    assert best([0, 5, 0, 1], [0, 0, 1, 5], max_tokens=2) == (0, 9)  # 5 + 1; three words would be 10
    assert best([0, 0, 0, 5], [0, 5, 0, 0], n_best=1) is None  # its only pair runs backwards


def exact(scores: dict[tuple[int, int], float], threshold: float = 0) -> float:
    """The exact match of "bad" in "good bad film book very not the", whose windows are [CLS] ask [SEP] and four words.

    ``scores`` are start and end logits by window and token; all others are 0.
    """
    task = fitted(questions(8, unanswerable=True), max_length=8, doc_stride=1, null_score_diff_threshold=threshold)
    row = {"question": "ask", "context": "good bad film book very not the"}
    rows = [{**row, "answers": {"text": ["bad"], "answer_start": [5]}}]
    logits = np.zeros((2, len(task.prepare_evaluation(Dataset.from_list(rows), bert_tokenizer())), 8))
    for (window, token), value in scores.items():
        logits[:, window, token] = value
    return task.compute_metrics(EvalPrediction(tuple(logits), None))["exact_match"]


def test_the_best_of_all_windows_wins():
    assert exact({(0, 4): 2, (1, 4): 1}) == 100  # "bad" in the first window, "very" in the second
    assert exact({(0, 4): 2, (1, 4): 3}) == 0


def test_no_answer_must_win_by_more_than_the_threshold():
    # "bad" scores 4, no answer 5 in one window and 6 in the other: the smaller one is compared.
    scores = {(0, 4): 2, (0, 0): 2.5, (1, 0): 3}
    assert exact(scores) == 0 and exact(scores, threshold=1) == 100


def test_a_span_is_found_by_its_characters():
    starts, ends = [-1, -1, 0, 4, 9, -1], [-1, -1, 3, 8, 12, -1]
    assert span_of(starts, ends, 4, 12) == (3, 4) and span_of(starts, ends, 5, 7) == (3, 3)
    assert span_of(starts, ends, 4, 20) is None


def fitted(rows: list[dict], **options) -> QuestionAnswering:
    task = QuestionAnswering(**options)
    task.fit(Split(Dataset.from_list(rows), "rows"))
    return task


def decoded(rows: list[dict], **options) -> list[str]:
    """What the labels of all windows point to."""
    tokenizer, task = bert_tokenizer(), fitted(questions(), **options)
    windows = task.prepare(Dataset.from_list(rows), tokenizer)
    assert set(windows.column_names) == {*tokenizer.model_input_names, "start_positions", "end_positions"}
    return [tokenizer.decode(w["input_ids"][w["start_positions"] : w["end_positions"] + 1]) for w in windows]


def test_labels_point_to_the_answer():
    assert decoded(questions(4)) == ["good", "very bad", "the plot", "bye"]
    assert decoded(questions(4, unanswerable=True))[-1] == "[CLS]"


def test_a_long_context_becomes_windows_that_overlap():
    row = questions(1)[0]
    row["context"] = "not " * 30 + row["context"]
    row["answers"]["answer_start"][0] += 120
    found = decoded([row], max_length=16, doc_stride=4)
    # [CLS] was the film good [SEP] ... [SEP]: 9 tokens of the context, 5 of them new; 43 of them with the commas
    assert len(found) == 8 and found.count("good") >= 1 and set(found) == {"[CLS]", "good"}


@pytest.mark.parametrize("unanswerable", [False, True])
def test_only_right_logits_score_100(unanswerable):
    rows = questions(8, unanswerable)
    task, data = fitted(rows, max_length=14, doc_stride=3), Dataset.from_list(rows)
    windows = task.prepare_evaluation(data, bert_tokenizer())
    assert len(windows) > len(rows)
    logits = np.full((2, len(windows), 20), -100.0)  # beyond a window's own tokens is what Trainer pads with
    for index, row in enumerate(windows):
        logits[:, index, : len(row["input_ids"])] = 0
        bonus = 5 if row["start_positions"] else 1  # a window with the answer is surer than one without
        logits[0, index, row["start_positions"]] = logits[1, index, row["end_positions"]] = bonus
    found = task.compute_metrics(EvalPrediction(tuple(logits), None))
    assert found["exact_match"] == found["f1"] == 100
    assert ("NoAns_exact" in found) == unanswerable
    assert task.compute_metrics(EvalPrediction(tuple(-logits), None))["exact_match"] < 50


def refused(pattern: str, rows, tmp_path, name: str = "a.jsonl", **options) -> None:
    if isinstance(rows, dict):
        (tmp_path / name).write_text(json.dumps(rows))
        file = str(tmp_path / name)
    else:
        file = write(tmp_path / name, rows)
    with pytest.raises(DataError) as caught:
        task = QuestionAnswering(**options)
        train, _ = load_splits(task, train_file=file, validation_file=file)
        task.prepare(train, bert_tokenizer())
    assert re.search(pattern, str(caught.value), re.DOTALL), caught.value


def changed(**values) -> list[dict]:
    rows = questions(4)
    rows[2] |= values
    return rows


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"context": " "}, r"line 3: empty text in column 'context'"),
        ({"question": ""}, r"line 3: empty text in column 'question'"),
        ({"answers": {"text": ["the plot"], "answer_start": [70]}}, r"answer_start 70 is beyond the context of 16"),
        (
            {"answers": {"text": ["plot"], "answer_start": [0]}},
            r"at answer_start 0 is 'it w', not .*'plot'",
        ),
        ({"answers": {"text": [""], "answer_start": [0]}}, r"line 3: an answer is empty"),
        ({"answers": {"text": ["it", "was"], "answer_start": [0]}}, r"line 3: the answers are not \{'text'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, values, pattern):
    refused(pattern, changed(**values), tmp_path)


def test_files_that_cannot_be_used(tmp_path):
    refused(r"no column 'answers'.*--answers_column", [{"question": "a", "context": "b"}], tmp_path)
    refused(r"a\.json has no questions", {"data": []}, tmp_path, "a.json")
    refused(r"a\.json is not in SQuAD's format: the file has no 'data'", {"rows": []}, tmp_path, "a.json")
    refused(r"no question with an answer", questions(4, True)[3:], tmp_path)
    wrong = nested(changed(answers={"text": ["the plot"], "answer_start": [70]}))
    refused(r"a\.json, question 'q2': answer_start 70", wrong, tmp_path, "a.json")
    refused(r"question 'was the film good' has 4 tokens.*--doc_stride 1", questions(4), tmp_path, max_length=9)


def test_no_answer_in_validation_if_training_always_has_one(tmp_path):
    files = {
        "train_file": write(tmp_path / "t.jsonl", questions()),
        "validation_file": write(tmp_path / "v.jsonl", questions(unanswerable=True)),
    }
    with pytest.raises(DataError, match=r"v\.jsonl, line 4: no answer, but every question"):
        load_splits(QuestionAnswering(), **files)
