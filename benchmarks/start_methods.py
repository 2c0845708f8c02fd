"""Settings that start deeper than the default, as methods for ``adafreeze compare``."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods.safe import Safe


class Half(Safe):
    """Half of the blocks frozen before step 0; the schedule of the defaults."""

    name = "half"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 0.5}


class HalfSooner(Safe):
    """Half of the blocks frozen before step 0; freezes by score between 0.3 and 0.5 of the run."""

    name = "half-sooner"
    fields: ClassVar[dict[str, Any]] = {"freeze_at_start": 0.5, "warmup": 0.3, "ramp_end": 0.5}


class HalfBottomUp(Safe):
    """The same without scores: five sixths of the blocks frozen along the ramp."""

    name = "half-bottom-up"
    fields: ClassVar[dict[str, Any]] = {
        **HalfSooner.fields,
        "policy": "bottom_up",
        "freeze_share": 0.84,
        "score": "random",
    }
