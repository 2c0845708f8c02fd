"""Memory of devices by name, and how much of it a run can use."""

from __future__ import annotations

import difflib
import re

import psutil
import torch

from ..errors import ConfigError
from ..sizes import parse_size, readable

__all__ = ["GPUS", "memory_limit", "usable_memory"]

GIB = 2**30

# Memory by name, in GiB, as sold.
GPUS = {
    "T4": 16, "V100-16GB": 16, "V100-32GB": 32, "P100": 16, "A10": 24, "A10G": 24, "A30": 24, "A40": 48, "L4": 24,
    "L40": 48, "L40S": 48, "A100-40GB": 40, "A100-80GB": 80, "H100": 80, "H100-80GB": 80,
    "H200": 141, "B200": 180,
    "RTX 2060": 6, "RTX 2080 Ti": 11, "RTX 3060": 12, "RTX 3070": 8, "RTX 3080": 10, "RTX 3090": 24,
    "RTX 4060": 8, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12, "RTX 4080": 16, "RTX 4090": 24,
    "RTX 5060 Ti 16GB": 16, "RTX 5070": 12, "RTX 5080": 16, "RTX 5090": 32, "RTX A4000": 16, "RTX A5000": 24,
    "RTX A6000": 48, "RTX 6000 Ada": 48,
}  # fmt: skip
# For the CUDA context, cuBLAS workspaces and fragmentation.
CUDA_RESERVE = GIB
# No device has less memory.
LEAST = 2**20


def usable_memory(device_memory: int | str | None, target: str) -> int | None:
    """Bytes that a run can use on a device; None for None.

    Args:
        device_memory: bytes, a text such as ``"24GiB"``, or a name in ``GPUS`` in any spelling.
        target: on ``"cuda"``, 1 GiB is reserved.

    Raises:
        ConfigError: the name is unknown, or the size is too small.

    >>> usable_memory("NVIDIA GeForce RTX 4090", "cuda") // GIB, usable_memory("8GiB", "cpu") // GIB
    (23, 8)
    """
    if device_memory is None:
        return None
    text = str(device_memory).strip()
    named = {_letters(name): gib * GIB for name, gib in GPUS.items()}.get(_letters(text))
    if named is None and isinstance(device_memory, str) and not text[:1].isdigit():
        close = difflib.get_close_matches(text, GPUS, n=1, cutoff=0.4)
        raise ConfigError(
            f"--device_memory {device_memory}: no GPU of that name is known. Known are {', '.join(GPUS)}.",
            fix=f"--device_memory {f'{close[0]!r}, or ' if close else ''}its memory, such as 24GiB",
        )
    size = named or parse_size("--device_memory", device_memory, "24GiB")
    if isinstance(device_memory, str) and size < LEAST:  # a number without its unit, or a name without its family
        family = next((repr(name) for name in GPUS if name.split()[-1] == text), f"{size}GiB")
        raise ConfigError(f"--device_memory {text} is {readable(size)}.", fix=f"--device_memory {family}")
    if target != "cuda":
        return size
    if size <= CUDA_RESERVE:
        raise ConfigError(
            f"--device_memory is {readable(size)}, and CUDA itself needs {readable(CUDA_RESERVE)}.",
            fix="--device_memory 8GiB",
        )
    return size - CUDA_RESERVE


def _letters(name: str) -> str:
    """A name without maker, spaces and hyphens."""
    return re.sub("nvidia|geforce|[ -]", "", name.lower())


def memory_limit(wanted: int | float | str, device: torch.device, weights: int) -> int:
    """Bytes that a run may use on its device.

    Args:
        wanted: bytes, a share of the device (a float), or ``"auto"`` for what is free.
        device: of the model.
        weights: bytes of the model; they count as free, since they are part of the run.

    Raises:
        ConfigError: more than the device has.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free = min(free + torch.cuda.memory_reserved(device), usable_memory(total, "cuda") or total)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available + weights, memory.total
    if wanted == "auto":
        return free
    limit = int(wanted * total) if isinstance(wanted, float) else int(wanted)
    if limit > total:
        raise ConfigError(
            f"The memory budget is {readable(limit)}, and the device has {readable(total)} ({device.type}).",
            fix='SafeConfig(memory_budget="auto") for all free memory, or memory_budget=0.9 for 90 % of the device',
        )
    return limit
