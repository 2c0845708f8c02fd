"""SafeCallback restored from a checkpoint, used for two runs, and in two Trainers."""

from __future__ import annotations

import functools
import json
import warnings

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import cases
from adafreeze import AdafreezeWarning, ConfigError, Journal, RunError, SafeCallback, SafeConfig
from adafreeze.decide.policy import share


class Stop(TrainerCallback):
    """Interrupts the run at step 8."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 8


def trainer(folder, *callbacks, family="bert", **settings):
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 4,
            "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 8, "learning_rate": 1e-2, "logging_steps": 1,
            "restore_callback_states_from_checkpoint": True, **settings,
        },
    )  # fmt: skip
    return Trainer(
        model=cases.lora_model(family),
        args=args,
        train_dataset=cases.Samples(family, 32, length=12),
        data_collator=cases.collate,
        callbacks=list(callbacks),
    )


def used(host):
    """The only SafeCallback of the Trainer."""
    (callback,) = [one for one in host.callback_handler.callbacks if isinstance(one, SafeCallback)]
    return callback


def losses(host):
    return [entry["loss"] for entry in host.state.log_history if "loss" in entry]


def again(callback):
    """The callback that ``Trainer`` would make from a checkpoint."""
    return SafeCallback.from_state(json.loads(json.dumps(callback.state())))


@pytest.mark.parametrize(
    "config",
    [
        SafeConfig(dry_run=True, cache="off"),
        SafeConfig(freeze_share=0.4, warmup=0.3, ramp_end=0.5, freeze_at_start=0.0, cache="off", seed=3),
        None,
    ],
)
def test_a_restored_callback_continues_the_same_run(config, tmp_path):
    whole = trainer(tmp_path / "whole", SafeCallback(config))
    whole.train()
    trainer(tmp_path / "run", SafeCallback(config, journal=tmp_path / "j.jsonl"), Stop()).train()
    host = trainer(tmp_path / "run", SafeCallback())  # replaced by one like the first
    given = used(host)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        host.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert used(host) is not given and used(host).config == config and used(host).journal == str(tmp_path / "j.jsonl")
    assert used(host).safe.config == used(whole).safe.config
    assert used(host).safe.frozen == used(whole).safe.frozen
    assert losses(host) == losses(whole)
    for (name, mine), (_, other) in zip(host.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_given_probe_is_restored(tmp_path):
    batch = cases.batch("bert", rows=12)
    trainer(tmp_path, SafeCallback(SafeConfig(cache="off"), probe=[batch, batch]), Stop()).train()
    host = trainer(tmp_path, SafeCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)  # such as for a changed probe
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert used(host).safe.decider.probe.samples == 24
    assert torch.equal(used(host).probe[0]["input_ids"], batch["input_ids"][:8])


def test_a_probe_that_is_not_json_does_not_prevent_saving(tmp_path):
    batch = {**cases.batch("bert"), "output_router_logits": complex(0, 1)}
    callback = SafeCallback(probe=[batch])
    callback.safe = type("Holds", (), {})()
    callback.safe.decider = type("Holds", (), {"probe": type("Holds", (), {"chunks": [batch]})})
    callback.safe.state_dict = lambda random_state: {}
    assert callback.state()["args"]["probe"] is None


def test_the_state_makes_the_same_callback(tmp_path):
    config = SafeConfig(seed=1, cache_dir=tmp_path, freeze=["a"], memory_budget="6GiB", lr_scale=2)
    made = again(SafeCallback(config, journal=tmp_path / "j.jsonl"))
    assert made.config.to_dict() == config.to_dict() and made.config.given == config.given
    assert again(made).state() == made.state()
    assert again(SafeCallback(journal=Journal(tmp_path / "k.jsonl"))).journal == str(tmp_path / "k.jsonl")
    assert again(SafeCallback(journal=Journal())).journal is None and again(SafeCallback()).config is None
    assert SafeCallback({"freeze_share": 0.2}).config == SafeConfig(freeze_share=0.2)
    with pytest.raises(ConfigError, match="no field 'share'"):
        SafeCallback({"share": 0.2})


def test_state_attributes_do_not_clash_with_the_callbacks_own():
    state = SafeCallback().state()
    assert not state["attributes"].keys() & vars(SafeCallback()).keys()


def test_a_users_function_cannot_be_restored_and_fails_before_the_first_step(tmp_path):
    def mine(situation):
        return []

    policy = functools.wraps(mine)(lambda situation: [])
    first = trainer(tmp_path, SafeCallback(SafeConfig(policy=policy)), Stop())
    first.train()
    host = trainer(tmp_path, SafeCallback(SafeConfig(policy=policy)))
    with pytest.raises(ConfigError) as caught:
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "SafeConfig.policy was the function" in str(caught.value) and "mine" in str(caught.value)
    assert "restore_callback_states_from_checkpoint=False" in caught.value.fix
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        host = trainer(tmp_path, SafeCallback(SafeConfig(policy=policy)), restore_callback_states_from_checkpoint=False)
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert used(host).safe.config.policy is policy


def test_our_own_function_is_restored_but_not_a_users_function_of_the_same_name():
    assert again(SafeCallback(SafeConfig(policy=share))).config.policy == "share"

    def other(situation):
        return []

    other.__qualname__ = "share"
    with pytest.raises(ConfigError, match="was the function 'share'"):
        again(SafeCallback(SafeConfig(policy=other)))


def test_settings_that_differ_from_the_checkpoint_give_a_warning(tmp_path):
    trainer(tmp_path, SafeCallback(SafeConfig(freeze_share=0.4)), Stop()).train()
    host = trainer(tmp_path, SafeCallback(SafeConfig(freeze_share=0.5)), restore_callback_states_from_checkpoint=False)
    with pytest.warns(AdafreezeWarning, match=r"freeze_share was 0\.4 and is 0\.5"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_train_epochs": 6}, "48 steps now, 24 planned then"),
        pytest.param(
            {"per_device_train_batch_size": 2},
            "2 samples per step and process now, 4 planned then",
            marks=pytest.mark.skipif(
                transformers.__version__ < "5", reason="transformers 4 resumes with the batch size of the checkpoint"
            ),
        ),
        ({"gradient_accumulation_steps": 2}, "12 steps now, 24 planned then, 8 samples per step"),
    ],
)
def test_other_epochs_batches_and_accumulation_change_the_schedule(changed, told, tmp_path, caplog):
    trainer(tmp_path, SafeCallback(), Stop()).train()
    host = trainer(tmp_path, SafeCallback(), **changed)
    with caplog.at_level("INFO", logger="adafreeze"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert told in caplog.text
    control = trainer(tmp_path / "control", SafeCallback(), **changed)
    control.train()
    later = [[e["step"] for e in used(one).safe.journal.events if e["event"] == "measure"] for one in (host, control)]
    ramp_end = int(0.7 * host.state.max_steps)
    assert later[0] == ([step for step in later[1] if step > 8] or [9] * (ramp_end <= 8))
    assert used(host).safe.frozen >= used(control).safe.frozen


def test_two_callbacks_are_rejected_when_resuming(tmp_path):
    trainer(tmp_path, SafeCallback(), Stop()).train()
    for restore in (True, False):
        host = trainer(tmp_path, SafeCallback(), SafeCallback(), restore_callback_states_from_checkpoint=restore)
        with pytest.raises(RunError, match="has 2 SafeCallbacks"):
            host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert all(p.requires_grad for name, p in host.model.named_parameters() if "lora_" in name)


# One callback for several runs.


def test_a_second_train_is_a_new_run(tmp_path):
    callback = SafeCallback(SafeConfig(cache="off"))
    host = trainer(tmp_path, callback, save_strategy="no")
    set_seed(3)
    host.train()
    first, found = callback.safe, losses(host)
    host.model.load_state_dict(cases.lora_model("bert").state_dict())
    host.optimizer = host.lr_scheduler = None  # else the Trainer would keep the moments
    set_seed(3)
    host.train()
    assert callback.safe is not first and callback.safe.steps == 24
    assert losses(host)[-24:] == found and callback.safe.frozen == first.frozen
    assert not any(module._forward_pre_hooks for module in host.model.modules())


def test_train_after_an_interruption_starts_with_all_units(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 20:
                raise KeyboardInterrupt

    callback = SafeCallback(SafeConfig(freeze_at_start=0))
    host = trainer(tmp_path, callback, Interrupt(), save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        host.train()
    assert callback.safe.frozen
    host.remove_callback(Interrupt)
    host.train()
    assert callback.safe.steps == 24
    history = [entry for entry in host.state.log_history if "loss" in entry]
    assert next(entry for entry in history if entry["step"] == 1)["safe/frozen_units"] == 0
    assert all(p.requires_grad for name, p in host.model.named_parameters() if "lora_" in name)


def test_one_callback_works_in_another_trainer_with_another_model(tmp_path):
    callback = SafeCallback(journal=tmp_path / "j.jsonl")
    trainer(tmp_path / "a", callback).train()
    host = trainer(tmp_path / "b", callback, family="llama")
    host.train()
    control = trainer(tmp_path / "c", SafeCallback(), family="llama")
    control.train()
    assert callback.safe.frozen == used(control).safe.frozen and losses(host) == losses(control)
    starts = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert [line["units"][0] for line in starts if line["event"] == "start"] == [
        "bert.encoder.layer.0",
        "model.layers.0",
    ]
    # Its checkpoints are those of the second run.
    resumed = trainer(tmp_path / "b", SafeCallback(), family="llama")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-16"))
    assert losses(resumed) == losses(control)
