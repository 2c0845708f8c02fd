"""LoRA-FA with PEFT's optimizer: A never moves, and moments are stored by name."""

from __future__ import annotations

import itertools

import torch
from peft.optimizers import create_lorafa_optimizer
from transformers import Trainer, TrainingArguments

import cases
from adafreeze import Safe, SafeCallback, SafeConfig
from cached_run import by_step, epochs

FREEZE = {"score": "random", "warmup": 0.0, "ramp_end": 1.0, "policy": by_step({2: 2, 6: 3})}
DEPTHS = [0] * 1 + [2] * 4 + [3] * 7
LOWER = [f".layers.{index}." for index in range(3)]


def start():
    model = cases.lora_model("llama", 4)
    return model, create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1)


def run(cache: str, after=lambda _safe, _model, _optimizer: None):
    """The losses, the weights, the optimizer and the closed Safe of a loop of three epochs of four steps."""
    model, optimizer = start()
    batches = list(epochs("llama"))
    probe = {"probe": batches[:2], "total_steps": len(batches), "samples_per_epoch": 14}
    safe = Safe(model, SafeConfig(**FREEZE, cache=cache), optimizer=optimizer, **probe)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        safe.step()
        after(safe, model, optimizer)
    saved = safe.logs()["safe/saved_mib"]
    safe.close()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}, saved, safe


def lora(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_a_frozen_pair_does_not_move_and_its_moments_are_freed():
    seen = []

    def after(safe, model, optimizer):
        seen.append((safe.prefixes["model.layers"], lora(model), set(optimizer.state), safe.logs()["safe/saved_mib"]))
        names = [name for name, _ in model.named_parameters()]
        assert optimizer.param_groups[0]["names"] == optimizer.state_dict()["param_groups"][0]["names"] == names

    *_, safe = run("off", after)
    assert [depth for depth, *_ in seen] == DEPTHS
    for (depth, before, *_), (_, now, *_) in itertools.pairwise(seen):
        for name in now:
            still = ".lora_A." in name or any(part in name for part in LOWER[:depth])
            assert torch.equal(now[name], before[name]) == still, name
    for depth, _, state, _ in seen:
        assert len(state) == 2 * (4 - depth) and not any(part in name for name in state for part in LOWER[:depth])
    assert seen[-1][3] < 0.6 * seen[0][3]
    trained = {name for name, p in safe.model.named_parameters() if p.requires_grad}
    assert trained == {name for name in lora(safe.model) if ".lora_B." in name}, "as create_lorafa_optimizer left it"


def test_the_cache_changes_nothing():
    losses, weights, _, cached = run("ram")
    expected, others, *_ = run("off")
    event = next(event for event in cached.journal.events if event["event"] == "cache")
    assert event["hits"] and losses == expected
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_disable_adapter_does_not_unfreeze_blocks():
    def after(safe, model, _optimizer):
        with model.disable_adapter():
            pass
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        depth = safe.prefixes["model.layers"]
        depths.append(depth)
        assert not any(part in name for name in trained for part in LOWER[:depth])

    depths: list[int] = []
    run("off", after)
    assert depths == DEPTHS


def test_after_close_all_pairs_train_again():
    model, optimizer = start()
    batch = cases.batch("llama")
    safe = Safe(model, SafeConfig(freeze=["model.layers.0"]), optimizer=optimizer, probe=batch, total_steps=9)
    safe.close()
    before = lora(model)
    model(**batch).loss.backward()
    optimizer.step()
    now = lora(model)
    assert {name for name in now if not torch.equal(now[name], before[name])} == {n for n in now if ".lora_B." in n}


def train(folder, checkpoint=None):
    model, optimizer = start()
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "logging_steps": 1, "save_steps": 8}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
    callback = SafeCallback(SafeConfig(**FREEZE))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings, **quiet),
        train_dataset=cases.Samples("llama", 16, length=12),
        data_collator=cases.collate,
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, callback.safe, optimizer


def test_a_resumed_trainer_is_bit_identical(tmp_path):
    whole, safe, optimizer = train(tmp_path)
    assert len(safe.frozen) == 3 and len(optimizer.state) == 2
    again, resumed, _ = train(tmp_path, str(tmp_path / "checkpoint-8"))
    assert any(event["event"] == "resume" for event in resumed.journal.events) and resumed.frozen == safe.frozen
    weights = zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in weights)
