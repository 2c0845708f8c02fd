"""The estimated optimizer state equals what torch's optimizers keep."""

import pytest
import torch

from adafreeze.costs.memory import bytes_of
from adafreeze.memory.optimizer import optimizer_bytes, optimizer_names, state_bytes

MADE = {
    "adamw_torch": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MADE)
def test_the_estimate_equals_the_real_state(name, dtype):
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((8, 16), (16,))]
    optimizer = MADE[name](parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before, _ = optimizer_bytes(optimizer, parameters)
    optimizer.step()
    kept = bytes_of(v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert state_bytes(name, parameters) == before == kept == optimizer_bytes(optimizer, parameters)[0]


def test_frozen_parameters_have_no_state():
    parameters = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    assert optimizer_bytes(optimizer, parameters[:1])[0] == optimizer_bytes(optimizer, parameters)[0] // 2


def test_8_bit_and_factored_state_is_smaller():
    parameter = [torch.nn.Parameter(torch.ones(64, 64))]
    assert state_bytes("adamw_bnb_8bit", parameter) == 2 * 64 * 64 + 4
    assert state_bytes("adafactor", parameter) == 4 * (64 + 64)
    assert state_bytes("ademamix", parameter) > state_bytes("adamw_torch", parameter)


def test_all_names_exist_in_transformers():
    from transformers.training_args import OptimizerNames

    assert set(optimizer_names()) <= {entry.value for entry in OptimizerNames}
    assert "galore_adamw" not in optimizer_names()
