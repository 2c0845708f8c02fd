"""Measuring is cheap, and changes nothing: the core of benchmarks/overhead.py on a smaller model."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from adafreeze import Safe, SafeConfig

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overhead.py"


@pytest.fixture
def overhead(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "model", functools.partial(module.model, layers=2, hidden=48))
    return module


def run(overhead, settings):
    """Two epochs of a plain loop with dropout on. Returns (losses, batches, gradients of the last step, safe)."""
    network = overhead.model()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    loader = DataLoader(overhead.Sentences(60), batch_size=4, shuffle=True, collate_fn=overhead.collate)
    torch.manual_seed(5)
    safe = Safe(network, settings, optimizer=optimizer, probe=loader, total_steps=30) if settings else None
    losses, batches = [], []
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad(set_to_none=True)
            loss = network(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            batches.append(batch["input_ids"])
            gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
            optimizer.zero_grad(set_to_none=True)
            if safe is not None:
                safe.step()
    return losses, batches, gradients, safe


@pytest.mark.parametrize("settings", [{"dry_run": True}, {"freeze_share": 0}])
def test_losses_batches_and_gradients_are_those_of_the_run_without_it(overhead, settings):
    losses, batches, gradients, _ = run(overhead, None)
    others, other_batches, other_gradients, safe = run(overhead, SafeConfig(**settings))
    measured = [event["step"] for event in safe.journal.events if event["event"] == "measure"]
    assert len(measured) >= 6 and any(safe.scores.values()), "it did measure"
    assert others == losses
    assert len(set(losses)) == len(losses), "dropout and shuffling are on"
    assert all(map(torch.equal, batches, other_batches))
    assert len(gradients) == len(other_gradients) and all(map(torch.equal, gradients, other_gradients))


def test_the_benchmark_says_so_too(overhead):
    assert overhead.identical()


@pytest.mark.parametrize(("samples", "epochs"), [(2500, 6), (1500, 2)])
def test_measuring_costs_at_most_one_per_cent_of_the_run_at_six_measurements_or_more(overhead, samples, epochs):
    data = overhead.Sentences(samples)
    measured = overhead.measuring_flops(data, epochs)
    assert measured["measurements"] >= 6
    assert 0 < measured["flops"] <= 0.01 * overhead.plain_flops(data, epochs)


def test_the_probe_shrinks_with_the_run_and_the_measurements_stay(overhead):
    long, short = (overhead.measuring_flops(overhead.Sentences(samples), 3) for samples in (3000, 700))
    assert long["probe_samples"] > short["probe_samples"]
    assert min(long["measurements"], short["measurements"]) >= 6
