"""Compares a served pass with the model's own pass, before anything is served and at times after that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..costs.flops import CountFlops
from ..errors import error_line
from ..freeze.prefix import Prefix, Slot, Start, Starts
from ..model.batch import Call
from ..model.rows import Rows
from ..model.traces import traceless
from .compare import Refused, Rounding, real_positions, sampled
from .kinds import PassKind, Sources
from .padding import PaddingCheck

__all__ = ["ShadowCheck"]

# Share of a run's FLOPs that repeated checks may cost.
SPOT_CHECKS = 0.002


@dataclass
class _Shadow:
    """The current training pass, which runs the model's own code, as it would have been served.

    Attributes:
        kind: of the pass.
        sources: of the states that are to be verified.
        starts: of the served pass, until the own pass reaches them.
        rows: of its batch.
        outputs: samples of what the served pass returned; None: only the states are compared.
        zeroed: it had zeros for padding, as a pass from stored states does.
        problem: what differs.
    """

    kind: PassKind
    sources: Sources
    starts: dict[Slot, Start]
    rows: Rows
    outputs: list[tuple[str, Tensor]] | None = None
    zeroed: bool = False
    problem: str | None = None


class ShadowCheck:
    """Shows on the real batch that serving a pass does not change its result.

    The whole pass runs as it would be served, without a graph and without a trace (``Prefix.shadow``). Then the
    training pass itself runs the model's own code, and all that both return is compared. When stored states are first
    used, they are compared with those of the model's own pass. This is repeated at times that follow from counted
    FLOPs. The peak does not rise: when the graph is built, only samples of the served pass's outputs are left.
    """

    def __init__(self, prefix: Prefix, padding: PaddingCheck, rounding: Rounding) -> None:
        self.prefix = prefix
        self.padding = padding
        self.rounding = rounding
        self.current: _Shadow | None = None

    def allows(self, kind: PassKind, sources: Sources, rows: Rows, call: Call, starts: Starts) -> bool:
        """Whether this pass may be served. If that has to be shown first, the pass is checked."""
        due = kind.interval and kind.passes >= kind.interval
        if kind.may_start(sources) and not due:
            kind.passes += 1
            return True
        self.current = _Shadow(kind, sources, dict(starts), rows)
        if "computed" in kind.verified and not due:
            return False  # it was shown that passes may start there; the origin of the states is new
        zeroed = self._zero_padding(kind, rows, starts)
        try:
            with traceless(self.prefix.modules), CountFlops() as count:
                outputs = self.prefix.shadow(call, rows.inputs, {**starts, **zeroed})
        except Exception as error:
            raise Refused(f"a pass that starts above the prefix fails ({error_line(error)})") from error
        self.current.outputs, self.current.zeroed = sampled(outputs, rows), bool(zeroed)
        kind.passes = 0
        if not kind.interval:
            blocks, skipped = sum(map(len, self.prefix.stacks)), sum(self.prefix.depths.values())
            prefix = count.total * skipped / max(1, blocks - skipped)
            # A check costs the shadow and the prefix; a served step costs about three forward passes above the prefix.
            kind.interval = max(1, round((prefix + count.total) / (3 * max(1, count.total) * SPOT_CHECKS)))
        return False

    def _zero_padding(self, kind: PassKind, rows: Rows, starts: Starts) -> dict[Slot, Start]:
        """Those of ``starts`` that have padding, with zeros for it, as stored states have."""
        zeroed = {}
        for slot, start in starts.items():
            layout = kind.layouts[slot]
            if layout.by_position and rows.is_padded(layout.side):
                real = real_positions(rows, layout.side, start.states.device)
                real = real.reshape(*real.shape, *[1] * (start.states.ndim - 2))
                zeroed[slot] = Start(start.depth, start.states.where(real, 0))
        return zeroed

    def compare_states(self, slot: Slot, own: Tensor) -> None:
        """Compare the boundary of a call with its start, which is then freed before a graph is built above it."""
        if (shadow := self.current) is None or (start := shadow.starts.pop(slot, None)) is None:
            return
        served, layout, path = start.states, shadow.kind.layouts[slot], slot[0]
        if own.shape != served.shape:
            if self.padding.keeps_width(layout, shadow.rows, own):
                shadow.problem = f"the states of {path} have shape {tuple(served.shape)} and not {tuple(own.shape)}"
            return
        if layout.by_position and shadow.rows.is_padded(layout.side):
            real = real_positions(shadow.rows, layout.side, own.device)
            own, served = own[real], served[real]
        if not self.rounding.same_states(own, served):
            shadow.problem = f"the states of {path} are not those of the model's own pass"

    def finished(self, output: Any) -> None:
        """Refuse if the outputs of the own pass differ; ``output`` is None if it failed."""
        shadow, self.current = self.current, None
        if shadow is None or output is None:
            return
        if shadow.problem is None and (differs := self._difference(shadow, output)) is not None:
            if shadow.zeroed:
                # The states are right. The next check shows whether padding is all that differs.
                self.padding.take_whole_rows("a pass with zeros for padding gives another result")
                return
            shadow.problem = differs
        if shadow.problem is not None:
            raise Refused(f"a pass that starts above the prefix differs: {shadow.problem}")
        shadow.kind.verify(shadow.sources)
        shadow.kind.verified.add("computed")

    def _difference(self, shadow: _Shadow, output: Any) -> str | None:
        if shadow.outputs is None:
            return None
        own_outputs = sampled(output, shadow.rows)
        if [name for name, _ in own_outputs] != [name for name, _ in shadow.outputs]:
            differing = {name for name, _ in own_outputs} ^ {name for name, _ in shadow.outputs}
            return f"{', '.join(sorted(differing)[:3]) or 'its output'} needs more than the blocks above the prefix"
        for (name, own), (_, served) in zip(own_outputs, shadow.outputs, strict=True):
            if not self.rounding.same_outputs(own, served):
                values = f" ({float(served):.7g} instead of {float(own):.7g})" if own.numel() == 1 else ""
                return f"{name or 'the output'} changes{values}"
        return None
