"""The plan of a model with AdapterHub's adapters equals a measured run."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("adapters")

from hub_cases import hub_model

import cases
from adafreeze import AdafreezeWarning, Safe, SafeConfig, plan
from adafreeze.costs import CountFlops, SavedBytes
from adafreeze.model import find_stacks


def measured(model: torch.nn.Module, inputs: dict[str, torch.Tensor], depth: int) -> tuple[int, int]:
    (stack,) = find_stacks(model)
    frozen = [stack.block_name(index) for index in range(depth)]
    safe = Safe(model, SafeConfig(freeze_at_start=0, freeze=frozen, cache="off"), probe=inputs, total_steps=10)
    flops = CountFlops()
    with SavedBytes(model) as saved, flops:
        loss = model(**inputs).loss
    with flops:
        loss.backward()
    safe.close()
    model.zero_grad()
    return saved.total, flops.total


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_planned_bytes_and_flops_equal_a_real_step(family):
    model = hub_model(family, dropout=0.0)
    inputs = cases.batch(family, length=None)
    assert not inputs["attention_mask"].all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)  # for example that a step had to be run
        planned = plan(model, inputs=inputs, target="cpu")
    assert [step.prefix for step in planned.steps] == [0, 1, 2, 3]
    for step in planned.steps:
        assert (step.saved, step.flops) == measured(model, inputs, step.prefix), step.prefix


def test_without_a_mask_one_real_step_is_run():
    model, inputs = hub_model("bert", dropout=0.0), cases.batch("bert", rows=2)
    del inputs["attention_mask"]  # so that transformers 4 looks for padding in the tokens
    with pytest.warns(AdafreezeWarning, match="cannot be built or run without data"):
        planned = plan(model, inputs=inputs, target="cpu")
    assert planned.plain.flops == measured(model, inputs, 0)[1]
