"""Devices by name, and how much of their memory a run can have."""

from __future__ import annotations

import difflib

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
# The CUDA context, workspaces of cuBLAS, and what the allocator cannot hand out.
CUDA_RESERVE = GIB
# No device has less.
LEAST = 2**20


def usable_memory(device_memory: int | str | None, target: str) -> int | None:
    """Bytes that a run can have on a device; None for None.

    Args:
        device_memory: bytes, a text such as ``"24GiB"``, or a name in ``GPUS``, however it is spelt.
        target: on ``"cuda"`` 1 GiB is left for the context, workspaces and fragments.

    Raises:
        ConfigError: the name is unknown, or the size is none.

    >>> usable_memory("NVIDIA GeForce RTX 4090", "cuda") // GIB, usable_memory("8GiB", "cpu") // GIB
    (23, 8)
    """
    if device_memory is None:
        return None
    names = {name.lower().replace(" ", "").replace("-", ""): size for name, size in GPUS.items()}
    asked = str(device_memory).lower().replace("nvidia", "").replace("geforce", "").replace(" ", "").replace("-", "")
    if asked in names:
        size = names[asked] * GIB
    elif isinstance(device_memory, str) and not device_memory.strip()[:1].isdigit():
        close = difflib.get_close_matches(device_memory, GPUS, n=1, cutoff=0.4)
        raise ConfigError(
            f"--device_memory {device_memory}: no GPU of that name is known here.",
            cause=f"Known are {', '.join(GPUS)}.",
            fix=f"--device_memory {f'{close[0]!r}, or' if close else ''} its memory, such as 24GiB".replace("  ", " "),
        )
    else:
        size = parse_size("--device_memory", device_memory, "24GiB")
        if isinstance(device_memory, str) and size < LEAST:  # a number without its unit, or a name without its family
            named = [name for name in GPUS if name.split()[-1] == str(device_memory).strip()]
            fix = f"--device_memory '{named[0]}'" if named else f"--device_memory {size}GiB"
            raise ConfigError(f"--device_memory is {readable(size)}.", cause="A number alone is bytes.", fix=fix)
    if target == "cuda" and size <= CUDA_RESERVE:
        raise ConfigError(
            f"--device_memory is {readable(size)}.",
            cause=f"{readable(CUDA_RESERVE)} of it is left for the CUDA context and workspaces, so nothing remains.",
            fix="--device_memory 8GiB",
        )
    return size - (CUDA_RESERVE if target == "cuda" else 0)


def memory_limit(wanted: int | float | str, device: torch.device, weights: int) -> int:
    """Bytes that a run may hold on the device that it is on.

    Args:
        wanted: bytes, a share of the device (a float), or ``"auto"`` for what is free there.
        device: where the model is.
        weights: bytes of the model, which count as free: the run holds them.

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
            f"The memory budget is {readable(limit)}, and the device has {readable(total)}.",
            cause=f"{device.type.upper()} memory, all of it, is less.",
            fix='SafeConfig(memory_budget="auto"), which takes what is free, or 0.9 for nine tenths',
        )
    return limit
