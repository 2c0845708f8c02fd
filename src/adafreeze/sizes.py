"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re
from typing import Any

from .errors import ConfigError

__all__ = ["parse_size", "readable"]

_UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}


def parse_size(name: str, value: Any, example: str = "4GiB", also: str = "") -> int:
    """Bytes from a whole number, or from a text with an optional unit.

    By hand: ``accelerate.utils.convert_file_size_to_int`` reads no TiB and no plain digits, and "4gb" as gigabits.

    Args:
        name: of the setting, for the error.
        value: as given by the user.
        example: a good value, for the error.
        also: other values that the setting accepts, for the error.

    Raises:
        ConfigError: it is not a size of at least one byte.

    >>> parse_size("size", "1.5KiB"), parse_size("size", "2 GB"), parse_size("size", 7)
    (1536, 2000000000, 7)
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    size = float(found[1]) * _UNITS.get(found[2].lower(), 0) if found is not None else 0.0
    if not 1 <= size < float("inf"):
        setting, _, field = name.rpartition(".")
        raise ConfigError(
            f"{name} is {value!r}; expected bytes, or a text in KiB, MiB, GiB, TiB, KB, MB, GB or TB{also}.",
            fix=f"{setting}({field}={example!r})" if setting else f"{name} {example}",
        )
    return int(size)


def readable(nbytes: float) -> str:
    """Bytes in the largest fitting unit, with about three digits.

    >>> readable(6 * 2**30), readable(300.5 * 2**20), readable(2000)
    ('6.00 GiB', '300 MiB', '1.95 KiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= size:
            number = nbytes / size
            return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"
    return f"{nbytes:.0f} B"
