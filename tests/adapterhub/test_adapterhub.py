"""Bottleneck adapters of AdapterHub: units, scores, freezes, prefix, cache, resume and saved adapters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("adapters")

import adapters
from hub_cases import HOUSLBY, PFEIFFER, hub_model, weights
from transformers import Trainer, TrainingArguments

import cached_run
import cases
from adafreeze import AdafreezeWarning, ModelError, Safe, SafeCallback, SafeConfig
from adafreeze.costs.memory import SavedBytes
from adafreeze.decide._cka_naive import naive_cka

FAMILIES = ("bert", "roberta", "gpt2", "llama")
CONFIGS = (HOUSLBY, PFEIFFER)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_config = pytest.mark.parametrize("config", CONFIGS)


def new_safe(model, family, **settings):
    settings = {"freeze_at_start": 0, **settings}
    return Safe(model, SafeConfig(**settings), probe=cases.loader(family), total_steps=10)


@each_family
def test_a_houlsby_block_is_one_unit_or_two(family):
    blocks = new_safe(hub_model(family), family)
    sites = new_safe(hub_model(family), family, granularity="site")
    assert len(blocks.units) == 4 and len(sites.units) == 8
    for number, unit in enumerate(blocks.units.values()):
        pair = [site for site in sites.units.values() if site.block == number]
        assert sum(p.numel() for p in unit.parameters()) == sum(p.numel() for s in pair for p in s.parameters())
    assert len(new_safe(hub_model(family, PFEIFFER), family, granularity="site").units) == 4


@each_family
def test_each_adapted_layer_is_scored_on_its_own_output(family):
    model = hub_model(family, dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = cases.batch(family, rows=4, length=12)
    settings = {"granularity": "site", "probe_tokens": 48, "normalize_rows": False, "overhead": 1.0}
    safe = Safe(model, SafeConfig(**settings), probe=batch, total_steps=10)
    scorer = safe.decider.scorer.with_probe(safe.decider.probe)
    scorer.prepare(10_000, 5)
    scores = scorer.measure({})
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in safe.units}
    hooks = [
        unit.module.register_forward_hook(lambda _m, _i, out, n=name: seen[n].append(cases.first_tensor(out).detach()))
        for name, unit in safe.units.items()
    ]
    model.eval()
    with torch.no_grad():
        model(**batch)
        with adapters.AdapterSetup(None):
            model(**batch)
    for hook in hooks:
        hook.remove()
    for name, (now, before) in seen.items():
        expected = 1 - naive_cka(before.flatten(0, 1).double(), now.flatten(0, 1).double())
        assert scores[name] == pytest.approx(float(expected), rel=1e-4, abs=1e-6), name
    assert min(scores.values()) > 1e-6


@each_family
@each_config
def test_a_freeze_cuts_the_graph_and_does_not_change_gradients_above_it(family, config):
    model = hub_model(family, config, dropout=0.0)
    twin = copy.deepcopy(model)
    safe = new_safe(model, family, cache="off")
    safe.freeze(list(safe.units)[:2])
    assert sum(safe.prefixes.values()) == 2
    with SavedBytes(model) as mine:
        loss = model(**cases.batch(family)).loss
    with SavedBytes(twin) as whole:
        same = twin(**cases.batch(family)).loss
    assert torch.equal(loss, same) and mine.total < 0.75 * whole.total
    loss.backward()
    same.backward()
    live = 0
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if a.requires_grad:
            live += 1
            assert torch.equal(a.grad, b.grad), name
        else:
            assert a.grad is None
    assert live


@each_family
@each_config
def test_the_cache_does_not_change_a_bit(family, config):
    batches = list(cached_run.epochs(family))
    runs = [
        cached_run.train(family, cached_run.config({3: 1, 6: 3}, cache), batches, model=hub_model(family, config))
        for cache in ("off", "ram")
    ]
    cached_run.assert_same(*runs)
    hits, advanced, misses = cached_run.counts(runs[1][2])
    assert hits and advanced and misses


@each_config
def test_half_of_a_houlsby_block_is_not_a_prefix(config):
    safe = new_safe(hub_model("bert", config), "bert", granularity="site")
    first, second, *_ = safe.units
    safe.freeze([first])
    assert sum(safe.prefixes.values()) == (0 if config == HOUSLBY else 1)
    safe.freeze([second])
    assert sum(safe.prefixes.values()) == (1 if config == HOUSLBY else 2)


def test_train_adapter_does_not_unfreeze_adapters():
    model = hub_model("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batches = [cases.batch("bert")] * 8
    safe = Safe(model, SafeConfig(), optimizer=optimizer, probe=batches, total_steps=8)
    first, second, *_ = safe.units
    safe.freeze([first, second])
    before = weights(model)
    with pytest.warns(AdafreezeWarning, match="were frozen again"):
        for batch in batches:
            model.train_adapter("task")
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    moved = {int(name.split(".")[0]) for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert moved == {2, 3}


@each_family
@each_config
def test_a_resumed_run_equals_one_that_never_stopped(family, config, tmp_path):
    def run(folder, resume=None, steps=24):
        model = hub_model(family, config)
        callback = SafeCallback(SafeConfig(freeze_at_start=0, warmup=0.3, ramp_end=0.5))
        args = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
            weight_decay=0.1, save_strategy="steps", save_steps=16, report_to=[], disable_tqdm=True, use_cpu=True,
            logging_steps=1, lr_scheduler_type="constant", seed=1,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=args, train_dataset=cases.Samples(family, 32, length=12), data_collator=cases.collate,
            callbacks=[callback],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model, callback.safe

    whole, safe = run(tmp_path / "run")
    assert safe.frozen and sum(safe.prefixes.values())
    again, resumed = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-16"))
    assert resumed.frozen == safe.frozen
    for (name, a), (_, b) in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@each_family
@each_config
def test_the_saved_adapter_gives_the_same_logits_in_a_fresh_model(family, config, tmp_path):
    model = hub_model(family, config)
    batches = [cases.batch(family)] * 8
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    safe = Safe(model, SafeConfig(freeze=list(new_safe(model, family).units)[:2]), optimizer=optimizer,
                probe=batches, total_steps=8)  # fmt: skip
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()
    model.save_adapter(str(tmp_path), "task")
    safe.close()
    with torch.no_grad():
        expected = model.eval()(**cases.batch(family)).logits
    fresh = cases.base_model(family)
    adapters.init(fresh)
    fresh.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in fresh.state_dict()}, strict=False
    )
    fresh.set_active_adapters(fresh.load_adapter(str(tmp_path)))
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**cases.batch(family)).logits, expected)


@pytest.mark.parametrize(
    "config", ["par_bn", "lora", "ia3", "loreft", "compacter++[reduction_factor=4]", "dora", "vera"]
)
def test_other_methods_with_weights_in_each_block_freeze(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdafreezeWarning)  # Compacter shares a rule between its blocks
        model = hub_model("bert", config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        batches = [cases.batch("bert")] * 4
        safe = Safe(model, SafeConfig(), optimizer=optimizer, probe=batches, total_steps=4)
        names = list(safe.units)[:2]
        safe.freeze(names)
        held = [p for name in names for p in safe.units[name].parameters()]
        before = [p.detach().clone() for p in held]
        live = [p.detach().clone() for name in list(safe.units)[2:] for p in safe.units[name].parameters()]
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            safe.step()
    assert held and all(map(torch.equal, before, held))
    now = [p for name in list(safe.units)[2:] for p in safe.units[name].parameters()]
    assert not all(map(torch.equal, live, now))


@pytest.mark.parametrize("config", ["prefix_tuning", "prompt_tuning", "mam", "unipelt"])
def test_methods_without_weights_per_block_are_refused(config):
    with pytest.raises(ModelError, match=r"has a P(refix|rompt)TuningConfig"):
        new_safe(hub_model("bert", config), "bert")


def test_an_invertible_adapter_below_the_blocks_causes_a_warning():
    with pytest.warns(AdafreezeWarning, match="below the blocks"):
        new_safe(hub_model("bert", "seq_bn_inv"), "bert")


def test_no_active_adapter_is_refused():
    model = cases.base_model("bert")
    adapters.init(model)
    with pytest.raises(ModelError, match="no active adapter"):
        new_safe(model, "bert")


def test_close_restores_the_model():
    model = hub_model("bert")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    forwards = [name for name, module in model.named_modules() if "forward" in vars(module)]
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    safe = new_safe(model, "bert")
    safe.freeze(list(safe.units)[:3])
    model(**cases.batch("bert")).loss.backward()
    safe.close()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == forwards
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
