"""Whoever opens and closes a thousand times finds everything as it was, and memory with it."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.freeze import Freezer, Prefix
from adafreeze.model import find_stacks, find_units, trace_flow
from adafreeze.model.backends import PeftBackend

CYCLES = 1000


def hooks(model, optimizer):
    """All hooks that anything could have left behind."""
    of_modules = sum(
        len(held) for module in model.modules() for name, held in vars(module).items() if name.endswith("hooks")
    )
    return of_modules + sum(len(held) for name, held in vars(optimizer).items() if name.endswith("hooks"))


def alive():
    """Objects that are alive, by kind: tensors, modules, and all of adafreeze's own."""
    gc.collect()
    found = Counter()
    for held in gc.get_objects():
        kind = type(held)
        if issubclass(kind, torch.Tensor):
            found["Tensor"] += 1
        elif issubclass(kind, nn.Module):
            found["Module"] += 1
        elif str(getattr(kind, "__module__", "")).startswith("adafreeze"):
            found[kind.__qualname__] += 1
    return found


@pytest.fixture
def parts():
    model = cases.lora_model("bert", blocks=3, lora_dropout=0.1)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def step(model, optimizer, batch):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_a_thousand_freezes_and_thaws_leave_no_hook_module_or_tensor(parts):
    model, optimizer = parts
    batch = cases.batch("bert", rows=2)
    stacks, backend = find_stacks(model), PeftBackend(model)
    units = find_units(model, stacks, backend)
    freezer = Freezer(units, backend, optimizer)
    prefix = Prefix(model, stacks, trace_flow(model, stacks, batch))
    step(model, optimizer, batch)

    def cycle(names):
        freezer.freeze(names)
        prefix.update()
        prefix.restore()
        freezer.restore()

    cycle(units)
    before = hooks(model, optimizer), alive()
    state = len(optimizer.state)
    for number in range(CYCLES):
        cycle(list(units)[: 1 + number % 3])
    assert (hooks(model, optimizer), alive()) == before
    assert len(optimizer.state) == state
    step(model, optimizer, batch)
    assert len(optimizer.state) > state


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_a_closed_run_is_freed(parts, cache, tmp_path):
    model, optimizer = parts
    batch = cases.batch("bert", rows=2)

    def run():
        config = SafeConfig(cache=cache, cache_dir=tmp_path if cache == "disk" else None, cache_budget="64MiB")
        safe = Safe(
            model, config, optimizer=optimizer, probe=[batch], total_steps=50, samples_per_step=2, samples_per_epoch=2
        )
        for names in (["bert.encoder.layer.0"], ["bert.encoder.layer.1"]):
            safe.step()
            safe.freeze(names)
            step(model, optimizer, batch)
        safe.close()
        return weakref.ref(safe)

    run()
    before = hooks(model, optimizer), alive()
    closed = [run() for _ in range(8)]
    assert (hooks(model, optimizer), alive()) == before
    assert not any(one() for one in closed)
