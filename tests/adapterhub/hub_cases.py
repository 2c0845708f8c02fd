"""The tiny models of cases.py with adapters of AdapterHub."""

from __future__ import annotations

import adapters
import torch

import cases

HOUSLBY, PFEIFFER = "double_seq_bn", "seq_bn"


def hub_model(family: str, config: object = HOUSLBY, blocks: int = 4, dropout: float | None = None) -> torch.nn.Module:
    """``cases.base_model`` with an active trainable adapter "task" that is not zero."""
    model = cases.base_model(family, blocks, dropout)
    adapters.init(model)
    torch.manual_seed(1)
    model.add_adapter("task", config=config)
    model.train_adapter("task")
    model.train()
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all adapter weights."""
    return {
        f"{layer}.{location}.{name}": parameter.detach().clone()
        for layer, sites in model.get_adapter("task").items()
        for location, module in sites.items()
        for name, parameter in module.named_parameters()
    }
