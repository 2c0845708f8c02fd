"""SafeCallback in the real Trainer."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import cases
from adafreeze import RunError, SafeCallback, SafeConfig


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "weight_decay": 0.1,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **settings})


def run(family, folder, *callbacks, model=None, resume=None, **settings):
    trainer = Trainer(
        model=model or cases.lora_model(family),
        args=arguments(folder, **settings),
        train_dataset=cases.Samples(family, 32),
        data_collator=cases.collate,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_one_line_freezes_in_every_family(family, tmp_path):
    plain = run(family, tmp_path / "plain")
    callback = SafeCallback(SafeConfig(freeze_at_start=0), journal=tmp_path / "journal.jsonl")
    trainer = run(family, tmp_path / "safe", callback)
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    freezes = [event for event in events if event["event"] == "freeze"]
    assert freezes and callback.safe.frozen and sum(callback.safe.prefixes.values())
    first = freezes[0]["step"]
    assert losses(trainer)[:first] == losses(plain)[:first]
    assert losses(trainer) != losses(plain)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[0]["safe/frozen_units"] == 0
    assert history[-1]["safe/frozen_units"] == len(callback.safe.frozen)
    assert history[-1]["safe/frozen_prefix"] == sum(callback.safe.prefixes.values())
    assert history[-1]["safe/saved_mib"] < history[0]["safe/saved_mib"]
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n), "the model is restored"


def test_trackers_get_the_scalars(tmp_path, monkeypatch):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notebook", Tracker)
    callback = SafeCallback(SafeConfig(freeze_share=0.6))
    trainer = run("bert", tmp_path, callback, report_to=["notebook"])
    steps = [logs for logs in seen if "loss" in logs]
    assert steps and all({"safe/frozen_units", "safe/frozen_prefix", "safe/ramp"} <= logs.keys() for logs in steps)
    assert steps[-1]["safe/frozen_units"] == len(callback.safe.frozen) > 0
    assert all(isinstance(value, int | float | str) for logs in steps for value in logs.values())
    assert trainer.callback_handler.callbacks[0] is callback
    assert len(trainer.callback_handler.callbacks) == len({type(c) for c in trainer.callback_handler.callbacks})


def test_the_saved_adapter_gives_the_same_logits_without_adafreeze(tmp_path):
    trainer = run("bert", tmp_path / "run", SafeCallback(SafeConfig(freeze_share=0.6)))
    trainer.model.base_model.model.config.save_pretrained(tmp_path / "base")
    cases.base_model("bert").save_pretrained(tmp_path / "base")
    trainer.save_model(tmp_path / "adapter")
    trainer.model.eval()
    torch.save(trainer.model(**cases.batch("bert")).logits.detach(), tmp_path / "logits.pt")
    torch.save(cases.batch("bert"), tmp_path / "batch.pt")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
batch = torch.load({str(tmp_path / "batch.pt")!r}, weights_only=True)
expected = torch.load({str(tmp_path / "logits.pt")!r}, weights_only=True)
assert "adafreeze" not in sys.modules
assert torch.equal(model(**batch).logits, expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_the_defaults_start_with_a_third_frozen(family, tmp_path):
    callback = SafeCallback()
    trainer = run(family, tmp_path / "safe", callback)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[0]["safe/frozen_units"] == len(callback.safe.units) // 3 == history[0]["safe/frozen_prefix"]
    assert history[-1]["safe/frozen_units"] == len(callback.safe.frozen) > history[0]["safe/frozen_units"]


def test_checkpointing_and_accumulation_in_the_trainer(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 6}
    name = (
        "activation_checkpointing"
        if hasattr(arguments(tmp_path), "activation_checkpointing")
        else "gradient_checkpointing"
    )
    # Reentrant checkpointing, the default of transformers 4, trains no adapters even without adafreeze.
    settings |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    plain = run("llama", tmp_path / "a", **settings)
    callback = SafeCallback(SafeConfig(freeze_at_start=0))
    trainer = run("llama", tmp_path / "b", callback, **settings)
    step = next(event["step"] for event in callback.safe.journal.events if event["event"] == "freeze")
    assert losses(trainer)[:step] == losses(plain)[:step]
    assert callback.safe.prefixes["model.layers"] > 0


@cases.resumes_in_an_epoch
def test_resume_restores_the_freeze(tmp_path):
    # No cache: the samples come at other widths than before, which changes rounding.
    settings = {"save_strategy": "steps", "save_steps": 12, "lr_scheduler_type": "constant"}
    config = SafeConfig(warmup=0.3, ramp_end=0.5, cache="off")
    full = SafeCallback(config)
    whole = run("bert", tmp_path / "run", full, **settings)
    again = SafeCallback(config)
    trainer = run("bert", tmp_path / "run", again, resume=tmp_path / "run" / "checkpoint-12", **settings)
    assert any(event["event"] == "resume" for event in again.safe.journal.events)
    assert again.safe.frozen == full.safe.frozen
    for (name, mine), (_, other) in zip(trainer.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_checkpoint_without_adafreeze_can_be_resumed_with_it(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 12}
    run("bert", tmp_path / "run", **settings)
    trainer = run("bert", tmp_path / "run", SafeCallback(), resume=tmp_path / "run" / "checkpoint-12", **settings)
    assert trainer.state.global_step == 24


def test_data_parallel_is_rejected(tmp_path):
    callback = SafeCallback()
    settings = arguments(tmp_path)
    settings._n_gpu = 2
    with pytest.raises(RunError, match=r"2 GPUs by nn\.DataParallel"):
        callback.on_train_begin(settings, None, None)


def test_two_callbacks_are_rejected(tmp_path):
    with pytest.raises(RunError, match="has 2 SafeCallbacks"):
        run("bert", tmp_path, SafeCallback(), SafeCallback())


def test_adapters_only_on_top_blocks_do_not_change_the_run_before_a_freeze(tmp_path):
    plain, safe = (
        run("bert", tmp_path, *callbacks, model=cases.lora_model("bert", layers_to_transform=[3]))  # with dropout
        for callbacks in ([], [SafeCallback()])
    )
    assert losses(safe) == losses(plain)


def test_a_sampler_that_fills_batches_by_length_does_not_change_the_epochs(tmp_path, caplog):
    class Packed(Trainer):
        def get_train_dataloader(self):
            groups = torch.arange(32).split(8)  # more samples in a batch than its size says, as in Axolotl's packing
            batches = [group.tolist() for group in groups]
            return torch.utils.data.DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=cases.collate)

    callback = SafeCallback()
    args = arguments(tmp_path, num_train_epochs=2)
    model, data = cases.lora_model("llama"), cases.Samples("llama", 32)
    Packed(model, args, train_dataset=data, data_collator=cases.collate, callbacks=[callback]).train()
    assert (callback.safe.length.step_samples, callback.safe.length.epoch_steps) == (8, 4)
    assert "Prefix cache on: 2 epochs" in caplog.text
