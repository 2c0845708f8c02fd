"""Errors and warnings: each says the fact, its cause, the fix as something to type, and where it is listed."""

from __future__ import annotations

import logging
import os
import sys
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


HELP = "docs/messages.md"  # of this repository; docs/messages.py writes it from all that the code can say


def _compose(fact: str, cause: str, fix: str, place: str | None) -> str:
    more = f"\n  More:  {HELP}#{place}" if place else ""
    return f"{fact}\n  Cause: {cause}\n  Fix:   {fix}{more}"


def _place() -> str | None:
    """Who speaks, as ``module.function`` below adafreeze: the name of the entry in HELP. None of others' code."""
    frame = sys._getframe(1)
    # A comprehension or a lambda speaks for the function that holds it, and the guard for whoever warns through it.
    while frame.f_back and (
        frame.f_globals.get("__name__") == __name__
        or frame.f_code.co_name.startswith("<")
        or frame.f_code.co_name == "warn_once"
    ):
        frame = frame.f_back
    root, _, module = frame.f_globals.get("__name__", "").partition(".")
    return f"{module}.{frame.f_code.co_name}" if root == "adafreeze" and module else None


class AdafreezeError(Exception):
    """Base of all errors raised by adafreeze.

    Args:
        fact: what was found, with the names and numbers involved.
        cause: why that cannot work.
        fix: what to change, where possible as a line to paste.

    The message ends with its entry in the list of all messages, if adafreeze's own code raised it.

    >>> print(AdafreezeError("The model has no adapters.", cause="Nothing trains.", fix="get_peft_model(...)"))
    The model has no adapters.
      Cause: Nothing trains.
      Fix:   get_peft_model(...)
    """

    def __init__(self, fact: str, *, cause: str, fix: str) -> None:
        super().__init__(fact)
        self.fact, self.cause, self.fix = fact, cause, fix
        self.place = _place()

    def __str__(self) -> str:
        return _compose(self.fact, self.cause, self.fix, self.place)

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.fact, self.cause, self.fix), vars(self)


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
    """Issue an ``AdafreezeWarning`` in the same three parts as an error."""
    warnings.warn(_compose(fact, cause, fix, _place()), AdafreezeWarning, stacklevel=stacklevel)


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
