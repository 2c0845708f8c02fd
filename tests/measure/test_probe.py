"""What the probe draws, which outputs it measures, and that it changes nothing."""

import pytest
import torch
from torch.utils.data import DataLoader

import cases
from adafreeze.measure import Probe
from adafreeze.model import find_stacks, find_units
from adafreeze.model.backends import PeftBackend


def parts(family, **settings):
    model = cases.lora_model(family, dropout=0.0, **settings)
    stacks, backend = find_stacks(model), PeftBackend(model)
    return model, stacks, find_units(model, stacks, backend), backend


def gathered(probe, model, stacks, units, backend, **how):
    chunks = list(probe.outputs(model, stacks, units, backend, **how))
    return {name: torch.cat([chunk[name][-1] for chunk in chunks]) for name in chunks[0]}


def test_drawing_is_repeatable_and_advances_no_random_state():
    loader = cases.loader("bert")
    before = torch.get_rng_state()
    one, two = Probe.draw(loader, tokens=100), Probe.draw(loader, tokens=100)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.chunks, two.chunks, strict=True))
    other = Probe.draw(loader, tokens=100, seed=1)
    assert any(a["input_ids"].shape != b["input_ids"].shape or not torch.equal(a["input_ids"], b["input_ids"])
               for a, b in zip(one.chunks, other.chunks, strict=True))  # fmt: skip


def test_a_masking_collator_keeps_its_own_generator():
    class Masking:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(5)

        def __call__(self, samples):
            batch = cases.collate(samples)
            batch["input_ids"][torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.1] = 3
            return batch

    collate = Masking()
    before = collate.generator.get_state()
    Probe.draw(DataLoader(cases.Samples("bert", 40), collate_fn=collate))
    assert torch.equal(before, collate.generator.get_state())


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_outputs_equal_the_blocks_outputs_on_real_tokens(family):
    model, stacks, units, backend = parts(family)
    model.train()
    batch = cases.collate([cases.sample(family, i) for i in range(6)])
    probe = Probe([batch], tokens=10**6)
    got = gathered(probe, model, stacks, units, backend, adapters=True)
    assert model.training and all(module.training for module in model.modules())
    seen = {}
    for stack in stacks:
        for index, block in enumerate(stack.blocks):
            name = stack.block_name(index)
            block.register_forward_hook(lambda _m, _i, o, name=name: seen.update({name: cases.first_tensor(o)}))
    model.eval()
    with torch.no_grad():
        model(**batch)
    for name, output in seen.items():
        mask = torch.ones(output.shape[:2], dtype=torch.bool)
        if name.startswith("decoder."):
            mask = batch["labels"] != -100
        elif "attention_mask" in batch:
            mask = batch["attention_mask"].bool()
        torch.testing.assert_close(got[name], output[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_pass_that_starts_from_the_prefix_has_the_same_outputs(family):
    model, stacks, units, backend = parts(family)
    probe = Probe.draw(cases.loader(family), tokens=100)
    whole = gathered(probe, model, stacks, units, backend, adapters=True)
    depth = {stacks[0].path: 2}
    recording = gathered(probe, model, stacks, units, backend, adapters=True, prefix=depth)
    calls = []
    for block in stacks[0].blocks[:2]:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *_: calls.append(1))
    started = gathered(probe, model, stacks, units, backend, adapters=True, prefix=depth)
    deeper = gathered(probe, model, stacks, units, backend, adapters=True, prefix={stacks[0].path: 3})
    again = gathered(probe, model, stacks, units, backend, adapters=True, prefix={stacks[0].path: 3})
    assert not calls, "blocks of the prefix run only once"
    assert len(started) == len(whole) - 2 and len(deeper) == len(started) and len(again) == len(started) - 1
    for result in (recording, started, deeper, again):
        for name in result:
            torch.testing.assert_close(result[name], whole[name], rtol=0, atol=0)
    assert probe.nbytes > 0


def test_adapters_off_equals_the_pre_trained_model_and_changes_no_adapter():
    model, stacks, units, backend = parts("llama")
    with torch.no_grad():
        for unit in units.values():
            for parameter in unit.parameters():
                parameter.add_(0.1)
    base = cases.base_model("llama", dropout=0.0).eval()
    flags = [p.requires_grad for p in model.parameters()]
    probe = Probe([cases.batch("llama")], tokens=10**6)
    off = gathered(probe, model, stacks, units, backend, adapters=False)
    seen = {}
    for index, block in enumerate(base.model.layers):
        block.register_forward_hook(
            lambda _m, _i, o, i=index: seen.update({f"model.layers.{i}": cases.first_tensor(o)})
        )
    base(**cases.batch("llama"))
    for name in seen:
        torch.testing.assert_close(off[name], seen[name].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert flags == [p.requires_grad for p in model.parameters()]


def test_other_chunks_of_the_same_samples_choose_the_same_tokens():
    model, stacks, units, backend = parts("bert")
    probe = Probe.draw(cases.loader("bert"), tokens=60)
    together = gathered(probe, model, stacks, units, backend, adapters=True)
    alone = gathered(probe.one_by_one(), model, stacks, units, backend, adapters=True)
    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)


def test_shrinking_keeps_evenly_spaced_samples():
    probe = Probe.draw(cases.loader("bert"), tokens=10**6)
    assert probe.samples == 64
    small = probe.shrunk(10)
    assert small.samples == 10 and probe.samples == 64
    assert small.real_tokens == pytest.approx(probe.real_tokens * 10 / 64, rel=0.15)
    assert probe.shrunk(0).samples == 1 and probe.shrunk(1000).samples == 64


def test_the_head_is_one_batch():
    probe = Probe.draw(cases.loader("bert"), tokens=10**6)
    assert len(probe.head(5).chunks) == 1 and probe.head(5).samples == 5
    assert len(probe.head(5).one_by_one().chunks) == 5
