"""A freeze holds against the user's own code, and the user is told, once, what was found."""

import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

import cases
from adafreeze import AdafreezeWarning, Safe, SafeCallback, SafeConfig
from adafreeze.model.backends import PeftBackend


class Run:
    """A llama whose lower two of three blocks are frozen, in a plain loop."""

    def __init__(self, **config):
        self.model = cases.lora_model("llama", blocks=3)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
        self.safe = Safe(
            self.model,
            SafeConfig(**config),
            optimizer=self.optimizer,
            probe=cases.loader("llama"),
            total_steps=100,
            samples_per_epoch=4,
        )
        self.step()
        self.safe.freeze(list(self.safe.units)[:2])
        self.frozen = list(self.safe.freezer.parameters())
        self.before = [p.detach().clone() for p in self.frozen]

    def step(self, before_step=lambda: None):
        self.model(**cases.batch("llama")).loss.backward()
        before_step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def assert_nothing_frozen_moved(self):
        assert all(map(torch.equal, self.before, self.frozen))
        assert not any(p.requires_grad or p.grad is not None or p in self.optimizer.state for p in self.frozen)


@contextmanager
def told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdafreezeWarning)
        messages = []
        yield messages
    messages += [str(w.message) for w in caught if issubclass(w.category, AdafreezeWarning)]


def one_parameter(run):
    run.frozen[0].requires_grad_(True)


def unfreeze_adapters(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad = True


def all_adapters(run):
    unfreeze_adapters(run.model)


def set_adapter(run):
    run.model.set_adapter("default")


def enable_layers(run):
    run.model.base_model.disable_adapter_layers()
    run.model.base_model.enable_adapter_layers()


def disable_adapter(run):
    with run.model.disable_adapter(), torch.no_grad():
        run.model(**cases.batch("llama"))


def set_requires_grad(run):
    run.model.set_requires_grad("default", True)


@pytest.mark.parametrize(
    ("undo", "kind", "cause"),
    [
        (
            one_parameter,
            "parameters",
            r"requires_grad_\(True\) on base_model.model.model.layers\.\d.*default\.weight\.",
        ),
        (all_adapters, "adapters", r"requires_grad_\(True\) on all adapter parameters \(.* and 6 more\)\."),
    ],
)
def test_making_frozen_parameters_trainable_warns_once_with_the_call(undo, kind, cause):
    run = Run()
    with told() as messages:
        for _ in range(3):
            undo(run)
            run.step()
    run.assert_nothing_frozen_moved()
    assert run.safe.prefixes == {"model.layers": 2}
    (message,) = messages
    assert re.search(cause, message), message
    assert [e["by"] for e in run.safe.journal.events if e["event"] == "refreeze"] == [kind], "not at each step"


@pytest.mark.parametrize("call", [set_adapter, enable_layers, disable_adapter, set_requires_grad])
def test_adapters_that_peft_switches_on_stay_frozen_without_a_warning(call):
    run = Run()
    with told() as messages:
        for _ in range(2):
            call(run)
            assert not any(p.requires_grad for p in run.frozen)
            run.step()
    run.assert_nothing_frozen_moved()
    assert not messages


@pytest.mark.parametrize("call", [set_adapter, enable_layers, disable_adapter])
def test_where_peft_undoes_a_freeze_the_audit_restores_it_and_names_the_calls(call, monkeypatch):
    monkeypatch.setattr(PeftBackend, "keep_frozen", lambda *_: None)  # as with PEFT before 0.20
    run = Run()
    with told() as messages:
        for _ in range(2):
            call(run)
            assert all(p.requires_grad for p in run.frozen)
            run.step()
    run.assert_nothing_frozen_moved()
    (message,) = messages
    assert "set_adapter, enable_adapter_layers, or the end of a disable_adapter()" in message


def test_a_whole_model_made_trainable_warns_with_a_line_to_paste():
    run = Run()
    with told() as messages:
        run.model.requires_grad_(True)
        run.step()
    assert run.safe.prefixes == {"model.layers": 0}, "its base weights train"
    run.assert_nothing_frozen_moved()
    (message,) = messages
    assert "requires_grad_(True) on the whole model" in message
    exec(re.search("Fix: (.*)", message)[1], {"model": run.model})
    with told():  # the adapters are loose once more
        run.step()
    assert run.safe.prefixes == {"model.layers": 2}


def test_training_inside_disable_adapter_changes_nothing_frozen():
    run = Run()
    with told() as messages, run.model.disable_adapter():
        run.model.get_output_embeddings().weight.requires_grad_(True)  # a head that trains
        run.step()
    run.step()
    run.assert_nothing_frozen_moved()
    assert run.safe.prefixes == {"model.layers": 2} and len(messages) <= 1


def test_a_gradient_set_by_hand_is_removed_before_the_optimizer_step():
    def meddle():
        for parameter in run.frozen:
            parameter.requires_grad_(True)
            parameter.grad = torch.ones_like(parameter)

    run = Run()
    with told() as messages:
        run.step(before_step=meddle)
        run.assert_nothing_frozen_moved()
        for parameter in run.frozen:
            parameter.grad = torch.ones_like(parameter)
        run.step()
    run.assert_nothing_frozen_moved()
    assert len(messages) == 2 and ".grad was assigned by hand" in messages[1]


@pytest.mark.parametrize("cache", ["off", "ram"])
def test_another_adapter_trains_in_the_frozen_blocks_while_it_is_active(cache):
    run = Run(cache=cache)
    run.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    run.step()
    with told() as messages:
        run.model.set_adapter("other")
        run.step()
        other = [p for name, p in run.model.named_parameters() if ".other." in name and "layers.0" in name]
        run.model(**cases.batch("llama")).loss.backward()
        assert other and all(p.grad is not None and p.grad.abs().max() > 0 for p in other)
        assert run.safe.prefixes == {"model.layers": 0}
        run.model.set_adapter("default")
        run.step()
    assert run.safe.prefixes == {"model.layers": 2}
    run.assert_nothing_frozen_moved()
    (message,) = messages
    assert "changed from default to other" in message and "model.set_adapter(...)" in message


def test_nothing_frozen_changes_in_a_trainer_whose_callback_undoes_the_freeze(tmp_path):
    class Meddler(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.set_adapter("default")
            model.base_model.enable_adapter_layers()
            if state.global_step > 4:
                unfreeze_adapters(model)

    model = cases.lora_model("llama", blocks=3)
    safe = SafeCallback(SafeConfig(freeze=("model.layers.0", "model.layers.1")))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    args = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=4, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=cases.Samples("llama", 16),
        data_collator=cases.collate,
        callbacks=[safe, Meddler()],
    )
    with told() as messages:
        trainer.train()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(before[name], parameter) == ("layers.2" not in name), name
    assert len([m for m in messages if "were frozen again" in m]) == 1
