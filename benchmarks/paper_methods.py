"""SAFE with other settings, as methods for ``adafreeze compare``: the grid from which the defaults were chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from adafreeze.methods import METHODS, Method

SHARES = (0.3, 0.45, 0.6)
WARMUPS = (0.1, 0.2, 0.3)  # the ramp ends a fifth of the run later

GRID: dict[str, type[Method]] = {
    f"Share{round(100 * share)}Warmup{round(100 * warmup)}": type(
        "Variant",
        (METHODS["safe"],),
        {
            "__doc__": f"Freeze up to {share:.0%} of the total score, from {warmup:.0%} of the run on.",
            "name": f"share-{share:g}-warmup-{warmup:g}",
            "fields": {"freeze_share": share, "warmup": warmup, "ramp_end": round(warmup + 0.2, 2)},
        },
    )
    for share in SHARES
    for warmup in WARMUPS
}
globals().update(GRID)


class Dropout(METHODS["safe"]):  # type: ignore[misc,name-defined]
    """The defaults, with the model's dropout on in the frozen prefix, and so without the cache."""

    name = "prefix-dropout"
    fields: ClassVar[dict[str, Any]] = {"prefix_dropout": True, "cache": "off", "cache_dir": None}
