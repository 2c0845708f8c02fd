from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from adafreeze.errors import DataError
from adafreeze.tasks.squad import answers_of, exact_match, f1, normalize, read_nested, score
from text_cases import nested, questions


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat, a dog\tand An ape!", "cat dog and ape"),
        ("U.S. Army's", "us armys"),
        ("another theory", "another theory"),
        ("«a» 3.5%", "« » 35"),
        ("the", ""),
    ],
)
def test_case_punctuation_articles_and_spaces_do_not_count(text, plain):
    assert normalize(text) == plain


@pytest.mark.parametrize(
    ("guess", "gold", "exact", "partial"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1, 1),
        ("in Paris, France", "Paris", 0, 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("very very good", "very good good", 0, 2 / 3),  # each word as often as it comes in both
        ("Rome", "Paris", 0, 0),
        ("", "", 1, 1),
        ("", "Paris", 0, 0),
        ("the", "A.", 1, 1),
    ],
)
def test_exact_match_and_f1_of_an_answer(guess, gold, exact, partial):
    assert exact_match(guess, gold) == exact and f1(guess, gold) == pytest.approx(partial)


def test_the_best_of_several_answers_counts_and_the_mean_is_in_percent():
    found = score(["a red car", "Rome"], [["blue car", "red car", "car"], ["Paris"]])
    assert found == {"exact_match": 50.0, "f1": 50.0}
    found = score(["fast red car"], [["blue car", "red car"]])
    assert found == {"exact_match": 0.0, "f1": pytest.approx(80)}


def test_questions_without_answer_are_also_scored_separately():
    found = score(["", "Rome", "Paris", ""], [[], [], ["Paris"], ["Rome"]])
    assert found["exact_match"] == found["f1"] == 50
    assert found["HasAns_exact"] == found["HasAns_f1"] == found["NoAns_exact"] == found["NoAns_f1"] == 50
    # An answer without words is none.
    assert score([""], [["the"]])["exact_match"] == 100


# Predictions and answers, with the scores of squad_evaluate in transformers 4.57.6 (removed in 5).
STORED = [
    ("in the old Town", ["the old town", "Town"]),
    ("1889.", ["1889", "in 1889"]),
    ("an engineer, Gustave", ["Gustave Eiffel", "G. Eiffel's firm"]),
    ("", ["Paris"]),
    ("«tour» Eiffel", ["tour Eiffel"]),
    ("Rome", []),
    ("", []),
    ("The", ["a"]),
]
ANSWERED = {"exact_match": 20.0, "f1": 56.0}
ALL = {
    "exact_match": 37.5,
    "f1": 60.0,
    "HasAns_exact": 100 / 3,
    "HasAns_f1": 190 / 3,
    "NoAns_exact": 50,
    "NoAns_f1": 50,
}


@pytest.mark.parametrize(("pairs", "expected"), [(STORED[:5], ANSWERED), (STORED, ALL)], ids=["v1", "v2"])
def test_scores_of_stored_predictions_are_those_of_the_reference(pairs, expected):
    assert score(*zip(*pairs, strict=True)) == pytest.approx(expected)
    reference = pytest.importorskip("transformers.data.metrics.squad_metrics")
    examples = [SimpleNamespace(qas_id=i, answers=[{"text": t} for t in golds]) for i, (_, golds) in enumerate(pairs)]
    found = reference.squad_evaluate(examples, {i: guess for i, (guess, _) in enumerate(pairs)})
    assert {name: found[{"exact_match": "exact"}.get(name, name)] for name in expected} == pytest.approx(expected)


def test_both_formats_give_the_same_rows(tmp_path):
    rows, file = questions(unanswerable=True), tmp_path / "a.json"
    file.write_text(json.dumps(nested(rows)))
    assert read_nested(file) == rows
    file.write_text(json.dumps(rows))
    assert read_nested(file) is None
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_nested(file) is None


def test_plausible_answers_to_an_impossible_question_are_none(tmp_path):
    content = nested(questions(1))
    content["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = True
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_nested(tmp_path / "a.json")[0]["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c.pop("data"), r"the file has no 'data'"),
        (lambda c: c.update(data=3), r"the file has another structure"),
        (lambda c: c["data"].append(3), r"data\[1\] has another structure"),
        (lambda c: c["data"][0].pop("paragraphs"), r"data\[0\] has no 'paragraphs'"),
        (lambda c: c["data"][0]["paragraphs"][1].pop("context"), r"data\[0\]\.paragraphs\[1\].* has no 'context'"),
        (lambda c: c["data"][0]["paragraphs"][1]["qas"][0].pop("id"), r"paragraphs\[1\]\.qas\[0\] has no 'id'"),
        (lambda c: c["data"][0]["paragraphs"][0]["qas"][0].update(question=3), r"qas\[0\] has another structure"),
        (lambda c: c["data"][0]["paragraphs"][0]["qas"][0].pop("answers"), r"qas\[0\] has no 'answers'"),
        (lambda c: c["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].pop("answer_start"), r"another structure"),
    ],
)
def test_a_file_of_another_structure_names_the_place(tmp_path, change, pattern):
    content = nested(questions(2))
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=pattern):
        read_nested(tmp_path / "a.json")


def test_a_file_that_is_cut_off_names_the_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(nested(questions(2)), indent=1)[:200])
    with pytest.raises(DataError, match=r"a\.json is not valid JSON: .* line \d+"):
        read_nested(tmp_path / "a.json")


@pytest.mark.parametrize("value", [None, "good", 3, {"text": ["a"]}, {"text": ["a"], "answer_start": ["0"]}, ["a"]])
def test_answers_in_no_known_form(value):
    assert answers_of(value) is None
