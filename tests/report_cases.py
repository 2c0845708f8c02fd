"""Journals like those of runs."""

from __future__ import annotations

from pathlib import Path

from adafreeze.journal import Journal


def write_run(folder: Path, method: str = "safe", steps: int = 40, blocks: int = 4, every: int = 4) -> Path:
    """A run in ``folder``: two of its blocks freeze halfway and are then served from the cache."""
    journal = Journal(folder / "journal.jsonl")
    journal.write("run", command="train", method=method, task="text-classification", settings={"learning_rate": 1e-3})
    units = [f"encoder.layer.{index}" for index in range(blocks)]
    freezes = method == "safe"
    if freezes:
        journal.write(
            "start", step=0, total_steps=steps, config={"policy": "share"}, stacks={"encoder.layer": blocks},
            units=units, environment={"adafreeze": "0.1.0"},
        )  # fmt: skip
    for step in range(every, steps + 1, every):
        late = freezes and step > steps // 2
        costs = {"seconds_per_step": 0.5 if late else 1.0, "saved_bytes": 2**20 * (5 if late else 10)}
        journal.write("log", step=step, loss=2.0 / step, learning_rate=1e-3, **costs)
        if freezes and step <= steps // 2:
            journal.write("measure", step=step, scores={unit: 0.01 * step * (i + 1) for i, unit in enumerate(units)})
        if freezes and step == steps // 2:
            journal.write("freeze", step=step, units=units[:2], frozen=2, prefixes={"encoder.layer": 2})
    if freezes:
        journal.write("cache", step=steps, hits=70, advanced=0, misses=10)
    scale = 0.5 if freezes else 1.0
    journal.write(
        "done", step=steps, train_runtime=100 * scale, train_cpu_seconds=80 * scale,
        train_flops=2e12 * scale, train_mean_saved_bytes=1e8 * scale,
        train_peak_saved_bytes=1e8, eval_accuracy=0.8, eval_loss=0.5, eval_runtime=3.0,
    )  # fmt: skip
    journal.close()
    return folder
