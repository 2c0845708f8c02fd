"""SAFE with other settings, as methods for ``adafreeze compare``: the grid from which the defaults were chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods.safe import Safe


class Early(Safe):
    """Two thirds of the blocks at a tenth of the run, and then no more."""

    name = "early"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.45, "warmup": 0.1, "ramp_end": 0.3}


class Late(Safe):
    """As deep as half of the score allows, from three tenths of the run to the half."""

    name = "late"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.6, "warmup": 0.3, "ramp_end": 0.5}


class Gradual(Safe):
    """The same depth, block by block over most of the run."""

    name = "gradual"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.6, "warmup": 0.1, "ramp_end": 0.9}


class GradualDeep(Safe):
    """Deeper: what freezes late loses little, since the learning rate is small by then."""

    name = "gradual-deep"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.8, "warmup": 0.2, "ramp_end": 1.0}


class LateShallow(Safe):
    """Not the last block but one."""

    name = "late-shallow"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.45, "warmup": 0.3, "ramp_end": 0.5}


class LateDropout(Late):
    """With the model's dropout on in the frozen prefix, and so without the cache."""

    name = "late-dropout"
    fields: ClassVar[dict[str, Any]] = {**Late.fields, "prefix_dropout": True, "cache": "off", "cache_dir": None}


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


class Unscaled(Safe):
    """The learning rates of what still trains stay as they were."""

    name = "unscaled"
    fields: ClassVar[dict[str, Any]] = {"lr_scale": 1.0}


class NoWait(Safe):
    """The warm-up ends at its time, however fast the training loss falls."""

    name = "no-wait"
    fields: ClassVar[dict[str, Any]] = {"wait_for_loss": False}


class Share10(Safe):
    """Of the score a tenth."""

    name = "share-10"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.1}


class Share25(Safe):
    """Of the score a quarter."""

    name = "share-25"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.25}


class Share45(Safe):
    """Of the score less than half."""

    name = "share-45"
    fields: ClassVar[dict[str, Any]] = {"freeze_share": 0.45}


class Scale4(Safe):
    """Four times the learning rates, however many have frozen."""

    name = "scale-4"
    fields: ClassVar[dict[str, Any]] = {"lr_scale": 4.0}


class Scale6(Safe):
    """Six times the learning rates."""

    name = "scale-6"
    fields: ClassVar[dict[str, Any]] = {"lr_scale": 6.0}


class TwoLive(Safe):
    """Two blocks always train."""

    name = "two-live"
    fields: ClassVar[dict[str, Any]] = {"min_live_blocks": 2}


class Dropout(Safe):
    """With the model's dropout on in the frozen prefix, and so without the cache."""

    name = "dropout"
    fields: ClassVar[dict[str, Any]] = {"prefix_dropout": True, "cache": "off", "cache_dir": None}


class LongRamp(Safe):
    """The last tenths of the score freeze only at four fifths of the run."""

    name = "long-ramp"
    fields: ClassVar[dict[str, Any]] = {"ramp_end": 0.8, "min_measurements": 12}


GRID = (
    Fifth,
    Scale4,
    Scale6,
    TwoLive,
    Dropout,
    LongRamp,
    NoWait,
    Share10,
    Share25,
    Share45,
    Unscaled,
    Sooner,
    Later,
    Early,
    Late,
    LateShallow,
    Gradual,
    GradualDeep,
    LateDropout,
)
