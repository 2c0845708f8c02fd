"""Accelerate on two ranks: save_state() and load_state(), accumulation, split batches."""

from __future__ import annotations

import accelerate_worker
import pytest
import torch
from launch import found, start, wait


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All runs on two ranks, in one start of the processes."""
    folder = tmp_path_factory.mktemp("accelerate")
    wait(start("accelerate_worker.py", 2, folder, *accelerate_worker.RUNS), folder)
    return folder


@pytest.mark.parametrize("name", accelerate_worker.RUNS)
def test_ranks_agree_at_every_step_and_nothing_frozen_moves(two, name):
    first, second = found(two, name, 0), found(two, name, 1)
    assert first["kind"] == "DistributedDataParallel" and first["parallel"] == "DDP"
    assert first["history"] == second["history"] and first["history"][-1]
    assert first["weights"] == second["weights"]
    assert not first["moved"] and not second["moved"]
    assert first["steps"] == first["total"]


def test_load_state_continues_as_if_the_run_had_never_stopped(two):
    whole, resumed = found(two, "whole"), found(two, "resumed")
    assert whole["history"][7] and "resume" in resumed["events"]
    assert resumed["history"] == whole["history"][8:]
    assert resumed["weights"] == whole["weights"]


def test_load_state_during_a_run_goes_back(two):
    whole, back = found(two, "whole"), found(two, "back")
    assert back["history"] == whole["history"] + whole["history"][8:]
    assert back["weights"] == whole["weights"]


def test_split_batches_train_like_one_process(two, tmp_path):
    one, many = accelerate_worker.train(tmp_path, "one", rows=6), found(two, "split")
    assert many["history"] == one["history"]
    largest = max(
        float((torch.tensor(many["weights"][name]) - torch.tensor(one["weights"][name])).abs().max())
        for name in one["weights"]
    )
    assert largest < 1e-5  # the loss of a step is added in another order
