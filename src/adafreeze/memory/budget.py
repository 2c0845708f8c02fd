"""Budget: keeps every training step under a number of bytes, by activation checkpointing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..costs.devices import memory_limit
from ..costs.memory import bytes_of
from ..errors import RunError, error_line, note, warn
from ..freeze import Prefix
from ..freeze.prefix import autocast_now
from ..journal import Journal
from ..measure import Probe
from ..model.blocks import device_of
from ..model.flow import tensors_in
from ..model.offloaded import Offloaded
from ..model.patches import forward_pre_hook
from ..sizes import readable
from .checkpointing import CAN_BE_SELECTIVE, NOTHING, Block, Checkpointing, Recomputed, least_recomputed
from .optimizer import optimizer_bytes
from .rehearsal import Rehearsal, failing_module, largest_that_fits, rehearse

__all__ = ["Budget"]

# Round lengths up to 8 buckets per octave, so that few kinds of batches are rehearsed.
LENGTHS_PER_OCTAVE = 8

# Selective checkpointing is left out where it frees less of what the blocks keep: each choice takes more rehearsals.
LEAST_FREED = 0.1


@dataclass(frozen=True)
class Choice:
    """What one kind of batch recomputes; bytes of the step with that, with nothing recomputed, and at least."""

    recomputed: Recomputed
    peak: int
    plain_peak: int
    held: int


class Budget:
    """Keeps every training step of a model under a number of bytes, by recomputing as little as possible.

    Each kind of batch (its shapes, lengths rounded up) is rehearsed on fake tensors before its first step, at the
    present prefix. For each block it is chosen what is kept: all, results of products and attention, or the input. The
    choice is made by counting weights, buffers, optimizer state, gradients, saved
    bytes, transients and ``beside``, so the choice is the same in every run. A deeper prefix needs fewer of them.

    On CUDA the allocator's peak shows what counting cannot see, such as workspaces of kernels: the most that a step
    held beyond its plan is added to all plans. Never corrected downward: other code may reset the peak statistics.

    Args:
        limit: ``memory_budget`` of SafeConfig.
        probe: its longest sample, ``rows`` times, is the micro-batch of ``check``.
        rows: samples per micro-batch.
        prefix: its blocks save nothing.
        optimizer: its state counts; None: as AdamW's.
        journal: of the run.

    Attributes:
        limit: bytes.
        excess: the most bytes that a step held beyond its plan.
        beside: bytes on the device outside the step: DDP's buckets, and on the CPU the scorer and the cache in memory.

    Raises:
        ConfigError: the budget is larger than the device.
    """

    def __init__(
        self,
        limit: int | float | str,
        probe: Probe,
        rows: int,
        prefix: Prefix,
        optimizer: Any,
        journal: Journal,
    ) -> None:
        self.probe, self.rows, self.prefix, self.journal = probe, rows, prefix, journal
        self.model = model = prefix.model
        self.optimizer = optimizer or "adamw_torch"
        self.device = device_of(model)
        self.beside = 0
        weights = bytes_of((*model.parameters(), *model.buffers()))  # before any leave the device
        self.limit = memory_limit(limit, self.device, weights)
        self._auto = limit == "auto"
        self.excess = 0
        self.measured_peak: Callable[[], int] | None = None
        if self.device.type == "cuda":
            self.measured_peak, self._highest = self._new_peak, torch.cuda.max_memory_allocated(self.device)
        self.checkpointing = Checkpointing(model, prefix.stacks)
        self._choices: dict[Any, Choice] = {}
        self._rehearsed: dict[Any, Rehearsal] = {}
        self._current: Choice | None = None
        self._undisturbed = False
        self._failed = False
        self._shares: dict[Block, tuple[float, float]] | None = None if CAN_BE_SELECTIVE else {}
        self._warned = False
        self.checkpointing.install()
        # Before all other hooks, so that none of them counts the rehearsal as part of the step.
        self._hook = forward_pre_hook(model, self._before, prepend=True)

    @property
    def state_key(self) -> tuple[int, ...]:
        """Changes when the choice for a batch may: with the excess, and with ``beside`` in 64ths of the limit."""
        return self.excess, 64 * self.beside // self.limit

    def logs(self) -> dict[str, float]:
        """Blocks that the last step recomputed, whole and selectively, and its planned peak."""
        now = self.checkpointing.recomputed
        logs: dict[str, float] = {
            "safe/recomputed_blocks": len(now.full),
            "safe/selective_blocks": len(now.selective),
        }
        if self._current is not None:
            logs["safe/planned_peak_mib"] = round(self._current.peak / 2**20, 3)
        return logs

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of it, as plain JSON values."""
        choices = [
            [kind, sorted(one.recomputed.full), sorted(one.recomputed.selective), one.peak, one.plain_peak, one.held]
            for kind, one in self._choices.items()
        ]
        return {"limit": self.limit, "excess": self.excess, "choices": choices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was written; ``"auto"`` keeps its limit, unless less is free now."""
        self.excess, limit = state["excess"], state["limit"]
        if self._auto:
            self.limit = min(self.limit, limit)
        self._choices.clear()
        for kind, full, selective, peak, *others in state["choices"]:
            if limit == self.limit or peak <= self.limit < limit:  # with more room fewer blocks would be chosen
                recomputed = Recomputed(*(frozenset(map(tuple, blocks)) for blocks in (full, selective)))
                self._choices[_tupled(kind)] = Choice(recomputed, peak, *others)

    def close(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        self.checkpointing.restore()

    def check(self) -> None:
        """Log what the budget costs.

        Raises:
            RunError: not even checkpointing all blocks meets the budget; names the micro-batch that fits.
        """
        rows = self.rows
        choice = self._choice((), self._longest())
        if choice is None:
            return
        if choice.peak <= self.limit:
            full, selective = len(choice.recomputed.full), len(choice.recomputed.selective)
            note(
                f"Memory budget {readable(self.limit)}: a step on {rows} samples holds {readable(choice.peak)} with "
                f"{full} of {len(self.checkpointing.every)} blocks checkpointed"
                + (f", {selective} selectively" if selective else "")
                + f" ({readable(choice.plain_peak)} with none)."
            )
            return

        def peak(fewer: int) -> int:
            batch = self._rounded((), self.probe.micro_batch(fewer, self.device))
            return self._total(self._rehearse(choice.recomputed, *batch))

        fits = largest_that_fits(peak, rows, choice.peak, choice.held, self.limit, most=rows)
        part = max((n for n in range(1, fits + 1) if rows % n == 0), default=0)  # keeps the effective batch size
        raise RunError(
            f"The memory budget of {readable(self.limit)} cannot be met: with all blocks checkpointed, a step on "
            f"{rows} samples of the probe's longest length holds {readable(choice.peak)}, {readable(choice.held)} of "
            "it weights, gradients and optimizer state; "
            + (f"a micro-batch of {fits} fits." if fits else f"one sample takes {readable(peak(1))}."),
            fix=f"--per_device_train_batch_size {part} --gradient_accumulation_steps {rows // part}"
            if fits
            else f'SafeConfig(memory_budget="{-(-choice.peak // 2**20)}MiB"), or shorter samples, or a smaller model',
        )

    @property
    def recomputes(self) -> bool:
        """Whether a step on the probe's longest samples recomputes anything."""
        choice = self._choice((), self._longest())
        return choice is not None and choice.recomputed != NOTHING

    def _longest(self) -> dict[str, Any]:
        return self.probe.micro_batch(self.rows, self.device)

    def room(self) -> int | None:
        """Bytes that a step on the probe's longest samples leaves; None if it cannot be rehearsed."""
        choice = self._choice((), self._longest())
        return None if choice is None else max(0, self.limit - choice.peak)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        measured = self.measured_peak() if self.measured_peak is not None else 0
        if not model.training or not torch.is_grad_enabled():
            self._undisturbed = False  # the next peak includes this pass
            return
        if self._current is not None and self._undisturbed and measured:
            self._correct(self._current, measured)
        elif self._failed and self._undisturbed and measured > self.limit:
            self._warn_above("A step", measured)
        self._undisturbed = True
        self._current = self._choice(args, kwargs, warns=True)
        self.checkpointing.recomputed = self._current.recomputed if self._current else self.checkpointing.all_full

    def _setting(self) -> tuple[str, int, int]:
        """What a step depends on beside its inputs and the prefix.

        Autocast's data type, elements that train, and elements of weights that are on the device.
        """
        trains = here = 0
        for parameter in self.model.parameters():
            trains += parameter.numel() if parameter.requires_grad else 0
            here += 0 if isinstance(parameter, Offloaded) else parameter.numel()
        return str(autocast_now(self.device)), trains, here

    def _choice(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, warns: bool = False) -> Choice | None:
        """The choice for batches of this kind; None if they cannot be rehearsed."""
        if self._failed:
            return None
        args, kwargs = self._rounded(args, kwargs)
        shapes = _shapes((args, kwargs))
        kind = shapes, tuple(self.prefix.depths.values()), self.beside, self._setting()
        if kind not in self._choices:
            # A larger step that fits with nothing recomputed decides this one.
            for other, choice in self._choices.items():
                if choice.recomputed == NOTHING and choice.peak <= self.limit and _holds_more(other, kind):
                    return choice
            try:
                self._choices[kind] = self._choose(args, kwargs)
            except Exception as error:  # from the model's own code, on fake tensors
                self._give_up(error)
                return None
            choice = self._choices[kind]
            self.journal.write(
                "recompute",
                limit=self.limit,
                shapes=[shape for shape, _ in shapes],
                prefixes=dict(self.prefix.depths),
                blocks=_names(choice.recomputed.full),
                selective=_names(choice.recomputed.selective),
                peak=choice.peak,
                plain_peak=choice.plain_peak,
            )
            if choice.peak > self.limit and warns:  # check() raises
                what = f"A batch ({', '.join(str(shape) for shape, _ in shapes[:2])}), longer than all probe samples,"
                self._warn_above(what, choice.peak)
        return self._choices[kind]

    def _choose(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Choice:
        kind = _shapes((args, kwargs)), tuple(self.prefix.depths.values()), self._setting()

        def rehearsed(recomputed: Recomputed) -> Rehearsal:
            if (kind, recomputed) not in self._rehearsed:
                self._rehearsed[kind, recomputed] = self._rehearse(recomputed, args, kwargs)
            return self._rehearsed[kind, recomputed]

        plain, chosen = rehearsed(NOTHING), NOTHING
        if self._total(plain) > self.limit:
            whole = self._parts(plain)
            between = self._freed_selectively(whole, plain, rehearsed)
            found = least_recomputed(whole, between, lambda one: self._total(rehearsed(one)), self.limit)
            useful = Recomputed(full=frozenset(name for name, (saved, _) in whole.items() if saved > 0))
            # If not even all of them suffice, what holds the least.
            chosen = found or min((NOTHING, useful), key=lambda chosen: rehearsed(chosen).peak)
        state, _ = self._optimizer_bytes()
        held = plain.resident + plain.gradients + state + self.beside
        return Choice(chosen, self._total(rehearsed(chosen)), self._total(plain), held)

    def _parts(self, step: Rehearsal) -> dict[Block, tuple[int, int]]:
        """Saved bytes and FLOPs of the forward pass of each candidate."""
        parts = dict(zip(self.checkpointing.every, step.parts, strict=True))
        return {name: parts[name] for name in self.checkpointing.blocks}

    def _freed_selectively(
        self, whole: Mapping[Block, tuple[int, int]], plain: Rehearsal, rehearsed: Callable[[Recomputed], Rehearsal]
    ) -> dict[Block, tuple[int, int]]:
        """Bytes that selective checkpointing of each candidate frees, and FLOPs; empty if it is not worth its while.

        Both as shares of the block's, known from the first kind of batch that needs them.
        """
        if self._shares is None:
            try:
                step = rehearsed(self.checkpointing.all_selective)
            except Exception as error:  # such as a product that the model's own code changes in place
                self._shares = {}
                self.journal.write("budget_full_only", error=f"{type(error).__name__}: {error}")
                note(
                    f"The memory budget recomputes whole blocks only: {failing_module(error)} does not run under "
                    f"selective checkpointing ({error_line(error)})."
                )
                return {}
            saved, flops = (sum(one[index] for one in whole.values()) for index in (0, 1))
            freed = {name: whole[name][0] - kept for name, (kept, _) in self._parts(step).items()}
            worth = sum(freed.values()) > LEAST_FREED * saved
            again = (step.flops - plain.flops) / max(1, flops)
            self._shares = {name: (freed[name] / max(1, whole[name][0]), again) for name in freed if worth}
        return {
            name: (round(self._shares[name][0] * saved), round(self._shares[name][1] * flops))
            for name, (saved, flops) in whole.items()
            if name in self._shares
        }

    def _rehearse(self, recomputed: Recomputed, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rehearsal:
        before, self.checkpointing.recomputed = self.checkpointing.recomputed, recomputed
        places = {f"_{index}": value for index, value in enumerate(args)}
        try:
            return rehearse(
                self.model,
                {**places, **kwargs},
                forward=lambda **all: self.prefix.rehearse(*(all.pop(place) for place in places), **all),
                target=self.device.type,
                parts=[*self.checkpointing.every.values()],
            )
        finally:
            self.checkpointing.recomputed = before

    def _optimizer_bytes(self) -> tuple[int, int]:
        return optimizer_bytes(self.optimizer, [p for p in self.model.parameters() if p.requires_grad])

    def _total(self, step: Rehearsal) -> int:
        """Peak bytes of a whole optimizer step: of its passes, or of the optimizer's own work if that is more."""
        state, temporary = self._optimizer_bytes()
        held = step.resident + step.gradients
        # step.inputs: the next batch may be on the device already.
        return max(step.peak + self.excess, held + temporary) + state + step.inputs + self.beside

    def _rounded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The same inputs, their length rounded up."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return args, kwargs
        length = ids.shape[1]
        step = max(8, 2 ** (length.bit_length() - 1) // LENGTHS_PER_OCTAVE)
        most = getattr(getattr(self.model, "config", None), "max_position_embeddings", None) or length
        rounded = max(length, min(-(-length // step) * step, most))

        def longer(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length:
                return value.new_empty((1, 1)).expand(value.shape[0], rounded)
            return value

        return tuple(map(longer, args)), {name: longer(value) for name, value in kwargs.items()}

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self.journal.write("budget_unknown", error=f"{type(error).__name__}: {error}")
        warn(
            f"The memory budget cannot be planned: {failing_module(error)} does not run on fake tensors "
            f"({error_line(error)}).",
            fix="All blocks are checkpointed now, which holds the least; watch the peak of the first steps.",
        )

    def _warn_above(self, what: str, nbytes: int) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"{what} holds {readable(nbytes)} with all blocks checkpointed, more than the memory budget of "
                f"{readable(self.limit)}.",
                fix="Use a smaller --per_device_train_batch_size or --max_seq_length; training continues.",
            )

    def _new_peak(self) -> int:
        """The allocator's peak if it changed since the last call, else 0: a lower one stays hidden behind it.

        Resetting it for each step would show more, but the statistics are the user's.
        """
        before, self._highest = self._highest, torch.cuda.max_memory_allocated(self.device)
        return self._highest if self._highest != before else 0

    def _correct(self, choice: Choice, measured: int) -> None:
        if not getattr(self.optimizer, "state", None):  # before its first step the optimizer has none
            return
        beyond = measured - choice.peak
        if beyond > 0:
            self.excess += beyond
            self._choices.clear()
            self.journal.write("budget_corrected", excess=self.excess, measured=measured, planned=choice.peak)


def _names(blocks: Iterable[Block]) -> list[str]:
    return sorted(f"{path}.{index}" for path, index in blocks)


def _shapes(value: Any) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors_in(value))


def _tupled(kind: Any) -> Any:
    """A kind of batch, from its JSON form."""
    return tuple(map(_tupled, kind)) if isinstance(kind, (list, tuple)) else kind


def _holds_more(one: Any, other: Any) -> bool:
    """Whether a step of kind ``one`` holds at least as much as one of kind ``other``."""
    (shapes, depths, beside, setting), (others, other_depths, other_beside, other_setting) = one, other

    def covers(large: tuple[int, ...], small: tuple[int, ...]) -> bool:
        return len(large) == len(small) and all(map(operator.ge, large, small))

    return (
        [dtype for _, dtype in shapes] == [dtype for _, dtype in others]
        and setting[0] == other_setting[0]
        and all(map(operator.ge, setting[1:], other_setting[1:]))
        and beside >= other_beside
        and covers(other_depths, depths)
        and all(covers(shape, smaller) for (shape, _), (smaller, _) in zip(shapes, others, strict=True))
    )
