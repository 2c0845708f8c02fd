"""One Safe a model: a new one finds what an earlier one left, and starts from all units."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adafreeze import Safe, SafeCallback, SafeConfig
from cached_run import BLOCKS, config, epochs, train
from cases import Samples, batch, collate, lora_model


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def trained(model, tmp_path, *callbacks):
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Samples("bert", 16), data_collator=collate, callbacks=[*callbacks]
    )
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("forgotten", [False, True])
def test_an_interrupted_cell_that_runs_again_starts_from_all_units(tmp_path, forgotten):
    model = lora_model("bert", BLOCKS)
    before, weights = flags(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        callback = SafeCallback()
        trained(model, tmp_path, callback, Interrupt())
        assert callback.safe.frozen and flags(model) != before
        if forgotten:
            del callback
            gc.collect()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    again, fresh = SafeCallback(), SafeCallback()
    losses = trained(model, tmp_path, again)
    assert losses == trained(lora_model("bert", BLOCKS), tmp_path, fresh)
    assert len(again.safe.units) == BLOCKS and again.safe.frozen == fresh.safe.frozen
    assert flags(model) == before and not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("part", ["inner", "outer"])
def test_an_earlier_safe_is_found_on_a_part_of_the_model_and_on_a_wrapper(part):
    class Outer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    model = lora_model("bert", BLOCKS)
    outer, inputs = Outer(model), batch("bert")
    first, second = (model, outer) if part == "inner" else (outer, model)
    earlier = Safe(first, SafeConfig(), probe=inputs, total_steps=9)
    assert earlier.frozen
    later = Safe(second, SafeConfig(freeze_at_start=0), probe=inputs, total_steps=9)
    assert len(later.units) == BLOCKS and not later.frozen
    assert all(p.requires_grad for unit in later.units.values() for p in unit.parameters())
    later.close()
    earlier.close()  # a second time, and does nothing
    assert not any("__deepcopy__" in module.__dict__ for module in outer.modules())


# What trains and enters the prefix from outside.


class Projector(nn.Module):
    """A projector in front of a Llama, for some batches only."""

    def __init__(self, sometimes):
        super().__init__()
        self.model = lora_model("llama", BLOCKS, dropout=0.0)
        torch.manual_seed(1)
        self.projector, self.sometimes = nn.Linear(16, 32), sometimes

    def forward(self, input_ids, labels, features=None, **_):
        embeddings = self.model.get_input_embeddings()(input_ids)
        if features is not None:
            embeddings = torch.cat([self.projector(features), embeddings[:, 2:]], 1)
        return self.model(inputs_embeds=embeddings, labels=labels)


def with_features(sometimes):
    generator, batches = torch.Generator().manual_seed(2), []
    for number, one in enumerate(epochs("llama", count=16)):
        made = {"input_ids": one["input_ids"], "labels": one["labels"]}
        if not sometimes or number % 3 == 2:
            made["features"] = torch.randn(4, 2, 16, generator=generator)
        batches.append(made)
    return batches


@pytest.mark.parametrize("sometimes", [False, True])
def test_a_projector_learns_as_it_does_without_a_prefix(sometimes):
    batches = with_features(sometimes)

    def run(depths):
        model = Projector(sometimes).train()
        return train("llama", config(depths, cache="auto"), batches, model=model, count=16), model

    (frozen, model), (_, twin) = run({1: 2}), run({99: 1})
    start = Projector(sometimes).projector.weight
    assert not torch.equal(model.projector.weight, start)
    assert model.projector.weight.grad is None or torch.isfinite(model.projector.weight).all()
    ended = [event for event in frozen[2].journal.events if event["event"] == "prefix_ended"]
    if sometimes:  # no sample of the probe shows it, or one does: either way nothing is cut off
        assert len(ended) <= 1
    assert all(depth == 0 for depth in frozen[2].prefixes.values())
    assert torch.equal(start, Projector(sometimes).projector.weight) and twin is not model


def test_a_projector_outside_the_model_trains_and_ends_the_prefix_of_its_stack():
    def run(on):
        model = lora_model("llama", BLOCKS, dropout=0.0)
        torch.manual_seed(3)
        projector, ids = nn.Linear(16, 32), batch("llama")["input_ids"]
        features = torch.randn(4, 3, 16)

        def inputs():
            embeddings = model.get_input_embeddings()(ids)
            labels = torch.cat([torch.full((4, 3), -100), ids], 1)
            return {"inputs_embeds": torch.cat([projector(features), embeddings], 1), "labels": labels}

        trained = [*(p for p in model.parameters() if p.requires_grad), *projector.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        safe = None
        if on:
            probe = {name: value.detach() for name, value in inputs().items()}
            settings = SafeConfig(lr_scale=1)
            safe = Safe(model, settings, optimizer=optimizer, probe=probe, total_steps=12, samples_per_epoch=4)
            assert safe.frozen
        losses = []
        for _ in range(12):
            loss = model(**inputs()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if safe is not None:
                safe.step()
        if safe is not None:
            assert not safe.frozen and any(event["event"] == "prefix_ended" for event in safe.journal.events)
            safe.close()
        return losses, [p.detach().clone() for p in trained]

    (losses, weights), (expected, others) = run(True), run(False)
    assert losses == expected and all(map(torch.equal, weights, others))


def test_inputs_that_require_grad_get_their_gradient():
    """Adversarial training asks for the gradient of what enters the first block."""
    model, inputs = lora_model("llama", BLOCKS, dropout=0.0), batch("llama")
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def gradient():
        entered = embeddings.clone().requires_grad_()
        model(inputs_embeds=entered, labels=inputs["labels"]).loss.backward()
        model.zero_grad()
        return entered.grad

    expected = gradient()
    safe = Safe(model, config(), probe={"inputs_embeds": embeddings, "labels": inputs["labels"]}, total_steps=9)
    safe.freeze(list(safe.units)[:2])
    assert torch.equal(gradient(), expected)
    safe.close()
