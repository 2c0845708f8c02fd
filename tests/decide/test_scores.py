import math

import pytest
import torch

from adafreeze.decide import SCORES, random_score, resolve_score


def test_grad_norm_is_the_relative_change_of_the_norm():
    score = SCORES["grad_norm"]
    assert score.reads == "gradients" and score.reference == "previous"
    assert score.compare(torch.tensor(4.0), torch.tensor(3.0)) == pytest.approx(0.25)
    assert score.compare(torch.tensor(0.0), torch.tensor(3.0)) == float("inf")


def test_grad_norm_of_a_unit_that_had_no_gradient_decides_nothing():
    for now in (0.0, 1.0, math.nan):
        assert not math.isfinite(SCORES["grad_norm"].compare(torch.zeros(1), torch.tensor([now])))


def test_every_score_says_what_it_needs_under_its_own_name():
    assert {name: (score.reads, score.reference) for name, score in SCORES.items()} == {
        "cka": ("outputs", "start"),
        "cka_debiased": ("outputs", "start"),
        "local_cka": ("outputs", None),
        "grad_norm": ("gradients", "previous"),
        "weight_change": ("weights", "previous"),
        "random": ("nothing", None),
    }
    assert all(resolve_score(name) is score and score.name == name for name, score in SCORES.items())


def test_weight_change_is_the_mean_absolute_change():
    assert SCORES["weight_change"].compare(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])) == pytest.approx(1.5)


def test_cka_scores_are_zero_for_what_has_not_moved():
    x = torch.randn(20, 8)
    for name in ("cka", "cka_debiased", "local_cka"):
        score = SCORES[name]
        assert score.compare(score.prepare(x, True), x) == pytest.approx(0, abs=1e-6)
        assert score.compare(score.prepare(x, True), torch.randn(20, 8)) > 0.3


def test_random_scores_are_fixed_by_name_and_seed():
    values = [random_score(f"u{i}", seed) for i in range(50) for seed in range(3)]
    assert len(set(values)) == 150 and all(0 < v < 1 for v in values)
    assert values == [random_score(f"u{i}", seed) for i in range(50) for seed in range(3)]


def test_a_function_is_a_score_of_outputs():
    mine = resolve_score(lambda before, after: 0.5)
    assert mine.reads == "outputs" and mine.compare(mine.prepare(torch.ones(2), True), torch.ones(2)) == 0.5


def test_a_reference_is_prepared_once_and_compared_with_any_number_of_later_states():
    torch.manual_seed(0)
    before, step = torch.randn(40, 8), torch.randn(40, 8)
    for name in ("cka", "cka_debiased", "local_cka"):
        score = SCORES[name]
        reference = score.prepare(before, False)
        far, near, none = (score.compare(reference, before + size * step) for size in (0.5, 0.1, 0.0))
        assert far > near > none >= 0
        assert score.compare(score.prepare(before, False), before + 0.1 * step) == near


def test_whether_rows_are_normalised_reaches_the_score():
    torch.manual_seed(0)
    before, after = torch.randn(64, 8), torch.randn(64, 8)
    before[0] = after[0] = 1e4
    for name in ("cka", "local_cka"):
        plain, rows = (SCORES[name].compare(SCORES[name].prepare(before, n), after) for n in (False, True))
        assert plain < 1e-4 < 0.3 < rows


def test_changes_of_nothing_and_of_what_is_not_finite():
    still = torch.tensor([1.0, -2.0])
    assert SCORES["weight_change"].compare(still, still) == 0
    assert math.isnan(SCORES["weight_change"].compare(still, torch.tensor([math.nan, 0.0])))
    assert SCORES["grad_norm"].compare(torch.tensor(2.0), torch.tensor(2.0)) == 0
    assert math.isnan(SCORES["grad_norm"].compare(torch.tensor(2.0), torch.tensor(math.nan)))
