"""Learning rates after a freeze: larger while the optimizer steps, and nowhere else."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR
from transformers.optimization import Adafactor

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.freeze.lr_scale import LRScaler
from adafreeze.model.units import Unit


def rates_of(optimizer):
    """The learning rates of each step as the optimizer sees them."""
    seen = []
    optimizer.register_step_pre_hook(lambda it, *_: seen.append([group["lr"] for group in it.param_groups]))
    return seen


class Fails:
    """A hook that ends a step when it is on."""

    on = True

    def __call__(self, *_):
        if self.on:
            raise RuntimeError("out of memory")


def units(count, *parameters):
    """Units "0", "1", ... of nothing, or the first of these parameters."""
    holder = torch.nn.ParameterList(parameters)
    slots = [tuple((holder, str(place)) for place in range(len(parameters)))] + [()] * (count - 1)
    return [Unit(str(index), "", index, holder, (), slots[index], ()) for index in range(count)]


def train(config, steps=20, blocks=4):
    model = cases.lora_model("llama", blocks=blocks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = ExponentialLR(optimizer, 0.9)  # takes each rate from the one before
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


def test_a_step_of_adam_stays_as_long_as_it_was():
    safe, seen, scales, shown, _ = train(SafeConfig(freeze_share=0.9, freeze_at_start=0))
    assert safe.frozen and scales[0] == 1 and scales[-1] == round(min(3, math.sqrt(4 / (4 - len(safe.frozen)))), 4) > 1
    assert shown == pytest.approx([1e-2 * 0.9**step for step in range(20)])  # the schedule's own, untouched
    assert [rate for [rate] in seen] == pytest.approx([s * own for s, own in zip(scales, shown, strict=True)], rel=1e-3)


@pytest.mark.parametrize(("lr_scale", "last"), [(1.0, 1.0), (2.0, 2.0)])
def test_a_number_holds_from_the_first_freeze_on(lr_scale, last):
    safe, _, scales, _, _ = train(SafeConfig(freeze_share=0.9, lr_scale=lr_scale))
    assert safe.frozen and (scales[0], scales[-1]) == (1.0, last)


def test_units_frozen_by_hand_and_the_published_method_leave_rates_alone():
    by_hand = SafeConfig(freeze=("model.layers.0", "model.layers.1"), freeze_share=0)
    assert set(train(by_hand)[2]) == {1.0}
    assert SafeConfig.paper().lr_scale == 1.0


def test_after_close_the_optimizer_is_as_it_was():
    _, seen, scales, _, optimizer = train(SafeConfig(freeze_share=0.9, freeze_at_start=0))
    own = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert scales[-1] > 1 and seen[-1] == [own] and optimizer.param_groups[0]["lr"] == own


def test_a_step_that_fails_leaves_the_rate_to_the_schedule():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    length = LRScaler(optimizer, "sqrt", units(4))
    length.after_freeze("012")

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
    fails.on, optimizer.param_groups[0]["lr"] = False, 0.25  # somebody sets one
    optimizer.step()
    assert weight.item() == -0.5 and optimizer.param_groups[0]["lr"] == 0.25
    fails.on = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    length.remove()
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_inside_a_closure_the_rate_is_the_schedules_own():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    length = LRScaler(optimizer, "sqrt", units(4))
    length.after_freeze("012")
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


def test_only_groups_that_hold_adapters_are_scaled_and_two_on_one_optimizer_do_not_pile_up():
    mine, other, head = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [p]} for p in (mine, other, head)], lr=0.5)
    lengths = [LRScaler(optimizer, "sqrt", units(4, p)) for p in (mine, other)]
    for frozen, length in enumerate(lengths, 2):
        length.after_freeze("012"[:frozen])
    seen = rates_of(optimizer)
    for _ in range(3):
        optimizer.step()
    assert seen == [[0.5 * math.sqrt(2), 1.0, 0.5]] * 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3
    one = torch.optim.SGD([mine], lr=0.5)
    for length in [LRScaler(one, "sqrt", units(4, mine)) for _ in range(2)]:
        length.after_freeze("012")
    for _ in range(3):
        one.step()
    assert one.param_groups[0]["lr"] == 0.5


def test_an_optimizer_without_rates_of_its_own_has_no_scale():
    optimizer = Adafactor([torch.nn.Parameter(torch.ones(2, 2))], relative_step=True)
    length = LRScaler(optimizer, "sqrt", units(4))
    length.after_freeze("012")
    assert length.scale == 1.0


def test_a_compiled_step_gets_its_rate_back():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    length = LRScaler(optimizer, "sqrt", units(4))
    length.after_freeze("012")
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        weight.grad = torch.ones(1)
        step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_no_optimizer_no_scale():
    length = LRScaler(None, "sqrt", units(4))
    length.after_freeze("012")
    assert length.scale == 1.0


def test_the_real_optimizer_is_found_in_its_wrappers():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    real = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    length = LRScaler(AcceleratedOptimizer(AcceleratedOptimizer(real)), "sqrt", units(4))
    length.after_freeze("01")
    seen = rates_of(real)
    real.step()
    assert seen == [[0.5 * math.sqrt(2)]]
    length.remove()
    real.step()
    assert seen[1:] == [[0.5]]
