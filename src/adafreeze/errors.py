"""Errors and warnings: one sentence of fact, one of what to do."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = [
    "AdafreezeError",
    "AdafreezeWarning",
    "ConfigError",
    "DataError",
    "ModelError",
    "ProbeError",
    "RunError",
    "WarnOnce",
    "error_line",
    "note",
    "warn",
]


class AdafreezeError(Exception):
    """Base of all errors raised by adafreeze.

    Args:
        fact: what is wrong, with the names and numbers involved.
        fix: what to change, where possible as a line to paste.

    >>> print(AdafreezeError("The model has no adapters.", fix="get_peft_model(...)"))
    The model has no adapters.
      Fix: get_peft_model(...)
    """

    def __init__(self, fact: str, *, fix: str) -> None:
        super().__init__(fact)
        self.fact, self.fix = fact, fix

    def __str__(self) -> str:
        return f"{self.fact}\n  Fix: {self.fix}"

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.fact, self.fix), vars(self)


def _rebuild(kind: type[AdafreezeError], fact: str, fix: str) -> AdafreezeError:
    return kind(fact, fix=fix)


class ConfigError(AdafreezeError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class ModelError(AdafreezeError, ValueError):
    """The model or its adapters cannot be frozen selectively."""


class ProbeError(AdafreezeError, ValueError):
    """The probe samples cannot be used to measure scores."""


class DataError(AdafreezeError, ValueError):
    """A data file or column cannot be used for the task."""


class RunError(AdafreezeError, RuntimeError):
    """A run cannot start, or found a state that would corrupt it."""


class AdafreezeWarning(UserWarning):
    """Something that costs the user memory, time or accuracy, but does not stop the run."""


def warn(fact: str, *, fix: str, stacklevel: int = 3) -> None:
    """Issue an ``AdafreezeWarning`` in the same two parts as an error."""
    warnings.warn(str(AdafreezeError(fact, fix=fix)), AdafreezeWarning, stacklevel=stacklevel)


class WarnOnce:
    """Warns once for each key."""

    def __init__(self) -> None:
        self._keys: set[str] = set()

    def __call__(self, key: str, fact: str, *, fix: str) -> bool:
        """Warn, unless that key was used before; True if it warned."""
        first = key not in self._keys
        self._keys.add(key)
        if first:
            warn(fact, fix=fix, stacklevel=5)
        return first


def error_line(error: BaseException) -> str:
    """``"ValueError: the first line of its message"``, of an error from other code."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def note(text: str) -> None:
    """Log one info line on the logger ``adafreeze``, which writes to stderr if no handler is set up.

    Under torchrun or accelerate only rank 0 logs.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    logger = logging.getLogger("adafreeze")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[adafreeze] %(message)s"))
        logger.addHandler(handler)
    logger.info(text)
