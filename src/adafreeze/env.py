"""Versions for bug reports: ``python -m adafreeze.env`` prints them as a table."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata

import torch

from ._version import __version__

__all__ = ["environment"]

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "trl", "lightning", "deepspeed",
    "bitsandbytes", "adapters", "lmdb", "numpy",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Versions of adafreeze, Python and the installed packages that matter, and the device; imports only torch.

    >>> list(environment())[:4]
    ['adafreeze', 'python', 'platform', 'torch']
    """
    # Not platform.platform(), whose kernel release may name a user's machine in a public report.
    system = f"{platform.system()} {platform.machine()}"
    found = {"adafreeze": __version__, "python": platform.python_version(), "platform": system}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


if __name__ == "__main__":
    print("| what | version |\n|---|---|")
    for name, version in environment().items():
        print(f"| {name} | {version} |")
