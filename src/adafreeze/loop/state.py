"""The state of a run in a checkpoint: plain JSON values with a version and a checksum."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import SafeConfig
from ..decide.policy import POLICIES
from ..decide.scores import SCORES
from ..errors import ConfigError, RunError, note, warn
from ..model.restore import random_state, set_random_state

__all__ = [
    "STATE_VERSION",
    "check_frozen",
    "opened",
    "packed_random_state",
    "restore_random_state",
    "sealed",
    "settings_after",
]

STATE_VERSION = 5


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with a version, and a checksum over all of it.

    >>> sorted(sealed({"steps": 3}))
    ['checksum', 'steps', 'version']
    """
    content = {**state, "version": STATE_VERSION}
    content.pop("checksum", None)
    return {**content, "checksum": _checksum(content)}


def opened(state: Any) -> dict[str, Any]:
    """The content of ``state``, which ``sealed`` returned and the host saved and loaded.

    Raises:
        RunError: it is truncated, edited, or written by another version.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise _damaged(f"The adafreeze state of the checkpoint is {reprlib.repr(state)}, without a version.")
    version = state["version"]
    if version != STATE_VERSION:
        raise RunError(
            f"The adafreeze state of the checkpoint has version {version!r}, and this version of adafreeze reads "
            f"{STATE_VERSION}.",
            fix="Resume with the version that wrote it, or start the run anew.",
        )
    content = dict(state)
    if content.pop("checksum", None) != _checksum(content):
        raise _damaged("The adafreeze state of the checkpoint does not match its checksum.")
    return content


def check_frozen(names: Collection[str], units: Collection[str]) -> None:
    """Refuse a state for another model.

    Raises:
        RunError: one of the frozen ``names`` is none of the model's ``units``.
    """
    strangers = [name for name in names if name not in units]
    if strangers:
        raise RunError(
            f"The checkpoint froze {strangers[0]!r}, which is no unit of this model: it was written for another model, "
            "adapter or granularity.",
            fix="Resume with the model and SafeConfig of the checkpoint.",
        )


def settings_after(config: SafeConfig, kept: Mapping[str, Any]) -> tuple[SafeConfig, set[str]]:
    """The settings of a resumed run: those that were given now, and the checkpoint's for the others.

    Warns of given ones that differ from the checkpoint's, and logs those that are taken from it. Functions are compared
    by name: a checkpoint does not keep their code.

    Args:
        config: of the run that resumes.
        kept: ``SafeConfig.to_dict()`` of the run that wrote the checkpoint.

    Returns:
        The settings, ``config`` itself if nothing is taken; and the names of those that differ from the checkpoint's.
    """
    now = config.to_dict()
    differing = {
        name: then for name, then in kept.items() if name in now and _comparable(then) != _comparable(now[name])
    }
    lost = {name: then for name, then in differing.items() if name not in config.given and _is_function(name, then)}
    taken = {name: then for name, then in differing.items() if name not in config.given and name not in lost}
    for name, then in lost.items():
        warn(
            f"SafeConfig.{name} was the function {then!r} in the run that wrote the checkpoint, which keeps only its "
            f"name, and is {now[name]!r} now.",
            fix=f"SafeConfig({name}={then.split('.')[-1]}), with that function.",
        )
    merged, refused = _combined(config, taken)
    given = {name: then for name, then in differing.items() if name in config.given or name in refused}
    if given:
        both = "; ".join(f"{name} was {then!r} and is {now[name]!r}" for name, then in given.items())
        rest = f" ({', '.join(refused)} of the checkpoint contradicts what was given)" if refused else ""
        warn(
            f"Settings that were given differ from those of the checkpoint, and apply from here on: {both}{rest}.",
            fix="Leave them out of SafeConfig(...) to continue with those of the checkpoint.",
        )
    unsaid = ", ".join(f"{name}={taken[name]!r}" for name in taken if name not in refused)
    if unsaid:
        note(f"Settings taken from the checkpoint: {unsaid}.")
    return merged, set(lost) | set(given)


def _combined(config: SafeConfig, fields: Mapping[str, Any]) -> tuple[SafeConfig, list[str]]:
    """``config`` with those of ``fields`` that are consistent with it, and the names of the others."""
    if not fields:
        return config, []
    try:
        return config.changed(**fields), []
    except ConfigError:  # such as cache_dir, with cache="off" given now
        refused = []
        for name, value in fields.items():
            try:
                config = config.changed(**{name: value})
            except ConfigError:
                refused.append(name)
        return config, refused


def _is_function(name: str, value: Any) -> bool:
    known: dict[str, Mapping[str, Any]] = {"policy": POLICIES, "score": SCORES}
    return name in known and value not in known[name]


def _comparable(value: Any) -> Any:
    """A setting as in JSON; the repr of an object without its address."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", value) if isinstance(value, str) else value


def packed_random_state(rank: int = 0) -> dict[str, Any]:
    """The random states of this process (Python, NumPy, torch: CPU and accelerators) as plain JSON values.

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
    """Restore what ``packed_random_state`` returned on this rank; that of another rank is ignored, with a warning."""
    if packed is None:
        return
    if packed["rank"] != rank:
        warn(
            f"The random state of rank {rank} is not restored: the checkpoint holds that of rank {packed['rank']}.",
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


def _damaged(fact: str) -> RunError:
    return RunError(
        f"{fact} It was truncated or edited; nothing was changed.",
        fix="Resume from an earlier checkpoint, or start the run anew.",
    )


def _checksum(state: Mapping[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
