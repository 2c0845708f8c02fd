"""Outcomes condensed to one row per method."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from adafreeze.methods import Outcome, default_metric, summarize


def outcome(task: str, method: str, seed: int, accuracy: float, **numbers) -> Outcome:
    costs = {"seconds": 10.0, "cpu_seconds": 8.0, "flops": 8.0, "peak_saved_bytes": 6.0, "mean_saved_bytes": 4.0}
    return Outcome(task, method, seed, metrics={"accuracy": accuracy, "loss": 1.0}, **{**costs, **numbers})


PLAIN = [outcome("a", "plain", seed, score) for seed, score in enumerate((0.80, 0.90, 0.85))]
SAFE = [
    outcome("a", "safe", seed, score, flops=4.0, seconds=5.0, cpu_seconds=2.0)
    for seed, score in enumerate((0.81, 0.89, 0.83))
]


def test_scores_are_in_points_with_mean_and_standard_deviation():
    plain, safe = summarize([*PLAIN, *SAFE], {"a": "accuracy"}, "plain")
    assert plain.score == pytest.approx(85)
    assert plain.sd == pytest.approx(5)
    assert plain.difference is None
    assert safe.seeds == 3


def test_the_interval_is_students_for_paired_differences():
    _, safe = summarize([*PLAIN, *SAFE], {"a": "accuracy"}, "plain")
    low, high = stats.ttest_rel((81, 89, 83), (80, 90, 85)).confidence_interval(0.95)
    assert safe.difference.mean == pytest.approx(-2 / 3)
    assert (safe.difference.low, safe.difference.high) == pytest.approx((low, high))


def test_ratios_compare_runs_with_the_same_seed():
    _, safe = summarize([*PLAIN, *SAFE], {"a": "accuracy"}, "plain")
    assert dict(safe.ratios) == pytest.approx(
        {"mean_saved_bytes": 1, "peak_saved_bytes": 1, "flops": 0.5, "seconds": 0.5, "cpu_seconds": 0.25}
    )


def test_only_seeds_that_both_ran_are_paired():
    _, safe = summarize([*PLAIN[:2], *SAFE], {"a": "accuracy"}, "plain")
    assert safe.difference.count == 2
    assert safe.difference.mean == pytest.approx(0)
    assert safe.score == pytest.approx(84 + 1 / 3)


def test_one_seed_has_a_difference_but_no_interval():
    _, safe = summarize([PLAIN[0], SAFE[0]], {"a": "accuracy"}, "plain")
    assert safe.difference.mean == pytest.approx(1)
    assert math.isnan(safe.difference.low)
    assert safe.sd is None


def test_differences_over_tasks_have_welchs_interval():
    other = [outcome("b", "plain", s, x) for s, x in enumerate((0.5, 0.5))]
    other += [outcome("b", "safe", s, x) for s, x in enumerate((0.52, 0.56))]
    rows = summarize([*PLAIN, *SAFE, *other], {"a": "accuracy", "b": "accuracy"}, "plain")
    average = rows[-1]
    assert (average.task, average.method) == (None, "safe")
    assert average.difference.mean == pytest.approx((-2 / 3 + 4) / 2)
    # scipy has only the difference of two means: of a and −b.
    both = stats.ttest_ind((1, -1, -2), (-2, -6), equal_var=False).confidence_interval(0.95)
    assert (average.difference.low, average.difference.high) == pytest.approx((both.low / 2, both.high / 2))


def test_a_failed_method_has_a_reason_and_no_average():
    other = [outcome("b", "plain", 0, 0.5), Outcome("b", "safe", 0, reason="No adapters.")]
    rows = summarize([*PLAIN, *SAFE, *other], {"a": "accuracy", "b": "accuracy"}, "plain")
    assert [row.reason for row in rows if row.method == "safe"] == [None, "No adapters.", "No adapters."]


def test_scores_are_in_points_for_all_methods_or_none():
    runs = [Outcome("a", "plain", 0, metrics={"bleu": 54.0}), Outcome("a", "safe", 0, metrics={"bleu": 0.4})]
    plain, safe = summarize(runs, {"a": "bleu"}, "plain")
    assert (plain.score, safe.score) == (54.0, 0.4)
    assert safe.difference.mean == pytest.approx(-53.6)


def test_accuracy_and_perplexity_have_no_average():
    other = [Outcome("b", m, 0, metrics={"perplexity": x}, flops=f) for m, x, f in (("plain", 9, 4), ("safe", 14, 2))]
    rows = summarize([PLAIN[0], SAFE[0], *other], {"a": "accuracy", "b": "perplexity"}, "plain")
    average = rows[-1]
    assert (average.task, average.method, average.difference) == (None, "safe", None)
    assert math.isnan(average.score)
    assert average.ratios["flops"] == pytest.approx(0.5)


def test_theory_is_averaged_over_all_seeds_even_if_nothing_froze_in_one():
    froze = outcome("a", "safe", 0, 0.8, steps=10, blocks=4, epochs=1.0, freezes=((5, 2, 2),))
    not_at_all = outcome("a", "safe", 1, 0.8, steps=10, blocks=4, epochs=1.0)
    rows = summarize([*PLAIN[:2], froze, not_at_all], {"a": "accuracy"}, "plain")
    assert rows[1].theory[0] == pytest.approx((froze.theory()[0] + 1) / 2)


def test_scores_above_one_are_not_scaled():
    runs = [Outcome("a", "plain", 0, metrics={"bleu": 31.2}), Outcome("a", "safe", 0, metrics={"bleu": 30.2})]
    rows = summarize(runs, {"a": "bleu"}, "plain")
    assert rows[1].score == 30.2
    assert rows[1].difference.mean == pytest.approx(-1)
    assert math.isnan(rows[1].ratios["flops"])


def test_the_default_metric_is_the_first_known_one():
    assert default_metric(PLAIN) == "accuracy"
    assert default_metric([Outcome("a", "plain", 0, metrics={"loss": 2.0, "perplexity": 7.4})]) == "perplexity"
    assert default_metric([Outcome("a", "plain", 0, reason="no")]) is None


def test_theory_follows_the_actual_freezes():
    frozen = outcome("a", "safe", 0, 0.8, steps=100, epochs=5, blocks=6, freezes=((20, 4, 4),))
    row = summarize([PLAIN[0], frozen], {"a": "accuracy"}, "plain")[1]
    assert row.theory == pytest.approx((1 - 0.8 * 4 / 6, (12 - 0.25 - 0.8 * 4) / (12 - 0.25)))


def test_an_outcome_can_be_saved_and_loaded(tmp_path):
    frozen = outcome("a", "safe", 0, 0.8, blocks=6, units=("x", "y"), freezes=((20, 4, 4),), settings={"seed": 0})
    frozen.save(tmp_path / "outcome.json")
    assert Outcome.load(tmp_path / "outcome.json") == frozen
    assert [file.name for file in tmp_path.iterdir()] == ["outcome.json"]
    (tmp_path / "outcome.json").write_text('{"task": 1}')
    with pytest.raises(ValueError, match="not a result"):
        Outcome.load(tmp_path / "outcome.json")
