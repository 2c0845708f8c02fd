"""SAFE with other settings, as methods for ``adafreeze compare``: the grid from which the defaults were chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods.safe import Safe

# The previous defaults, without freezing at the start. All methods except Half are variations of them.
EARLIER: dict[str, Any] = {"freeze_at_start": 0.0, "warmup": 0.3, "ramp_end": 0.5}


class Earlier(Safe):
    """Nothing frozen at the start; freezes by score between 0.3 and 0.5 of the run."""

    name = "earlier"
    fields: ClassVar[dict[str, Any]] = EARLIER


class Unscaled(Safe):
    """No scaling of the learning rates of live units."""

    name = "unscaled"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "lr_scale": 1.0}


class NoWait(Safe):
    """The warm-up does not wait for the training loss."""

    name = "no-wait"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "wait_for_loss": False}


class Share10(Safe):
    """Freeze at most a tenth of the total score."""

    name = "share-10"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "freeze_share": 0.1}


class Sooner(Safe):
    """Freezes by score between 0.15 and 0.35 of the run, for runs of many epochs."""

    name = "sooner"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "warmup": 0.15, "ramp_end": 0.35}


class Fifth(Safe):
    """Freezes by score between 0.2 and 0.4 of the run."""

    name = "fifth"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "warmup": 0.2, "ramp_end": 0.4}


class Later(Safe):
    """Freezes by score between 0.5 and 0.7 of the run."""

    name = "later"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "warmup": 0.5, "ramp_end": 0.7}


class LongRamp(Safe):
    """The ramp ends at 0.8 of the run, with more measurements."""

    name = "long-ramp"
    fields: ClassVar[dict[str, Any]] = {**EARLIER, "ramp_end": 0.8, "min_measurements": 12}


class Half(Safe):
    """Half of the blocks frozen before step 0 instead of a third."""

    name = "half-at-start"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 0.5}


GRID = (Earlier, Unscaled, NoWait, Share10, Sooner, Fifth, Later, LongRamp, Half)
