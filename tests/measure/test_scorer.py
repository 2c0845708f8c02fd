"""Scores are relative to the model at the start, zero without changes, and work for stages of other sizes."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    FunnelConfig,
    FunnelForSequenceClassification,
    PvtConfig,
    PvtForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

import cases
from adafreeze import AdafreezeWarning, Safe, SafeConfig
from adafreeze.decide.cka import linear_cka
from adafreeze.measure import Probe
from adafreeze.measure.scorer import Scorer
from adafreeze.model import find_stacks, find_units
from adafreeze.model.backends import PeftBackend

STEPS = 16
MEASURED = {"freeze_at_start": 0, "dry_run": True, "overhead": 0.5}


def lora(**settings):
    return cases.lora_model("llama", dropout=0.0, **settings)


def continued():
    """A continued adapter."""
    model = lora()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def ia3():
    base = cases.base_model("llama", dropout=0.0)
    return get_peft_model(base, IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])).train()


BEGINNINGS = {
    "lora": lora,
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "dora": lambda: lora(use_dora=True),
    "ia3": ia3,
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "random B": lambda: lora(init_lora_weights=False),
    "continued": continued,
}
AT_REST = ("lora", "gaussian", "dora", "ia3")


def train(model, lr, config=None, steps=STEPS, watch=lambda step, safe: None):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    safe = Safe(
        model, SafeConfig(**MEASURED, **(config or {})), optimizer=optimizer, probe=cases.loader("llama"),
        total_steps=STEPS, samples_per_step=4,
    )  # fmt: skip
    for step in range(steps):
        model(**cases.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        safe.step()
        watch(step, safe)
    return safe


@pytest.mark.parametrize("score", ["cka", "local_cka"])
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_scores_are_zero_if_nothing_changes(beginning, score):
    safe = train(BEGINNINGS[beginning](), 0.0, {"score": score})
    assert len(safe.scores) == 4 and set(safe.scores.values()) == {0.0}
    assert safe.decider.scorer.at_rest == (beginning in AT_REST)
    safe.close()


def block_outputs(probe, model, adapters=True):
    stacks, backend = find_stacks(model), PeftBackend(model)
    chunks = list(probe.outputs(model, stacks, find_units(model, stacks, backend), backend, adapters=adapters))
    return {name: torch.cat([chunk[name][-1] for chunk in chunks]) for name in chunks[0]}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_score_is_the_cka_between_block_outputs_at_the_start_and_now(beginning):
    model = BEGINNINGS[beginning]()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    safe = train(model, 0.5)
    probe = safe.decider.scorer.probe
    last = [event for event in safe.journal.events if event["event"] == "measure"][-1]
    safe.close()
    again = BEGINNINGS[beginning]()
    again.load_state_dict(start, strict=False)
    before = block_outputs(probe, again, adapters=beginning not in AT_REST)
    # Repeat the steps before the last measurement.
    watched = BEGINNINGS[beginning]()
    train(watched, 0.5, steps=last["step"]).close()
    now = block_outputs(probe, watched)
    for name, score in last["scores"].items():
        rows = [torch.nn.functional.normalize(side[name].double(), dim=-1) for side in (before, now)]
        expected = 1 - float(linear_cka(*rows))
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-9) and expected > 1e-7


@pytest.mark.parametrize("beginning", ["lora", "pissa"])
def test_measuring_changes_no_weight_and_no_random_state(beginning):
    model = BEGINNINGS[beginning]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    safe = train(model, 0.0)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert flags == [p.requires_grad for p in model.parameters()]
    # LoRA with B = 0 is at rest, which needs no pass and no copy.
    assert bool(safe.decider.scorer._began) == (beginning == "pissa")
    safe.close()


def test_adapters_at_rest_need_no_pass_at_the_start():
    model = lora()
    stacks, backend = find_stacks(model), PeftBackend(model)
    scorer = Scorer(
        model, stacks, find_units(model, stacks, backend), backend, SafeConfig(), Probe.draw(cases.loader("llama"))
    )
    scorer.begin()
    assert scorer.flops_spent == 0 and scorer.nbytes == 0


@pytest.mark.parametrize("score", ["cka", "local_cka"])
@pytest.mark.parametrize("beginning", ["lora", "pissa", "continued"])
def test_a_resumed_run_has_bit_identical_scores(beginning, score):
    saved = {}

    def keep(step, safe):
        if step == STEPS // 4:
            weights = {name: p.detach().clone() for name, p in safe.model.named_parameters()}
            saved.update(state=json.loads(json.dumps(safe.state_dict())), weights=weights, step=step + 1)

    config = {"score": score}
    whole = train(BEGINNINGS[beginning](), 0.5, config, watch=keep)
    assert (saved["state"]["deciding"]["scorer"]["began"] is not None) == (beginning != "lora")
    last = whole.state_dict()["deciding"]["scorer"]
    assert last["began"] is None, "no measurement is left"
    model = BEGINNINGS[beginning]()
    model.load_state_dict(saved["weights"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    resumed = Safe(
        model, SafeConfig(**MEASURED, **config), optimizer=optimizer, probe=cases.loader("llama"), total_steps=STEPS,
        samples_per_step=4,
    )  # fmt: skip
    resumed.load_state_dict(saved["state"])
    for _ in range(saved["step"], STEPS):
        model(**cases.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        resumed.step()
    assert resumed.scores == whole.scores and any(whole.scores.values())
    whole.close()
    resumed.close()


def test_trainable_norms_are_compared_with_their_values_at_the_start():
    model = cases.lora_model("bert", dropout=0.0)
    norms = [p for name, p in model.named_parameters() if "attention.output.LayerNorm.weight" in name]
    optimizer = torch.optim.SGD(norms, lr=0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or any(parameter is norm for norm in norms))
    before = [norm.detach().clone() for norm in norms]
    with pytest.warns(AdafreezeWarning, match="Nothing will freeze"):
        safe = Safe(
            model, SafeConfig(**MEASURED), optimizer=optimizer, probe=cases.loader("bert"), total_steps=4,
            samples_per_step=4,
        )  # fmt: skip
    model(**cases.batch("bert")).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    safe.step()  # takes the reference after the norms changed
    kept = safe.decider.scorer._began
    assert len(kept) == len(norms)
    assert all(any(torch.equal(value, norm) for value in kept.values()) for norm in before)
    assert not any(torch.equal(now, norm) for now, norm in zip(norms, before, strict=True))
    assert max(safe.decider.scorer.measure({}).values()) > 0, "the norms changed in the first step"
    safe.close()


def test_sharded_weights_are_scored_relative_to_the_pre_trained_model_with_a_warning():
    model = continued()
    stacks, backend = find_stacks(model), PeftBackend(model)
    probe, config = Probe.draw(cases.loader("llama")), SafeConfig(overhead=0.5)
    scorer = Scorer(model, stacks, find_units(model, stacks, backend), backend, config, probe, collective=True)
    scorer.begin()
    with pytest.warns(AdafreezeWarning, match="relative to the pre-trained model") as caught:
        scorer.prepare(1000, 10)
    assert len(caught) == 1 and not scorer._began
    assert min(scorer.measure({}).values()) > 1e-4, "from the pre-trained model"


def swin():
    return SwinForImageClassification(
        SwinConfig(image_size=64, patch_size=2, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4)
    )


def pvt():
    return PvtForImageClassification(
        PvtConfig(image_size=64, hidden_sizes=[8, 16, 16, 16], depths=[2, 1, 1, 1], num_attention_heads=[1, 2, 2, 2])
    )


def funnel():
    return FunnelForSequenceClassification(
        FunnelConfig(vocab_size=64, block_sizes=[2, 2], d_model=16, n_head=2, d_head=8, d_inner=32, num_labels=2)
    )


@pytest.mark.parametrize(
    ("build", "targets"), [(swin, ["q_proj", "query"]), (pvt, ["query"]), (funnel, ["q_head", "v_head"])]
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_each_stage_is_scored_on_its_own_tokens(build, targets, prefix):
    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=targets)).train()
    images = {"pixel_values": torch.randn(6, 3, 64, 64), "labels": torch.arange(6) % 2}
    texts = {"input_ids": torch.randint(3, 60, (6, 12)), "labels": torch.arange(6) % 2}
    stacks, backend = find_stacks(model), PeftBackend(model)
    units = find_units(model, stacks, backend)
    probe = Probe([texts if build is funnel else images], tokens=60)
    scorer = Scorer(model, stacks, units, backend, SafeConfig(overhead=0.5), probe)
    scorer.begin()
    assert scorer.prepare(1000, 10) > 2
    depths = {next(iter(units.values())).stack: prefix} if prefix else {}
    first, second = (scorer.measure(depths) for _ in range(2))
    above = {name for name, unit in units.items() if unit.block >= depths.get(unit.stack, 0)}
    assert set(first.values()) == {0.0} and set(second.values()) == {0.0} and first.keys() == above
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    if not prefix:
        assert min(scorer.measure({}).values()) > 1e-9
