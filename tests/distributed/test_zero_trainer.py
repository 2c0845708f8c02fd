"""Trainer with a DeepSpeed config on two processes works without setup, and saves whole adapters."""

import json

import pytest
import torch
from launch import found, start, wait
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("deepspeed trainer")  # all tests share one start of the processes

ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
RUNS = {
    "2": {"stage": 2},
    "2 resumed": {"stage": 2, "resume": "2/checkpoint-10"},
    "3": {"stage": 3},
    "3 resumed": {"stage": 3, "resume": "3/checkpoint-10"},
    "3 in pieces": {"stage": 3, "in_pieces": True},
    "accumulating": {"stage": 2, "accumulate": 2},
    "optimizer of the config": {"stage": 2, "optimizer": ADAMW},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of all runs, and of ``one``: a process without DeepSpeed that accumulates the same batches."""
    folder = tmp_path_factory.mktemp("trainer")
    wait(start("trainer_worker.py", 1, folder, "one", "--accumulate", "2"), folder)
    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    wait(start("_zero_trainer.py", 2, folder, json.dumps(RUNS), **cpu), folder, seconds=900)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """The results of all runs on both ranks."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def checked(ranks, name):
    """Rank 0's results, after checks that apply to every run."""
    for answers in ranks:
        assert not isinstance(answers[name], str), answers[name]
    first, second = (answers[name] for answers in ranks)
    assert first["history"] == second["history"] and first["history"][-1]
    assert not first["moved"] and not second["moved"]
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    return first


@pytest.mark.parametrize("name", ["2", "3", "accumulating", "optimizer of the config"])
def test_a_run_equals_one_process_without_deepspeed(folder, ranks, name):
    one, run = found(folder, "one"), checked(ranks, name)
    assert run["parallel"] == f"DeepSpeed ZeRO-{RUNS[name]['stage']}"
    assert run["history"] == one["history"]
    for key, value in run["weights"].items():  # gradients are added in another order
        torch.testing.assert_close(value.flatten(), torch.tensor(one["weights"][key]), rtol=0, atol=1e-4)
    assert run["logged"][-1]["safe/frozen_prefix"] == len(run["history"][-1])


@pytest.mark.parametrize("name", ["2", "3"])
def test_a_resumed_run_equals_one_that_never_stopped(ranks, name):
    whole, onward = checked(ranks, name), checked(ranks, f"{name} resumed")
    assert whole["history"][9], "nothing was frozen at the stop"
    assert onward["history"] == whole["history"][10:]
    assert all(torch.equal(value, onward["weights"][key]) for key, value in whole["weights"].items())


@pytest.mark.parametrize("name", ["2", "3", "2 resumed", "3 resumed", "3 in pieces"])
def test_the_saved_adapter_contains_frozen_and_live_units(folder, ranks, name):
    weights = checked(ranks, name)["weights"]
    for place in ("saved", "checkpoint-20"):
        saved = load_file(folder / name / place / "adapter_model.safetensors")
        assert saved.keys() == {key.replace(".default", "") for key in weights}
        if place == "saved":
            assert all(torch.equal(saved[key.replace(".default", "")], value) for key, value in weights.items())
