"""Adapter libraries are found through one table; a small subclass is enough for another one."""

import pytest
import torch
from torch import nn

import cases
from adafreeze import ModelError
from adafreeze.model import find_stacks, find_units
from adafreeze.model.backends import Backend, PeftBackend, find, find_backend


class Scale(nn.Module):
    """An adapter of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class ScaleBackend(Backend):
    @classmethod
    def matches(cls, model):
        return any(isinstance(module, Scale) for module in model.modules())

    def is_layer(self, module):
        return isinstance(module, Scale)

    def why_frozen(self):
        return "every scale is frozen", "scale.requires_grad_(True)"


def test_another_library_is_one_line_in_the_table(monkeypatch):
    monkeypatch.setattr(find, "BACKENDS", (ScaleBackend, *find.BACKENDS))
    blocks = [nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)]
    for block in blocks:
        block.adapter = Scale()
    model = nn.TransformerEncoder(blocks[0], 1, enable_nested_tensor=False)
    model.layers = nn.ModuleList(blocks)
    backend = find_backend(model)
    assert type(backend) is ScaleBackend and not backend.any_merged() and not backend.keeps_frozen(blocks[0].adapter)
    units = find_units(model, find_stacks(model), backend, "site")
    assert list(units) == [f"layers.{index}.adapter" for index in range(3)]
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="every scale is frozen"):
        find_units(model, find_stacks(model), backend)
    assert type(find_backend(cases.lora_model("bert"))) is PeftBackend
    with pytest.raises(ModelError, match="has no adapters"):
        find_backend(cases.base_model("bert"))
