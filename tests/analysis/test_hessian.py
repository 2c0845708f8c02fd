"""Products, spectrum and trace agree with closed forms and torch's own Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adafreeze.analysis import Hessian, Loss, adapter_parameters, eigenvalues, trace
from analysis_cases import bert, quadratic, with_spectrum
from cases import batch, lora_model


def test_the_outermost_eigenvalues_of_a_known_spectrum_are_found():
    # The mean of 1·L and 3·L has twice the spectrum.
    hessian = Hessian(quadratic(with_spectrum([9.0, -7.0, 5.0, 4.0, *np.linspace(-1, 1, 60)])))
    assert eigenvalues(hessian, 4, tolerance=0) == pytest.approx([18, 10, 8, -14], rel=1e-10)
    assert eigenvalues(hessian, 4) == pytest.approx([18, 10, 8, -14], rel=1e-3)
    assert hessian.used < 200


@pytest.mark.parametrize("size", [64, 8])
def test_the_largest_eigenvalue_is_found_even_if_its_magnitude_is_small(size):
    hessian = Hessian(quadratic(with_spectrum([-9.0, -8.0, -7.0, *np.linspace(0.1, 1, size - 3)])))
    assert eigenvalues(hessian, 3, tolerance=1e-8) == pytest.approx([2, -16, -18], rel=1e-6)


def test_few_parameters_have_all_their_eigenvalues():
    hessian = Hessian(quadratic(with_spectrum([3.0, -2.0, 1.0, 0.5, 0.4, 0.3, 0.2])))
    assert eigenvalues(hessian, 3) == pytest.approx([6, 2, -4])
    assert eigenvalues(hessian, 99) == pytest.approx([6, 2, 1, 0.8, 0.6, 0.4, -4])


def test_the_trace_has_the_standard_error_of_the_formula():
    matrix = with_spectrum(list(np.linspace(-1, 3, 40)))
    mean, error = trace(Hessian(quadratic(matrix)), 800)
    off = matrix - torch.diag(torch.diagonal(matrix))
    assert error == pytest.approx(float((2 * (2 * off).square().sum() / 800).sqrt()), rel=0.1)
    assert abs(mean - 80) < 3 * error


def test_the_trace_of_a_diagonal_is_exact_from_one_vector():
    assert trace(Hessian(quadratic(torch.arange(1.0, 11).double().diag())), 1) == (110.0, None)


@pytest.mark.parametrize("head", [False, True])
def test_products_agree_with_torch_for_all_adapters_including_frozen_ones(head):
    loss = bert(head=head)
    frozen = next(iter(loss.parameters.values()))
    frozen.requires_grad_(False)
    assert any("classifier" in name for name in loss.parameters) == head
    full = {id(p): name for name, p in loss.model.named_parameters()}
    names = {name: full[id(p)] for name, p in loss.parameters.items()}

    def mean(flat: torch.Tensor) -> torch.Tensor:
        values = {names[n]: part for n, part in zip(loss.parameters, loss.parts(flat), strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = [torch.func.functional_call(loss.model.eval(), values, (), b).loss for b, _ in loss._batches]
        return (3 * found[0] + found[1]) / 4

    w = loss.weights()
    vectors = torch.randn(2, loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [torch.autograd.functional.hvp(mean, w, v)[1] for v in vectors]
    slope = torch.autograd.functional.jacobian(mean, w)
    loss.model.train()
    torch.testing.assert_close(loss.products(vectors), torch.stack(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.gradient(), slope, rtol=1e-9, atol=1e-12)
    assert not frozen.requires_grad and loss.model.training and all(p.grad is None for p in loss.parameters.values())


def test_a_whole_hessian_agrees_with_torch():
    loss = bert()
    name, part = next((n, p) for n, p in loss.parameters.items() if p.numel() == 32)
    small = Loss(loss.model, [batch("bert", 3)], {name: part})
    inner = next(n for n, p in loss.model.named_parameters() if p is part)

    def value(w: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(loss.model.eval(), {inner: w}, (), batch("bert", 3)).loss

    expected = torch.autograd.functional.hessian(value, part.detach()).view(32, 32)
    hessian = Hessian(small)
    np.testing.assert_allclose(hessian @ np.eye(32), expected.numpy(), rtol=1e-9, atol=1e-13)
    top = sorted(np.linalg.eigvalsh(expected.numpy()), key=abs)[-1]
    assert eigenvalues(hessian, 3)[0 if top > 0 else -1] == pytest.approx(top, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
def test_other_families_differentiate_twice(family):
    model = lora_model(family, 1, init_lora_weights=False)
    loss = Loss(model, [batch(family, 2)], adapter_parameters(model))
    v, w = torch.randn(2, loss.size, generator=torch.Generator().manual_seed(0)).double()
    (hv, hw) = loss.products(torch.stack([v, w]))
    assert hv.norm() > 0 and float(w @ hv) == pytest.approx(float(v @ hw), rel=1e-3)


def test_the_same_seed_gives_the_same_numbers():
    hessian = Hessian(bert(torch.float32))
    assert eigenvalues(hessian, 2) == eigenvalues(hessian, 2)
    assert trace(hessian, 3) == trace(hessian, 3) != trace(hessian, 3, seed=1)
