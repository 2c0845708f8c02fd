"""Blocks that are frozen before step 0: which, what that saves from the first step on, and that it stays so."""

from __future__ import annotations

import pytest
import torch

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.cache.run import RunCache
from adafreeze.costs.memory import SavedBytes
from adafreeze.decide.scores import SCORES
from adafreeze.errors import ConfigError
from adafreeze.journal import Journal
from adafreeze.loop.preflight import frozen_at_start


def started(family: str = "bert", optimizer=None, model=None, **config) -> Safe:
    model = model or cases.lora_model(family)
    parts = {"optimizer": optimizer, "probe": cases.loader(family), "total_steps": 20}
    return Safe(model, SafeConfig(**{"freeze_at_start": 0.5, **config}), **parts)


def started_to_train(**config) -> tuple[Safe, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = cases.lora_model("bert")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return started(model=model, optimizer=optimizer, **config), optimizer


def go_on(safe: Safe, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        safe.model(**cases.batch("bert")).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_lowest_blocks_of_each_chain_are_frozen(family):
    safe = started(family)
    units = list(safe.units)
    assert safe.frozen == set(units[: len(units) // 2])
    assert sum(safe.prefixes.values()) == len(units) // 2
    (event,) = [event for event in safe.journal.events if event["event"] == "freeze"]
    assert (event["step"], event["by"], event["lr_scale"]) == (0, "start", 1.0)


def test_a_third_of_six_is_two_in_floats_as_well():
    chains = (tuple((f"u{index}",) for index in range(6)),)
    assert frozen_at_start(SafeConfig(freeze_at_start=1 / 3), chains, Journal(), head=True) == ["u0", "u1"]
    by_hand = SafeConfig(freeze_at_start=1 / 3, freeze=("u1", "u5"))
    assert frozen_at_start(by_hand, chains, Journal(), head=True) == ["u1", "u5", "u0"]


def test_the_first_step_already_keeps_less():
    def saved(**config) -> int:
        model = cases.lora_model("bert")
        safe = started(model=model, **config)
        with SavedBytes(model) as counted:
            model(**cases.batch("bert")).loss.backward()
        safe.close()
        return counted.total

    assert saved() < 0.6 * saved(freeze_at_start=0.0)


def test_what_freezes_later_comes_on_top_and_what_froze_first_does_not_move():
    config = {"freeze_at_start": 0.25, "freeze_share": 0.9, "wait_for_loss": False}
    safe, optimizer = started_to_train(**config)
    first = {id(p): p.detach().clone() for name in safe.frozen for p in safe.units[name].parameters()}
    go_on(safe, optimizer, 20)
    assert len(safe.frozen) > 1
    assert all(torch.equal(p, first[id(p)]) for p in safe.model.parameters() if id(p) in first)
    live = len(safe.units) - len(safe.frozen)
    last = [event for event in safe.journal.events if event["event"] == "freeze"][-1]
    assert last["lr_scale"] == pytest.approx((3 / live) ** 0.5)  # of the three that trained at first

    again = started(**config)
    again.load_state_dict(safe.state_dict())
    assert again.frozen == safe.frozen
    assert again.prefixes == safe.prefixes


@pytest.mark.parametrize(
    "field", [{"freeze_at_start": 0.5}, {"freeze_at_start": 0.0, "freeze": ["bert.encoder.layer.0"]}]
)
def test_it_holds_for_a_run_that_began_without_it(field):
    before = started(freeze_at_start=0.0)
    state = before.state_dict()
    before.close()
    again = started(**field)
    first = again.frozen
    again.load_state_dict(state)
    assert again.frozen == first
    assert len(first) in (1, 2)


def test_a_dry_run_says_what_would_freeze(caplog):
    with caplog.at_level("INFO", "adafreeze"):
        safe = started(dry_run=True)
    assert "Before step 0 2 units would freeze" in caplog.text
    (event,) = [event for event in safe.journal.events if event["event"] == "would_freeze"]
    assert (event["step"], len(event["units"])) == (0, 2)


def test_a_freeze_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = cases.lora_model("bert")
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(RunCache, "update", fail)
    with pytest.raises(OSError, match="No space"):
        started(model=model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        ({"dry_run": True}, 0),
        ({"freeze_at_start": 0.0}, 0),
        ({"freeze_at_start": 1.0}, 3),
        ({"min_live_blocks": 3}, 1),
        ({"freeze_at_start": 1.0, "min_live_blocks": 0}, 3),  # nothing else trains
        ({"granularity": "site"}, 4),
    ],
)
def test_how_many(config, frozen):
    assert len(started(**config).frozen) == frozen


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score_is_measured_above_it(score):
    safe, optimizer = started_to_train(score=score, freeze_share=0.0)
    go_on(safe, optimizer, 10)
    live = [name for name in safe.units if name not in safe.frozen]
    assert all(safe.scores[name] > 0 for name in live)


@pytest.mark.parametrize(("blocks", "frozen"), [(1, 0), (2, 0), (3, 1), (4, 1), (6, 2)])
def test_by_default_a_third_is_frozen_rounded_down(blocks, frozen):
    safe = Safe(cases.lora_model("llama", blocks=blocks), probe=cases.loader("llama"), total_steps=100)
    assert sorted(safe.frozen) == [f"model.layers.{n}" for n in range(frozen)]
    safe.close()


@pytest.mark.parametrize("value", [-0.1, 1.1, "half", float("nan")])
def test_a_share_it_must_be(value):
    with pytest.raises(ConfigError, match="freeze_at_start"):
        SafeConfig(freeze_at_start=value)
