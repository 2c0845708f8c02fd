"""Optimizers that do not fit the model: the run is that without adafreeze, and what does not train is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import cases
from adafreeze import Safe, SafeCallback, SafeConfig

NOTHING = {"freeze_at_start": 0, "freeze_share": 0}
BATCHES = [cases.collate([cases.sample("llama", i) for i in range(k, k + 4)]) for k in range(0, 32, 4)]


def adapted(base=None):
    torch.manual_seed(0)
    return get_peft_model(
        base or cases.base_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ).train()


def over(parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of duplicates
        return torch.optim.AdamW(parameters, lr=1e-2)


def all_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def as_it_should():
    model = adapted()
    return model, over(all_of(model))


def twice_in_a_group():
    model = adapted()
    return model, over(all_of(model) + all_of(model)[:4])


def twice_in_two_groups():
    model, optimizer = as_it_should()
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": all_of(model)[:4]})
    return model, optimizer


def made_before_the_adapters():
    base = cases.base_model("llama")
    optimizer = over(base.parameters())
    return adapted(base), optimizer


def without_the_lower_half():
    model = adapted()
    return model, over([p for name, p in model.named_parameters() if "layers.2." in name or "layers.3." in name])


def spread_by_hooks():
    """As accelerate spreads a model over devices: a hook around each block moves what comes in."""
    base = cases.base_model("llama")
    for block in base.model.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model = adapted(base)
    return model, over(all_of(model))


CASES = [as_it_should, twice_in_a_group, twice_in_two_groups, made_before_the_adapters, without_the_lower_half]
CASES.append(spread_by_hooks)
SAID = {
    made_before_the_adapters: "The optimizer has none of the adapters' parameters",
    without_the_lower_half: "The optimizer does not have the parameters of 2 of 4 units "
    "(model.layers.0, model.layers.1)",
}


def looped(make, settings):
    """Losses of a loop, its weights at the end, what was warned of the optimizer, and the frozen units."""
    model, optimizer = make()
    safe, said = None, []
    if settings is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rest = {"optimizer": optimizer, "probe": cases.loader("llama", 32), "total_steps": 24}
            safe = Safe(model, SafeConfig(**settings), **rest)
        said = [str(one.message) for one in caught if "optimizer" in str(one.message)]
    torch.manual_seed(0)
    losses = []
    for batch in BATCHES * 3:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if safe is not None:
            safe.step()
    frozen = safe.frozen if safe is not None else frozenset()
    if safe is not None:
        safe.close()
    return losses, [parameter.detach().clone() for parameter in all_of(model)], said, frozen


def trained(make, folder, *callbacks):
    model, optimizer = make()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4, num_train_epochs=3, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=cases.Samples("llama", 32), data_collator=cases.collate,
        optimizers=(optimizer, None), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make", CASES)
def test_the_loop_is_as_without_adafreeze_and_what_does_not_train_is_said(make):
    plain_losses, plain, *_ = looped(make, None)
    losses, weights, said, _ = looped(make, NOTHING)
    assert losses == plain_losses and all(map(torch.equal, weights, plain))
    consequence = ", so they do not train unless another optimizer has them."
    assert [text.splitlines()[0] for text in said] == ([SAID[make] + consequence] if make in SAID else [])


@pytest.mark.parametrize("make", [twice_in_a_group, twice_in_two_groups, spread_by_hooks])
def test_freezing_goes_on_as_it_should(make):
    frozen = looped(make, {"wait_for_loss": False})[3]
    assert frozen == looped(as_it_should, {"wait_for_loss": False})[3] and len(frozen) > 1


@pytest.mark.parametrize("make", CASES)
def test_the_trainer_is_as_without_adafreeze(make, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert trained(make, tmp_path, SafeCallback(SafeConfig(**NOTHING))) == trained(make, tmp_path)


def test_the_callback_says_it_too(tmp_path):
    with pytest.warns(UserWarning, match="has none of the adapters' parameters"):
        trained(made_before_the_adapters, tmp_path, SafeCallback(SafeConfig(**NOTHING)))


def test_the_fix_that_is_named_is_one():
    model, _ = made_before_the_adapters()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        Safe(model, optimizer=optimizer, probe=cases.loader("llama", 32), total_steps=24).close()
