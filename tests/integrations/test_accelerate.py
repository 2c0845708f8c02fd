"""AcceleratedSafe in one process (two processes: tests/distributed/test_accelerate.py)."""

import accelerate_worker
import pytest
import torch
from accelerate import Accelerator

import cases
from adafreeze import SafeConfig
from adafreeze.integrations.accelerate import AcceleratedSafe


@pytest.mark.parametrize(
    ("family", "dropout", "save_at"),
    # Accelerate draws one more random number when it resumes within an epoch: with dropout only a checkpoint between
    # epochs is exact, with or without adafreeze.
    [("llama", 0.0, 13), ("bert", 0.1, 12)],
)
def test_load_state_resumes_bit_identically(tmp_path, family, dropout, save_at):
    settings = {"family": family, "dropout": dropout, "save_at": save_at}
    whole = accelerate_worker.train(tmp_path, "whole", **settings)
    resumed = accelerate_worker.train(tmp_path, "resumed", resume="whole", **settings)
    assert whole["history"][save_at - 1] and not whole["moved"] and "resume" in resumed["events"]
    assert whole["steps"] == whole["total"] and whole["registered"] == 1
    assert resumed["history"] == whole["history"][save_at:]
    assert resumed["weights"] == whole["weights"]


def test_load_state_during_a_run_thaws_later_freezes(tmp_path):
    settings = {"save_at": 7, "config": {"freeze_at_start": 0}}
    whole = accelerate_worker.train(tmp_path, "whole", **settings)
    back = accelerate_worker.train(tmp_path, "back", back=True, **settings)
    assert not whole["history"][6] and whole["history"][-1]
    assert back["history"] == whole["history"] + whole["history"][7:]
    assert back["weights"] == whole["weights"] and not back["moved"]


def test_a_step_counts_only_when_the_optimizer_steps(tmp_path):
    made = accelerate_worker.train(tmp_path, "accumulate", rows=2, accumulate=2)
    # Nine batches per epoch: four pairs and a single one at the end.
    assert made["steps"] == made["total"] == 5 * accelerate_worker.EPOCHS
    assert made["history"][-1] and not made["moved"]


def test_mixed_precision(tmp_path):
    made = accelerate_worker.train(tmp_path, "bf16", mixed_precision="bf16")
    assert made["history"][-1] and not made["moved"]
    assert made["logs"]["safe/cache_hit_rate"] > 0


def test_it_needs_only_what_prepare_returns():
    accelerator = Accelerator(cpu=True)
    model = cases.lora_model("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer, data = accelerator.prepare(model, optimizer, cases.loader("bert", 12, 4))
    safe = AcceleratedSafe(accelerator, model, optimizer, data, SafeConfig(memory_budget="1GiB"), total_steps=3)
    assert safe.length.samples_per_epoch == 12 and safe.decider.probe.samples == 12
    assert safe.budget is not None and accelerator._custom_objects == [safe]
    assert safe.state_dict()["random"] is None
    safe.close()
