import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adafreeze import ProbeError
from adafreeze.decide import CKAReference, cka_flops, linear_cka, unit_rows
from adafreeze.decide._cka_naive import naive_cka, naive_debiased_cka

SHAPES = [(8, 30, 30), (30, 8, 8), (20, 20, 20), (12, 40, 5), (50, 5, 40)]


def pair(n, d1, d2, rank=None):
    torch.manual_seed(n + d1)
    x = torch.randn(n, d1, dtype=torch.float64)
    if rank is not None:
        x = torch.randn(n, rank, dtype=torch.float64) @ torch.randn(rank, d1, dtype=torch.float64)
    y = x[:, :1] @ torch.randn(1, d2, dtype=torch.float64) + 0.3 * torch.randn(n, d2, dtype=torch.float64)
    return x + 5, y - 3  # not centred


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_estimators_equal_the_textbook(shape, rank):
    x, y = pair(*shape, rank)
    assert linear_cka(x, y) == pytest.approx(naive_cka(x, y), abs=1e-6)
    assert linear_cka(x, y, debiased=True) == pytest.approx(naive_debiased_cka(x, y), abs=1e-6)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_one_for_itself_and_invariant_to_rotation_and_scale(shape, debiased):
    x, y = pair(*shape)
    rotation = torch.linalg.qr(torch.randn(shape[2], shape[2], dtype=torch.float64)).Q
    assert linear_cka(x, x, debiased) == pytest.approx(1, abs=1e-9)
    assert linear_cka(x, 7 * y @ rotation + 2, debiased) == pytest.approx(linear_cka(x, y, debiased), abs=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 64), (64, 512)])
def test_float32_of_accelerators_errs_less_than_bfloat16_rounds(shape, dtype, debiased, monkeypatch):
    monkeypatch.setattr("adafreeze.decide.cka._precision", lambda device: torch.float32)
    oracle = naive_debiased_cka if debiased else naive_cka
    torch.manual_seed(0)
    x = torch.randn(shape) + torch.randn(shape[1])
    for size in (1e-1, 1e-2, 1e-3):
        before, after = x.to(dtype), (x + size * torch.randn(shape)).to(dtype)
        score = CKAReference(before, debiased, normalize_rows=False).score(after)
        assert score == pytest.approx(1 - oracle(before, after), abs=2e-6)  # the floor of bfloat16 is 1e-5


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_size_of_activations_does_not_matter(scale, precision, monkeypatch):
    monkeypatch.setattr("adafreeze.decide.cka._precision", lambda device: precision)
    x, y = pair(30, 8, 8)
    assert linear_cka((scale * x).float(), (scale * y).float()) == pytest.approx(naive_cka(x, y), abs=1e-5)


def test_float32_keeps_small_scores_exact():
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    for size in (1e-1, 1e-2, 1e-3):
        y = x + size * torch.randn(200, 64)
        exact = 1 - naive_cka(x, y)
        assert CKAReference(x, normalize_rows=False).score(y) == pytest.approx(exact, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_gives_nan(bad):
    x, y = pair(10, 4, 4)
    broken = y.clone()
    broken[3, 2] = bad
    for normalize_rows in (True, False):
        assert math.isnan(CKAReference(x, normalize_rows=normalize_rows).score(broken))
        assert math.isnan(CKAReference(broken, normalize_rows=normalize_rows).score(y))


@pytest.mark.parametrize("debiased", [False, True])
def test_constant_features_give_a_clear_result(debiased):
    x, _ = pair(10, 4, 4)
    constant = torch.full((10, 4), 0.1, dtype=torch.float64)
    assert linear_cka(constant, 3 * constant, debiased) == 1
    assert linear_cka(constant, x, debiased) == 0
    assert linear_cka(x, constant, debiased) == 0
    assert linear_cka(torch.zeros(10, 4), torch.zeros(10, 4), debiased) == 1


def test_one_huge_token_drowns_the_others_unless_rows_are_normalised():
    torch.manual_seed(0)
    x = torch.randn(64, 16, dtype=torch.float64)
    y = x + 0.5 * torch.randn(64, 16, dtype=torch.float64)
    x[0], y[0] = 1000.0, 1000.0
    assert CKAReference(x, normalize_rows=False).score(y) < 1e-4
    assert CKAReference(x, normalize_rows=True).score(y) > 0.05


def test_the_debiased_score_is_clipped_at_zero():
    torch.manual_seed(1)
    scores = [CKAReference(torch.randn(8, 20), debiased=True).score(torch.randn(8, 20)) for _ in range(20)]
    assert all(0 <= score <= 1 for score in scores)
    x = torch.randn(9, 5)
    assert CKAReference(x, debiased=True).score(x) == pytest.approx(0, abs=1e-12)


def test_too_few_or_different_tokens_are_refused():
    with pytest.raises(ProbeError, match="the probe gives 1"):
        linear_cka(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ProbeError, match="at least 4"):
        linear_cka(torch.ones(3, 3), torch.ones(3, 3), debiased=True)
    with pytest.raises(ProbeError, match="got 5 and 6"):
        linear_cka(torch.randn(5, 3), torch.randn(6, 3))


@pytest.mark.parametrize(("n", "d"), [(16, 64), (64, 16)])
def test_the_stated_flops_are_those_counted(n, d):
    reference = CKAReference(torch.randn(n, d))
    with FlopCounterMode(display=False) as count:
        reference.score(torch.randn(n, d))
    assert count.get_total_flops() == cka_flops(n, d)


@pytest.mark.parametrize(
    ("n", "d", "dtype", "nbytes"),
    [(16, 64, torch.float32, 16 * 16 * 4), (64, 16, torch.float32, 64 * 16 * 4), (64, 16, torch.bfloat16, 64 * 16 * 2)],
)
def test_the_smaller_of_gram_matrix_and_features_is_kept(n, d, dtype, nbytes):
    assert CKAReference(torch.randn(n, d).to(dtype)).nbytes == nbytes


def test_the_reference_is_a_copy():
    x = torch.randn(64, 16)
    reference, before = CKAReference(x), x.clone()
    x.zero_()
    assert reference.score(before) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("n", "d"), [(4, 8), (2048, 8)])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_rounding_never_makes_a_constant_look_varied(value, n, d, debiased):
    x = torch.randn(n, d)
    for normalize_rows in (True, False):
        reference = CKAReference(torch.full((n, d), value), debiased, normalize_rows)
        assert reference.score(torch.full((n, d), 3 * value)) == 0
        assert reference.score(x) == 1


def test_a_debiased_estimate_without_similar_tokens_is_clear():
    alone = torch.zeros(6, 4)
    alone[0] = 1.0  # all that varies is one token: no two tokens are alike or unlike
    assert linear_cka(alone, torch.randn(6, 4), debiased=True) == 0
    assert linear_cka(torch.eye(5), torch.eye(5), debiased=True) == 1


def test_autocast_does_not_lower_the_precision(monkeypatch):
    monkeypatch.setattr("adafreeze.decide.cka._precision", lambda device: torch.float32)
    x, y = (m.float() for m in pair(64, 16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_cka(x, y)
    assert inside == linear_cka(x, y)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_on_either_side_at_every_shape(shape, debiased, bad):
    x, y = pair(*shape)
    broken = x.clone()
    broken[-1, -1] = bad
    assert math.isnan(linear_cka(broken, y, debiased)) and math.isnan(linear_cka(y, broken, debiased))
    constant = torch.ones(shape[0], 3, dtype=torch.float64)
    assert math.isnan(linear_cka(broken, constant, debiased)), "not 0: nothing is known of it"


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_and_blind_to_the_rotation_and_scale_of_each_side_and_the_order_of_tokens(shape, debiased):
    n, d1, d2 = shape
    x, y = pair(*shape, rank=3)
    cka = linear_cka(x, y, debiased)
    of_x, of_y = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for d in (d1, d2))
    order = torch.randperm(n)
    assert linear_cka(y, x, debiased) == pytest.approx(cka, abs=1e-9)
    assert linear_cka(1e-3 * x @ of_x - 1, 1e3 * y @ of_y, debiased) == pytest.approx(cka, abs=1e-9)
    assert linear_cka(x[order], y[order], debiased) == pytest.approx(cka, abs=1e-9)
    assert debiased or 0 <= cka <= 1


def test_features_that_are_constant_beside_others_change_nothing():
    x, y = pair(30, 8, 8)
    wide = torch.cat([x, torch.full((30, 2), 7.0, dtype=torch.float64)], 1)
    assert linear_cka(wide, y) == pytest.approx(naive_cka(x, y), abs=1e-9)


def test_plain_cka_rises_towards_one_as_tokens_run_out_and_the_debiased_does_not():
    torch.manual_seed(0)
    x, y = torch.randn(16, 200), torch.randn(16, 200)  # unrelated
    assert linear_cka(x, y) > 0.8
    assert abs(linear_cka(x, y, debiased=True)) < 0.1


def test_rows_have_unit_length_and_zero_rows_stay():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5e6, 0.0]])
    assert torch.equal(unit_rows(x), torch.tensor([[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]]))
