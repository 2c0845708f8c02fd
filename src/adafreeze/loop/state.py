"""State: what a checkpoint keeps of a run, as plain JSON values with a version and a checksum."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import SafeConfig
from ..decide.policy import POLICIES
from ..decide.scores import SCORES
from ..errors import ConfigError, RunError, note, warn
from ..model.random_state import random_state, set_random_state

__all__ = [
    "STATE_VERSION",
    "check_frozen",
    "opened",
    "packed_random_state",
    "restore_random_state",
    "sealed",
    "settings_after",
]

STATE_VERSION = 2


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with its version, and a checksum over all of it.

    >>> sorted(sealed({"steps": 3}))
    ['checksum', 'steps', 'version']
    """
    content = {**state, "version": STATE_VERSION}
    content.pop("checksum", None)
    return {**content, "checksum": _checksum(content)}


def opened(state: Any) -> dict[str, Any]:
    """The content of ``state``, if it is whole.

    Args:
        state: what ``sealed`` returned, through whatever the host wrote it to.

    Raises:
        RunError: cut off, edited, or written by another version.
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
        _ = content["frozen"], content["deciding"]
    except (KeyError, TypeError) as error:
        raise _damaged(f"The adafreeze state of the checkpoint lacks {error}.") from error
    return content


def check_frozen(names: Collection[str], units: Collection[str]) -> None:
    """Refuse a state for another model.

    Raises:
        RunError: one of the frozen ``names`` is none of the model's ``units``.
    """
    strangers = [name for name in names if name not in units]
    if strangers:
        raise RunError(
            f"The checkpoint froze {strangers[0]!r}, which is no unit of this model.",
            cause="It was written for another model, adapter or granularity.",
            fix="Resume with the model and SafeConfig of the checkpoint.",
        )


def settings_after(config: SafeConfig, kept: Mapping[str, Any] | None) -> tuple[SafeConfig, set[str]]:
    """The settings that a resumed run goes on with: those given now, and of the others the checkpoint's.

    A warning names the given ones that differ from the checkpoint's, and one line those that are taken from it. Of a
    function a checkpoint has the name alone, by which it is compared.

    Args:
        config: of the run that resumes.
        kept: ``SafeConfig.to_dict()`` of the run that wrote the checkpoint; None where it did not keep it.

    Returns:
        The settings, ``config`` itself if nothing is taken; and the names of those that differ from the checkpoint's.
    """
    now = config.to_dict()
    differing = {
        name: then for name, then in (kept or {}).items() if name in now and _comparable(then) != _comparable(now[name])
    }
    lost = {name: then for name, then in differing.items() if name not in config.given and _is_function(name, then)}
    taken = {name: then for name, then in differing.items() if name not in config.given and name not in lost}
    for name, then in lost.items():
        warn(
            f"SafeConfig.{name} was the function {then!r} in the run that wrote the checkpoint; now it is "
            f"{now[name]!r}.",
            cause="A checkpoint keeps the name of a function, not its code, and none was given.",
            fix=f"SafeConfig({name}={then.split('.')[-1]}), with that function.",
        )
    merged, refused = _combined(config, taken)
    given = {name: then for name, then in differing.items() if name in config.given or name in refused}
    if given:
        both = "; ".join(f"{name} was {then!r} and is {now[name]!r}" for name, then in given.items())
        rest = f" ({', '.join(refused)} of the checkpoint does not go with what was given.)" if refused else ""
        warn(
            f"Settings are not those of the run that wrote the checkpoint: {both}.",
            cause=f"They were given, and what is given counts from here on.{rest}",
            fix="Nothing to do if that was meant; leave them out of SafeConfig(...) to go on as in the checkpoint.",
        )
    unsaid = ", ".join(f"{name}={taken[name]!r}" for name in taken if name not in refused)
    if unsaid:
        note(f"Settings of the checkpoint, where none were given: {unsaid}.")
    return merged, set(lost) | set(given)


def _combined(config: SafeConfig, fields: Mapping[str, Any]) -> tuple[SafeConfig, list[str]]:
    """``config`` with as many of ``fields`` as go together with it, and the names of the others."""
    if not fields:
        return config, []
    try:
        return config.changed(**fields), []
    except ConfigError:  # such as a folder for the cache, which is off now
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
    """A setting as JSON has it; of an object that is called, not where it lies in memory."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", value) if isinstance(value, str) else value


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
