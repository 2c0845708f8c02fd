"""Slices, sharpness and norms agree with closed forms and leave the weights unchanged."""

from __future__ import annotations

import copy

import pytest
import torch

from adafreeze.analysis import (
    Loss,
    Settings,
    adapter_parameters,
    block_norms,
    direction,
    line,
    measure,
    plane,
    sharpness,
)
from analysis_cases import bert, quadratic, with_spectrum
from cases import batch, lora_model


def test_a_direction_has_the_row_norms_of_the_weights():
    loss = quadratic(torch.eye(10).double())
    with torch.no_grad():
        loss.parameters["a"].copy_(torch.tensor([[3.0, 0, 4], [0, 0, 0]]))
    drawn = torch.randn(10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    first, vector = drawn[:3] / drawn[:3].norm() * 5, drawn[6:] / drawn[6:].norm() * 2
    torch.testing.assert_close(direction(loss, 7), torch.cat([first, torch.zeros(3).double(), vector]))
    assert not torch.equal(direction(loss, 7), direction(loss, 8))


def test_slices_of_a_quadratic_are_parabolas():
    matrix = with_spectrum(list(range(1, 11)))
    loss = quadratic(matrix)
    w, steps = loss.weights(), [-1.0, 0.0, 0.5]
    d, e = direction(loss, 0), direction(loss, 1)

    def expected(a: float, b: float = 0.0) -> float:
        v = w + a * d + b * e
        return float(v @ matrix @ v)

    assert line(loss, d, steps) == pytest.approx([expected(a) for a in steps])
    assert plane(loss, d, e, steps) == [pytest.approx([expected(a, b) for a in steps]) for b in steps]


def test_sharpness_of_a_quadratic_in_closed_form():
    matrix = with_spectrum(list(range(1, 11)))
    loss = quadratic(matrix)
    with torch.no_grad():
        loss.parameters["b"].mul_(-3)
    w = loss.weights()
    g = 2 * matrix @ w
    e = 0.05 * g / g.norm()
    assert sharpness(loss) == pytest.approx(float(g @ e + e @ matrix @ e))
    e = 0.5 * w.square() * g / (w.abs() * g).norm()
    assert sharpness(loss, 0.5, adaptive=True) == pytest.approx(float(g @ e + e @ matrix @ e))


def test_sharpness_is_zero_for_a_zero_gradient():
    loss = quadratic(torch.eye(8).double())
    with torch.no_grad():
        for parameter in loss.parameters.values():
            parameter.zero_()
    assert sharpness(loss) == sharpness(loss, adaptive=True) == 0


def test_norms_are_per_block_and_for_the_rest():
    model = lora_model("bert", 3, target_modules=["query", "pooler.dense"], layers_to_transform=None)
    loss = Loss(model, [], adapter_parameters(model))
    found = block_norms(loss)
    assert list(found) == [*(f"bert.encoder.layer.{i}" for i in range(3)), "other"]
    layer = [p for name, p in model.named_parameters() if ".layer.1." in name and "lora_" in name]
    assert found["bert.encoder.layer.1"] == pytest.approx(
        float(torch.cat([p.detach().flatten() for p in layer]).norm())
    )


def test_measuring_is_repeatable_and_leaves_the_model_bit_identical():
    loss = bert(torch.float32)
    loss.model.train()
    before = copy.deepcopy(loss.model.state_dict())
    settings = Settings(eigenvalues=2, trace_samples=2, grid=5)
    found = measure(loss, settings)
    assert found == measure(loss, settings)
    after = loss.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(m.training for m in loss.model.modules())
    assert found.line[2] == found.plane[1][1] == found.loss
    assert len(found.line) == 5 and [len(row) for row in found.plane] == [3, 3, 3]


def test_batches_are_weighted_by_their_predictions():
    model = lora_model("gpt2", 1, dropout=0.0)
    batches = [batch("gpt2", 2, 8), batch("gpt2", 1, 12)]
    batches[1]["labels"][:, :5] = -100
    losses = [model.eval()(**b).loss.item() for b in batches]
    loss = Loss(model, batches, adapter_parameters(model))
    assert loss.value() == pytest.approx((14 * losses[0] + 7 * losses[1]) / 21)


def test_weights_are_restored_when_a_pass_fails():
    loss = quadratic(torch.eye(8).double())
    loss._loss = lambda model, scale: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loss.at(torch.ones(8).double())
    assert torch.equal(loss.weights(), torch.ones(8).double())
