"""SAFE with other settings, as methods for ``adafreeze compare``: the grid from which the defaults were chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods.safe import Safe

# The defaults before blocks were frozen at the start, on which the first of these vary.
EARLIER: dict[str, Any] = {"freeze_at_start": 0.0, "warmup": 0.3, "ramp_end": 0.5}


class Earlier(Safe):
    """Nothing frozen before the scores say so, the default depth between three and five tenths of the run."""

    name = "earlier"
    fields: ClassVar[dict[str, Any]] = EARLIER


class Unscaled(Safe):
    """The learning rates of what still trains stay as they were."""

    name = "unscaled"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "lr_scale": 1.0}


class NoWait(Safe):
    """The warm-up ends at its time, however fast the training loss falls."""

    name = "no-wait"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "wait_for_loss": False}


class Share10(Safe):
    """A tenth of the score."""

    name = "share-10"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "freeze_share": 0.1}


class Sooner(Safe):
    """The default depth in half of the time: for runs of many epochs."""

    name = "sooner"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "warmup": 0.15, "ramp_end": 0.35}


class Fifth(Safe):
    """The default depth between a fifth and two fifths of the run."""

    name = "fifth"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "warmup": 0.2, "ramp_end": 0.4}


class Later(Safe):
    """The default depth from the middle of the run on: for what still learns fast at three tenths."""

    name = "later"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "warmup": 0.5, "ramp_end": 0.7}


class LongRamp(Safe):
    """The last tenths of the score freeze only at four fifths of the run."""

    name = "long-ramp"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "ramp_end": 0.8, "min_measurements": 12}


class Half(Safe):
    """Half of the blocks frozen before step 0, not a third."""

    name = "half-at-start"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 0.5}


GRID = (Earlier, Unscaled, NoWait, Share10, Sooner, Fifth, Later, LongRamp, Half)
