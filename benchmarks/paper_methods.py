"""SAFE with other settings, as methods for ``adafreeze compare``: the grid from which the defaults were chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods import METHODS

Safe = METHODS["safe"]


class Share20(Safe):
    """Freeze up to 20 % of the total score."""

    name = "share-0.2"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.2}


class Share40(Safe):
    """Freeze up to 40 % of the total score."""

    name = "share-0.4"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.4}


class Share60(Safe):
    """Freeze up to 60 % of the total score."""

    name = "share-0.6"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.6}


class Share80(Safe):
    """Freeze up to 80 % of the total score."""

    name = "share-0.8"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.8}


class Warmup10(Safe):
    """Freeze from a tenth of the run on, to the end at three tenths."""

    name = "warmup-0.1"
    fields: ClassVar[dict[str, Any]] = {"warmup": 0.1, "ramp_end": 0.3}


class Warmup20(Safe):
    """Freeze from a fifth of the run on, to the end at two fifths."""

    name = "warmup-0.2"
    fields: ClassVar[dict[str, Any]] = {"warmup": 0.2, "ramp_end": 0.4}


class Warmup30(Safe):
    """Freeze from three tenths of the run on, to the end at the half."""

    name = "warmup-0.3"
    fields: ClassVar[dict[str, Any]] = {"warmup": 0.3, "ramp_end": 0.5}
