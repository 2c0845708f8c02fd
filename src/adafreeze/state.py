"""State: what a checkpoint keeps of a run, as plain JSON values with a version and a checksum."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import RunError, warn
from .model.draw import random_state, set_random_state

__all__ = ["STATE_VERSION", "opened", "packed_random_state", "restore_random_state", "sealed"]

STATE_VERSION = 2


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with its version, and a checksum over all of it.

    >>> sorted(sealed({"steps": 3}))
    ['checksum', 'steps', 'version']
    """
    content = {**state, "version": STATE_VERSION}
    content.pop("checksum", None)
    return {**content, "checksum": _checksum(content)}


def opened(state: Any, units: Collection[str]) -> dict[str, Any]:
    """The content of ``state``, if it is whole and belongs to this run.

    Args:
        state: what ``sealed`` returned, through whatever the host wrote it to.
        units: names of the model's units.

    Raises:
        RunError: cut off, edited, written by another version, or for another model.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise _damaged(f"The adafreeze state of the checkpoint is {_shortly(state)}, without a version.")
    version = state["version"]
    if version not in (1, STATE_VERSION):
        raise RunError(
            f"The adafreeze state has version {version!r}; this version reads 1 to {STATE_VERSION}.",
            cause="The checkpoint was written by another version of adafreeze.",
            fix="Resume with the version that wrote it, or start the run anew.",
        )
    content = dict(state)
    if version == STATE_VERSION and content.pop("checksum", None) != _checksum(content):
        raise _damaged("The adafreeze state of the checkpoint does not match its checksum.")
    try:
        content = _from_version_1(content) if version == 1 else content
        frozen, _ = content["frozen"], content["deciding"]
    except (KeyError, TypeError) as error:
        raise _damaged(f"The adafreeze state of the checkpoint lacks {error}.") from error
    strangers = [name for name in frozen if name not in units]
    if strangers:
        raise RunError(
            f"The checkpoint froze {strangers[0]!r}, which is no unit of this model.",
            cause="It was written for another model, adapter or granularity.",
            fix="Resume with the model and SafeConfig of the checkpoint.",
        )
    return content


def packed_random_state(rank: int = 0) -> dict[str, Any]:
    """The random states of this process (Python, NumPy, torch's CPU and accelerators) as plain JSON values.

    >>> import random
    >>> kept = packed_random_state()
    >>> drawn = random.random(), float(torch.rand(()))
    >>> restore_random_state(kept)
    >>> (random.random(), float(torch.rand(()))) == drawn
    True
    """
    now = random_state()
    numpy = now["numpy"]["state"].items()
    return {
        "rank": rank,
        "python": now["python"],
        "numpy": {**now["numpy"], "state": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in numpy}},
        "cpu": _text(now["cpu"]),
        "accelerators": [_text(one) for one in now["accelerators"]],
    }


def restore_random_state(packed: Mapping[str, Any] | None, rank: int = 0) -> None:
    """Put back what ``packed_random_state`` found on this rank; of another rank it is left alone, with a warning."""
    if packed is None:
        return
    if packed.get("rank", rank) != rank:
        warn(
            f"The random state of rank {rank} is not restored: the checkpoint holds that of rank {packed['rank']}.",
            cause="With it both would draw the same dropout masks.",
            fix="Save safe.state_dict() on every rank, and load each rank's own.",
        )
        return
    version, numbers, gauss = packed["python"]
    set_random_state(
        {
            "python": (version, tuple(numbers), gauss),
            "numpy": packed["numpy"],
            "cpu": _tensor(packed["cpu"]),
            "accelerators": [_tensor(text) for text in packed["accelerators"]],
        }
    )


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _from_version_1(state: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 kept everything on one level, and nothing of what rounding alone gives the scores."""
    samples = state["probe_samples"]
    scorer = {"samples": samples, "floor": {}, "gradients": {}, "references": None}
    return {
        "steps": state["steps"],
        "frozen": state["frozen"],
        "deciding": {
            **{name: state[name] for name in ("scores", "warmup_end", "plan", "settling")},
            "scorer": None if samples is None else {**scorer, "flops_spent": 0, "flops_per_measurement": 0},
        },
        "cache": state["cache"],
        "budget": state.get("budget"),
    }


def _damaged(fact: str) -> RunError:
    return RunError(
        fact,
        cause="The file was cut off or edited after it was written.",
        fix="Resume from an earlier checkpoint, or start the run anew. Nothing was changed.",
    )


def _checksum(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
