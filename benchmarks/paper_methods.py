"""SAFE with other settings, as methods for ``adafreeze compare``: the grid from which the defaults were chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods.safe import Safe


class Unscaled(Safe):
    """The learning rates of what still trains stay as they were."""

    name = "unscaled"
    fields: ClassVar[dict[str, Any]] = {"lr_scale": 1.0}


class NoWait(Safe):
    """The warm-up ends at its time, however fast the training loss falls."""

    name = "no-wait"
    fields: ClassVar[dict[str, Any]] = {"wait_for_loss": False}


class Share10(Safe):
    """A tenth of the score."""

    name = "share-10"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.1}


class Sooner(Safe):
    """The default depth in half of the time: for runs of many epochs."""

    name = "sooner"
    fields: ClassVar[dict[str, Any]] = {"warmup": 0.15, "ramp_end": 0.35}


class Fifth(Safe):
    """The default depth between a fifth and two fifths of the run."""

    name = "fifth"
    fields: ClassVar[dict[str, Any]] = {"warmup": 0.2, "ramp_end": 0.4}


class Later(Safe):
    """The default depth from the middle of the run on: for what still learns fast at three tenths."""

    name = "later"
    fields: ClassVar[dict[str, Any]] = {"warmup": 0.5, "ramp_end": 0.7}


class LongRamp(Safe):
    """The last tenths of the score freeze only at four fifths of the run."""

    name = "long-ramp"
    fields: ClassVar[dict[str, Any]] = {"ramp_end": 0.8, "min_measurements": 12}


class Third(Safe):
    """A third of the blocks frozen before step 0, the default depth from the middle of the run on."""

    name = "third-at-start"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 1 / 3, "warmup": 0.5, "ramp_end": 0.7}


class Half(Safe):
    """Half of the blocks frozen before step 0, the default depth from the middle of the run on."""

    name = "half-at-start"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 0.5, "warmup": 0.5, "ramp_end": 0.7}


GRID = (Unscaled, NoWait, Share10, Sooner, Fifth, Later, LongRamp, Third, Half)
