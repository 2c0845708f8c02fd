"""Start processes with a gloo group, as torchrun does, and collect their results."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(worker: str, ranks: int, folder: Path, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Run ``python worker FOLDER *arguments`` on each rank; output goes to ``rank-N.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, sys.path)]),
    }
    processes = []
    for rank in range(ranks):
        with (folder / f"rank-{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", str(HERE / worker), str(folder), *arguments],
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def wait(processes: list[subprocess.Popen], folder: Path, seconds: float = 300, fine: bool = True) -> list[str]:
    """Wait for all and return their logs; when one fails, the others are killed, as torchrun does."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if time.monotonic() > end or (failed and time.monotonic() > (end := min(end, time.monotonic() + 5))):
            for process in processes:
                process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    logs = [(folder / f"rank-{rank}.log").read_text(errors="replace") for rank in range(len(processes))]
    if fine:
        codes = [process.returncode for process in processes]
        assert codes == [0] * len(codes), f"{codes}\n" + "\n".join(log[-3000:] for log in logs)
    return logs


def found(folder: Path, name: str, rank: int = 0) -> dict:
    """Read what a worker wrote with ``tell``."""
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def tell(folder: Path, name: str, rank: int, **values: object) -> None:
    """Write a worker's results."""
    (folder / f"{name}-{rank}.json").write_text(json.dumps(values))
