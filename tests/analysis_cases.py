"""Losses with a known Hessian, and the loss of a tiny model."""

from __future__ import annotations

import torch
from torch import nn

from adafreeze.analysis import Loss, adapter_parameters
from cases import batch, lora_model


class Quadratic(nn.Module):
    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.a = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(len(matrix) - 6, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        w = torch.cat([self.a.flatten(), self.b])
        return w @ self.matrix @ w / 2


def quadratic(matrix: torch.Tensor) -> Loss:
    model = Quadratic(matrix)
    return Loss(model, [1.0, 3.0], dict(model.named_parameters()), lambda m, scale: scale * m(), lambda _: 2)


def with_spectrum(values: list[float]) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(1)).double())[0]
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def bert(dtype: torch.dtype = torch.float64, *, head: bool = False) -> Loss:
    model = lora_model("bert", 2, r=1, init_lora_weights=False, task_type="SEQ_CLS").to(dtype)
    return Loss(model, [batch("bert", 3), batch("bert", 1, 9)], adapter_parameters(model, head=head))
