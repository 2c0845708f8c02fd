"""SafeCallback made again from a checkpoint, trained with twice, and handed from one Trainer to another."""

from __future__ import annotations

import functools
import json
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import cases
from adafreeze import AdafreezeWarning, ConfigError, Journal, RunError, SafeCallback, SafeConfig
from adafreeze.decide.policy import share


class Stop(TrainerCallback):
    """At step 8, as a run does that is interrupted."""

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
    """The callback that the Trainer has in the end; there is one."""
    (callback,) = [one for one in host.callback_handler.callbacks if isinstance(one, SafeCallback)]
    return callback


def losses(host):
    return [entry["loss"] for entry in host.state.log_history if "loss" in entry]


def again(callback):
    """As ``Trainer`` makes it anew from a checkpoint."""
    return SafeCallback.from_state(json.loads(json.dumps(callback.state())))


@pytest.mark.parametrize(
    "config",
    [
        SafeConfig(dry_run=True, cache="off"),
        SafeConfig(freeze_share=0.4, warmup=0.3, ramp_end=0.5, freeze_at_start=0.0, cache="off", seed=3),
        None,
    ],
)
def test_restored_from_a_checkpoint_it_is_the_same_run(config, tmp_path):
    whole = trainer(tmp_path / "whole", SafeCallback(config))
    whole.train()
    trainer(tmp_path / "run", SafeCallback(config, journal=tmp_path / "j.jsonl"), Stop()).train()
    host = trainer(tmp_path / "run", SafeCallback())  # the Trainer drops it, and makes one as the first was
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


def test_a_probe_that_was_given_is_restored(tmp_path):
    batch = cases.batch("bert", rows=12)
    trainer(tmp_path, SafeCallback(SafeConfig(cache="off"), probe=[batch, batch]), Stop()).train()
    host = trainer(tmp_path, SafeCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)  # none says that it is another one
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert used(host).safe.decider.probe.samples == 24
    assert torch.equal(used(host).probe[0]["input_ids"], batch["input_ids"][:8])


def test_a_probe_that_json_cannot_hold_does_not_stop_saving(tmp_path):
    batch = {**cases.batch("bert"), "output_router_logits": complex(0, 1)}
    callback = SafeCallback(probe=[batch])
    callback.safe = type("Holds", (), {})()
    callback.safe.decider = type("Holds", (), {"probe": type("Holds", (), {"chunks": [batch]})})
    callback.safe.state_dict = lambda random_state: {}
    assert callback.state()["args"]["probe"] is None


def test_what_is_kept_makes_the_same_callback(tmp_path):
    config = SafeConfig(seed=1, cache_dir=tmp_path, freeze=["a"], memory_budget="6GiB", lr_scale=2)
    made = again(SafeCallback(config, journal=tmp_path / "j.jsonl"))
    assert made.config.to_dict() == config.to_dict() and made.config.given == config.given
    assert again(made).state() == made.state()
    assert again(SafeCallback(journal=Journal(tmp_path / "k.jsonl"))).journal == str(tmp_path / "k.jsonl")
    assert again(SafeCallback(journal=Journal())).journal is None and again(SafeCallback()).config is None
    assert SafeCallback({"freeze_share": 0.2}).config == SafeConfig(freeze_share=0.2)
    with pytest.raises(ConfigError, match="no field 'share'"):
        SafeCallback({"share": 0.2})


def test_attributes_have_no_name_that_the_callback_uses():
    state = SafeCallback().state()
    assert not state["attributes"].keys() & vars(SafeCallback()).keys()


def test_a_function_cannot_be_restored_and_that_is_said_before_the_first_step(tmp_path):
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


def test_a_function_of_our_own_is_known_and_one_of_the_same_name_is_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        assert again(SafeCallback(SafeConfig(policy=share))).config.policy == "share"

    def other(situation):
        return []

    other.__qualname__ = "share"
    with pytest.warns(AdafreezeWarning, match="was a function named 'share'"):
        assert again(SafeCallback(SafeConfig(policy=other))).config.policy == "share"


def test_settings_that_differ_from_the_checkpoint_are_told_of_in_the_trainer(tmp_path):
    trainer(tmp_path, SafeCallback(SafeConfig(freeze_share=0.4)), Stop()).train()
    host = trainer(tmp_path, SafeCallback(SafeConfig(freeze_share=0.5)), restore_callback_states_from_checkpoint=False)
    with pytest.warns(AdafreezeWarning, match=r"freeze_share was 0\.4 and is 0\.5"):
        host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_train_epochs": 6}, "48 steps now, 24 planned then"),
        ({"per_device_train_batch_size": 2}, "2 samples a step and process now, 4 planned then"),
        ({"gradient_accumulation_steps": 2}, "12 steps now, 24 planned then, 8 samples a step"),
    ],
)
def test_other_epochs_batches_and_accumulation_lay_the_schedule_out_anew(changed, told, tmp_path, caplog):
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


def test_two_of_them_are_refused_also_where_the_checkpoint_knows_one(tmp_path):
    trainer(tmp_path, SafeCallback(), Stop()).train()
    for restore in (True, False):
        host = trainer(tmp_path, SafeCallback(), SafeCallback(), restore_callback_states_from_checkpoint=restore)
        with pytest.raises(RunError, match="has 2 SafeCallbacks"):
            host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert all(p.requires_grad for name, p in host.model.named_parameters() if "lora_" in name)


# One callback for several runs.


def test_a_second_train_is_a_run_of_its_own(tmp_path):
    callback = SafeCallback(SafeConfig(cache="off"))
    host = trainer(tmp_path, callback, save_strategy="no")
    set_seed(3)
    host.train()
    first, found = callback.safe, losses(host)
    host.model.load_state_dict(cases.lora_model("bert").state_dict())
    host.optimizer = host.lr_scheduler = None  # the Trainer would go on with its moments
    set_seed(3)
    host.train()
    assert callback.safe is not first and callback.safe.steps == 24
    assert losses(host)[-24:] == found and callback.safe.frozen == first.frozen
    assert not any(module._forward_pre_hooks for module in host.model.modules())


def test_after_an_interruption_the_next_train_starts_with_all_units(tmp_path):
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


def test_one_callback_serves_another_trainer_with_another_model(tmp_path):
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
    # And its checkpoints are of its own run.
    resumed = trainer(tmp_path / "b", SafeCallback(), family="llama")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-16"))
    assert losses(resumed) == losses(control)
