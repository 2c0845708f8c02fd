"""Has ``killed.py`` run whole runs in processes of their own, and compares what they have come to."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
# What a resumed run may spend or find otherwise, without another result.
COSTS = {"run", "flops", "flops_spent", "environment", "config"}
OF_THE_CACHE = {"cache", "cache_full", "cache_off", "cache_outlook", "offload"}
KILLED = -signal.SIGKILL


class Forge:
    """One warm process that forks a child for each run."""

    def __init__(self) -> None:
        path = os.pathsep.join(map(str, (HERE.parent, HERE, *filter(None, sys.path))))
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        self._worker = subprocess.Popen(
            [sys.executable, str(HERE / "killed.py")],
            env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, folder: Path, **job: Any) -> int:
        """The exit status of a run; -9 for one that was killed."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._worker.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self._worker.stdin.flush()
        return int(self._worker.stdout.readline())

    def finish(self, folder: Path, **job: Any) -> dict[str, Any]:
        """What a run that comes to its end has come to."""
        assert self.run(folder, **job) == 0, (folder / "log.txt").read_text()
        return torch.load(folder / "result.pt", weights_only=True)

    def close(self) -> None:
        self._worker.communicate()


def moments(seed: str, host: str) -> list[tuple[int, str]]:
    """Ten steps in order, three in the warm-up, four while blocks freeze, three after, and where in them to kill."""
    draw = random.Random(seed)
    steps = [*draw.sample(range(4, 10), 3), *draw.sample(range(10, 22), 4), *draw.sample(range(22, 28), 3)]
    saving = {"trainer": ["saving:trainer_state", "saving:adapter_config"], "loop": ["saving", "saving:state.tmp"]}
    places = ["forward", "backward", "optimizer", "between", "clock", *saving[host]]
    chosen = [*places, *draw.choices(places, k=10 - len(places))]
    draw.shuffle(chosen)
    return [
        (step, f"clock:{draw.uniform(0.0, 0.015):.4f}" if place == "clock" else place)
        for step, place in zip(sorted(steps), chosen, strict=True)
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, but for its stops, its costs and its cache."""
    kept = [line for line in lines(folder) if line["event"] not in {"resume", *OF_THE_CACHE}]
    return [{name: value for name, value in line.items() if name not in COSTS} for line in kept]


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """The same to the last bit, whatever it is made of."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_alike(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}.{index}")
    else:
        assert one == other, where
