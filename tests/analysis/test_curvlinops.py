"""Agreement with curvlinops, in a separate environment: ``nox -s curvlinops``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adafreeze.analysis import Hessian, Loss, adapter_parameters, eigenvalues
from cases import batch, lora_model

curvlinops = pytest.importorskip("curvlinops")


def test_products_and_top_eigenvalue_agree_with_curvlinops():
    model = lora_model("bert", 2, r=1, init_lora_weights=False).double().eval()
    model.base_model.model.set_attn_implementation("eager")
    loss = Loss(model, [batch("bert", 3), batch("bert", 1, 9)], adapter_parameters(model))
    parameters = list(loss.parameters.values())

    def logits(inputs: dict) -> torch.Tensor:
        return model(**inputs).logits

    wrapped = _Callable(model, logits)
    names = [name for name, p in wrapped.named_parameters() if any(p is own for own in parameters)]
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(name in names)
    data = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b, _ in loss._batches]
    theirs = curvlinops.HessianLinearOperator(
        wrapped, nn.CrossEntropyLoss(), parameters, data, batch_size_fn=lambda inputs: len(inputs["input_ids"])
    )
    vector = torch.randn(loss.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = Hessian(loss)
    np.testing.assert_allclose(ours @ vector.numpy(), (theirs @ vector).detach().numpy(), rtol=1e-8, atol=1e-11)
    matrix = theirs @ torch.eye(loss.size, dtype=torch.float64)
    assert eigenvalues(ours, 3)[0] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-4)


class _Callable(nn.Module):
    def __init__(self, model: nn.Module, forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, inputs: dict) -> torch.Tensor:
        return self._forward(inputs)
