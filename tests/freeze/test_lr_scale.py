"""Learning rates after a freeze are scaled only while the optimizer steps."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR
from transformers.optimization import Adafactor

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.freeze.optimizer import LRScaler
from adafreeze.model.units import Unit


def rates_of(optimizer):
    """The learning rates that the optimizer uses in each step."""
    seen = []
    optimizer.register_step_pre_hook(lambda it, *_: seen.append([group["lr"] for group in it.param_groups]))
    return seen


class Fails:
    """A hook that fails the step while ``on``."""

    on = True

    def __call__(self, *_):
        if self.on:
            raise RuntimeError("out of memory")


def units(count, *parameters):
    """Empty units "0", "1", ...; the first one has these parameters."""
    holder = torch.nn.ParameterList(parameters)
    slots = [tuple((holder, str(place)) for place in range(len(parameters)))] + [()] * (count - 1)
    return [Unit(str(index), "", index, holder, (), slots[index], ()) for index in range(count)]


def scaler_on(optimizer, frozen="012", *parameters):
    """A scaler for four units, of which these are frozen."""
    scaler = LRScaler(optimizer, "sqrt", units(4, *parameters))
    scaler.after_freeze(frozen)
    return scaler


def sgd(lr=0.5):
    weight = torch.nn.Parameter(torch.ones(1))
    return weight, torch.optim.SGD([weight], lr=lr)


def train(config, steps=20, blocks=4):
    model = cases.lora_model("llama", blocks=blocks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = ExponentialLR(optimizer, 0.9)  # computes each rate from the previous one
    safe = Safe(model, config, optimizer=optimizer, probe=cases.loader("llama"), total_steps=steps)
    seen, scales, shown = rates_of(optimizer), [], []
    for _ in range(steps):
        scales.append(safe.logs()["safe/lr_scale"])
        model(**cases.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown.append(schedule.get_last_lr()[0])
        schedule.step()
        safe.step()
    safe.close()
    return safe, seen, scales, shown, optimizer


def test_a_step_of_adam_keeps_its_length():
    safe, seen, scales, shown, _ = train(SafeConfig(freeze_share=0.9, freeze_at_start=0))
    assert safe.frozen and scales[0] == 1 and scales[-1] == round(min(3, math.sqrt(4 / (4 - len(safe.frozen)))), 4) > 1
    assert shown == pytest.approx([1e-2 * 0.9**step for step in range(20)])  # unchanged
    assert [rate for [rate] in seen] == pytest.approx([s * own for s, own in zip(scales, shown, strict=True)], rel=1e-3)


@pytest.mark.parametrize(("lr_scale", "last"), [(1.0, 1.0), (2.0, 2.0)])
def test_a_fixed_scale_applies_from_the_first_freeze(lr_scale, last):
    safe, _, scales, _, _ = train(SafeConfig(freeze_share=0.9, lr_scale=lr_scale))
    assert safe.frozen and (scales[0], scales[-1]) == (1.0, last)


def test_freezing_by_hand_and_the_published_method_do_not_scale():
    by_hand = SafeConfig(freeze=("model.layers.0", "model.layers.1"), freeze_share=0)
    assert set(train(by_hand)[2]) == {1.0}
    assert SafeConfig.paper().lr_scale == 1.0


def test_close_restores_the_optimizer():
    _, seen, scales, _, optimizer = train(SafeConfig(freeze_share=0.9, freeze_at_start=0))
    own = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert scales[-1] > 1 and seen[-1] == [own] and optimizer.param_groups[0]["lr"] == own


def test_a_failed_step_does_not_keep_the_scaled_rate():
    weight, optimizer = sgd()
    scaler = scaler_on(optimizer)
    optimizer.register_step_pre_hook(fails := Fails())
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1.0  # the step began
    fails.on = False
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == 0.0 and optimizer.param_groups[0]["lr"] == 0.5
    fails.on = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    fails.on, optimizer.param_groups[0]["lr"] = False, 0.25  # other code sets one
    optimizer.step()
    assert weight.item() == -0.5 and optimizer.param_groups[0]["lr"] == 0.25
    fails.on = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    scaler.remove()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_inside_a_closure_the_rate_is_not_scaled():
    weight, optimizer = sgd()
    scaler_on(optimizer)
    inside = []

    def closure():
        inside.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(1)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7
    assert inside == [0.5] and weight.item() == 0.0 and optimizer.param_groups[0]["lr"] == 0.5

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure=interrupted)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_only_groups_with_adapters_are_scaled_and_two_scalers_do_not_add_up():
    mine, other, head = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [p]} for p in (mine, other, head)], lr=0.5)
    scaler_on(optimizer, "01", mine)
    scaler_on(optimizer, "012", other)
    seen = rates_of(optimizer)
    for _ in range(3):
        optimizer.step()
    assert seen == [[0.5 * math.sqrt(2), 1.0, 0.5]] * 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3
    one = torch.optim.SGD([mine], lr=0.5)
    for _ in range(2):
        scaler_on(one, "012", mine)
    for _ in range(3):
        one.step()
    assert one.param_groups[0]["lr"] == 0.5


def test_an_optimizer_without_rates_is_not_scaled():
    optimizer = Adafactor([torch.nn.Parameter(torch.ones(2, 2))], relative_step=True)
    assert scaler_on(optimizer).scale == 1.0


def test_a_compiled_step_restores_its_rate():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler_on(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        weight.grad = torch.ones(1)
        step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_without_an_optimizer_nothing_is_scaled():
    assert scaler_on(None).scale == 1.0


def test_the_real_optimizer_is_found_in_its_wrappers():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    _, real = sgd()
    scaler = scaler_on(AcceleratedOptimizer(AcceleratedOptimizer(real)), "01")
    seen = rates_of(real)
    real.step()
    assert seen == [[0.5 * math.sqrt(2)]]
    scaler.remove()
    real.step()
    assert seen[1:] == [[0.5]]
