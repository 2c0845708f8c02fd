"""What a resumed run takes up again, and what becomes of a state that is not whole."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import cases
from adafreeze import AdafreezeWarning, RunError, Safe, SafeConfig
from adafreeze.loop.state import sealed
from adafreeze.memory.checkpointing import NOTHING

STEPS = 30


def start(model=None, optimizer=None, **settings) -> Safe:
    probe = torch.utils.data.DataLoader(cases.Samples("llama", 16, length=12), 4, collate_fn=cases.collate)
    settings = {"freeze_at_start": 0.0, "warmup": 0.3, "ramp_end": 0.7, "cache": "off", **settings}
    model = model or cases.lora_model("llama")
    return Safe(model, SafeConfig(**settings), optimizer=optimizer, probe=probe, total_steps=STEPS)


def trained(steps, model=None, **settings):
    """A model and its Safe after some steps on the same batch."""
    model = model or cases.lora_model("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    safe = start(model, optimizer, **settings)
    for _ in range(steps):
        model(**cases.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()
    return model, safe


def copied(model):
    """A model as one makes it anew, with the weights of the checkpoint."""
    again = cases.lora_model("llama", len(model.base_model.model.model.layers))
    again.load_state_dict(model.state_dict())
    return again


def kept(safe, **more):
    """A state as it comes back from a file."""
    return json.loads(json.dumps(safe.state_dict(**more)))


def drawn():
    return random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist()


# The random state.


def test_the_random_state_is_that_of_the_moment_of_the_checkpoint():
    model, safe = trained(3)
    drawn()  # leaves half a pair of normal numbers behind, in Python and in NumPy
    state = kept(safe)
    expected = drawn()
    again = start(copied(model))
    drawn()
    again.load_state_dict(state)
    assert drawn() == expected


def test_a_host_that_keeps_the_random_state_itself_leaves_it_out():
    model, safe = trained(3)
    state = kept(safe, random_state=False)
    again = start(copied(model))
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    again.load_state_dict(state)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(after[0], before[0]) and after[1:] == before[1:]


def test_the_random_state_of_another_rank_is_not_taken():
    _, safe = trained(1)
    state = kept(safe)
    state["random"]["rank"] = 1
    again = start()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with pytest.warns(AdafreezeWarning, match="rank 0 is not restored: the checkpoint holds that of rank 1"):
        again.load_state_dict(sealed(state))
    assert torch.equal(torch.get_rng_state(), before)


# What it knew.


@pytest.mark.parametrize("steps", [5, 12, 25])  # in the warm-up, while the ramp rises, after it
def test_stage_scores_history_and_prefix_are_taken_up(steps):
    model, safe = trained(steps)
    again = start(copied(model))
    again.load_state_dict(kept(safe))
    assert again.state_dict() == safe.state_dict()
    assert again.prefixes == safe.prefixes and again.frozen == safe.frozen and again.scores == safe.scores
    assert again.decider.ramp(steps) == safe.decider.ramp(steps) and again.warmup_end == safe.warmup_end


@pytest.fixture(scope="module")
def pressed():
    """A budget that has something recomputed, and a model and its Safe under it."""
    _, safe = trained(1, cases.lora_model("llama", 2), memory_budget="1GiB")
    limit = int(0.9 * next(iter(safe.budget._choices.values())).peak)
    return limit, *trained(2, cases.lora_model("llama", 2), memory_budget=limit)


def test_the_recompute_choice_is_taken_up_and_not_made_again(pressed):
    limit, model, safe = pressed
    chosen = safe.budget.checkpointing.recomputed
    assert chosen != NOTHING
    again = start(copied(model), memory_budget=limit)
    again.load_state_dict(kept(safe))
    written = len(again.journal.events)
    again.model(**cases.batch("llama"))
    assert again.budget.checkpointing.recomputed == chosen
    assert "recompute" not in [event["event"] for event in again.journal.events[written:]]


def test_a_larger_budget_than_before_makes_its_own_choice(pressed):
    _, model, safe = pressed
    again = start(copied(model), memory_budget="1GiB")
    again.load_state_dict(kept(safe))
    again.model(**cases.batch("llama"))
    assert again.budget.checkpointing.recomputed == NOTHING


def test_what_is_free_is_not_more_than_it_was(pressed):
    limit, model, safe = pressed
    again = start(copied(model), memory_budget="auto")
    again.load_state_dict(kept(safe))
    assert again.budget.limit == limit


def test_a_cache_that_units_frozen_by_hand_have_opened_learns_what_was_decided():
    by_hand = {"freeze": ["model.layers.0"], "cache": "ram"}
    _, safe = trained(3, **by_hand)
    safe.cache.prefix_cache.switch_off("it was slow")
    again = start(**by_hand)
    assert again.cache.prefix_cache.off is None
    again.load_state_dict(kept(safe))
    assert again.cache.prefix_cache.off == "it was slow"


def test_a_cache_that_could_not_pay_stays_off():
    class Masking:
        def __call__(self, samples):
            batch = cases.collate(samples)
            return {**batch, "input_ids": torch.randint(3, cases.VOCABULARY, batch["input_ids"].shape)}

    def begin():
        probe = torch.utils.data.DataLoader(cases.Samples("llama", 16, length=12), 4, collate_fn=Masking())
        return Safe(cases.lora_model("llama"), SafeConfig(freeze_at_start=0), probe=probe, total_steps=STEPS)

    safe = begin()
    safe.model(**cases.batch("llama"))
    safe.step()
    assert "random masking" in safe.cache.off_because
    again = begin()
    again.load_state_dict(kept(safe))
    again.freeze(["model.layers.0"])
    assert "random masking" in again.cache.off_because and again.cache.prefix_cache is None


def test_pre_trained_is_what_was_before_training_also_where_a_base_weight_trains():
    def norms_train(model):
        for layer in model.base_model.model.model.layers:
            layer.input_layernorm.requires_grad_(True)
        return model

    model, safe = trained(8, norms_train(cases.lora_model("llama")))
    again = start(norms_train(copied(model)))
    before = {name: p.clone() for name, p in again.model.named_parameters()}
    again.load_state_dict(kept(safe))
    assert all(torch.equal(p, before[name]) for name, p in again.model.named_parameters())
    assert again.decider.scorer.measure({}) == safe.decider.scorer.measure({})


def test_another_probe_is_told_of():
    _, safe = trained(5)
    with pytest.warns(AdafreezeWarning, match="probe differs"):
        start(seed=1).load_state_dict(kept(safe))


def test_a_probe_that_fails_does_not_end_the_resumed_run():
    model, safe = trained(5)
    state = kept(safe)
    again = start(copied(model))
    again.model.base_model.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.warns(AdafreezeWarning, match="could not be measured at step 5: ZeroDivisionError"):
        again.load_state_dict(state)
    assert again.steps == 5


# States that are not whole.


@pytest.fixture(scope="module")
def whole():
    """A state, and the Safe of a run that could take it up."""
    model, safe = trained(12)
    return kept(safe), start(copied(model))


def flipped(text):
    """One digit of the scores is another."""
    at = text.index('"scores"')
    at += next(i for i, c in enumerate(text[at:]) if c in "123456789")
    return text[:at] + ("8" if text[at] != "8" else "7") + text[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state: json.loads(flipped(json.dumps(state))), "does not match its checksum"),
        (lambda state: {k: v for k, v in state.items() if k != "deciding"}, "does not match its checksum"),
        (lambda state: {k: v for k, v in state.items() if k != "checksum"}, "does not match its checksum"),
        (lambda state: {**state, "length": {**state["length"], "steps": 99}}, "does not match its checksum"),
        (lambda state: {**state, "version": 2}, "has version 2, and this version of adafreeze reads 5"),
        (lambda state: {**state, "version": [2]}, r"has version \[2\]"),
        (lambda state: {k: v for k, v in state.items() if k != "version"}, "without a version"),
        (lambda state: None, "is None, without a version"),
        (lambda state: json.dumps(state)[:200], "without a version"),
        (lambda state: [state], "without a version"),
    ],
)
def test_a_state_that_is_not_whole_is_refused_and_changes_nothing(damage, told, whole):
    state, again = whole
    before = again.state_dict()
    with pytest.raises(RunError, match=told) as caught:
        again.load_state_dict(damage(state))
    assert "Fix:" in str(caught.value)
    assert again.state_dict() == before and not again.frozen
