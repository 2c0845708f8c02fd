"""Errors and warnings: each says the fact, its cause, and the fix as something that can be typed."""

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
    "note",
    "warn",
]


def _compose(fact: str, cause: str, fix: str) -> str:
    return f"{fact}\n  Cause: {cause}\n  Fix:   {fix}"


class AdafreezeError(Exception):
    """Base of all errors raised by adafreeze.

    Args:
        fact: what was found, with the names and numbers involved.
        cause: why that cannot work.
        fix: what to change, where possible as a line to paste.

    >>> print(AdafreezeError("The model has no adapters.", cause="Nothing trains.", fix="get_peft_model(...)"))
    The model has no adapters.
      Cause: Nothing trains.
      Fix:   get_peft_model(...)
    """

    def __init__(self, fact: str, *, cause: str, fix: str) -> None:
        super().__init__(_compose(fact, cause, fix))
        self.fact, self.cause, self.fix = fact, cause, fix

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.fact, self.cause, self.fix)


def _rebuild(kind: type[AdafreezeError], fact: str, cause: str, fix: str) -> AdafreezeError:
    return kind(fact, cause=cause, fix=fix)


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


def warn(fact: str, *, cause: str, fix: str, stacklevel: int = 3) -> None:
    """Issue an :class:`AdafreezeWarning` in the same three parts as an error."""
    warnings.warn(_compose(fact, cause, fix), AdafreezeWarning, stacklevel=stacklevel)


def note(text: str) -> None:
    """Say one line that costs the user nothing: through the logger ``adafreeze``, on stderr unless set up otherwise.

    Of several processes, as torchrun and accelerate number them, the first one speaks.
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
