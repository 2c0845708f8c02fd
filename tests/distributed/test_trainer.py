"""Trainer on two ranks: DDP, and a rank that dies. (accelerate has no FSDP2 on CPUs: see test_ranks.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import found, start, wait


def run(folder: Path, name: str, *flags: str, ranks: int = 2, fine: bool = True) -> list[str]:
    return wait(start("trainer_worker.py", ranks, folder, name, *flags), folder, fine=fine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the runs that several tests share."""
    folder = tmp_path_factory.mktemp("trainer")
    run(folder, "one", "--accumulate", "2", ranks=1)
    run(folder, "ddp")
    return folder


def largest_difference(one: dict, other: dict) -> float:
    return max(
        float((torch.tensor(one["weights"][name]) - torch.tensor(other["weights"][name])).abs().max())
        for name in one["weights"]
    )


def checked(folder: Path, name: str) -> dict:
    """Rank 0's results, after checks that apply to every run."""
    first, second = found(folder, name, 0), found(folder, name, 1)
    assert first["history"] == second["history"] and first["history"][-1]
    assert first["weights"] == second["weights"]
    assert not first["moved"] and not second["moved"]
    return first


def test_ddp_equals_one_process_that_accumulates(folder):
    one, many = found(folder, "one"), checked(folder, "ddp")
    assert many["kind"] == "DistributedDataParallel" and many["parallel"] == "DDP"
    assert many["history"] == one["history"]
    assert largest_difference(one, many) < 1e-5  # the loss of a step is added in another order


def test_one_rank_writes_the_journal(folder):
    lines = [json.loads(line) for line in (folder / "ddp" / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("start") == 1
    assert len({json.dumps(line) for line in lines}) == len(lines)


@pytest.mark.slow
def test_find_unused_parameters_works(folder):
    run(folder, "unused", "--find_unused")
    assert checked(folder, "unused")["weights"] == found(folder, "ddp")["weights"]


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 8, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_can_be_resumed_after_a_rank_dies(folder, step):
    name = f"dying-{step}"
    run(folder, name, "--die", str(step), fine=False)
    assert not (folder / f"{name}-0.json").exists()
    if step > 5:
        run(folder, name, "--resume")
        resumed = checked(folder, f"{name}-resumed")
        assert resumed["weights"] == found(folder, "ddp")["weights"]
        lines = [json.loads(line) for line in (folder / name / "journal.jsonl").read_text().splitlines()]
        events = [(line["event"], line.get("step")) for line in lines if line["event"] != "recompute"]
        assert events.count(("start", 0)) == 1 and len(set(events)) == len(events)
