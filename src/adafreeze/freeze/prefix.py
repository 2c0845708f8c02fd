"""The frozen prefix runs without a graph, or not at all: this is what turns a freeze into bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.blocks import Stack, StopForward, held_attribute, hidden_states, patched_forward, without_cache
from ..model.flow import Flow, tensors_in

__all__ = ["Prefix", "Start", "autocast_now"]


@dataclass
class Start:
    """Where a forward pass begins in one stack: above ``depth`` blocks, whose output was ``states``."""

    depth: int
    states: Tensor


@dataclass
class _Pass:
    """One forward pass of the model.

    ``recorded`` is None in a training pass; a nested one puts the hidden states at the boundaries there, and ends.
    ``handed_on`` is what blocks return beside their hidden states (T5's position bias), by stack.
    """

    starts: Mapping[str, Start] = field(default_factory=dict)
    recorded: dict[str, Tensor] | None = None
    handed_on: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)


class Prefix:
    """Runs the prefix of each stack under ``torch.no_grad()`` and without dropout, in training only.

    The prefix of a stack is the longest run of its blocks from the bottom that holds no live parameter, provided
    nothing upstream is live (trainable embeddings; an encoder that a decoder attends to). Its output for a
    sample is then a constant but for dropout, and dropout in it regularises nothing that still trains.

    Whoever installed hooks that make embeddings require grad, no graph is built below the boundary. Evaluation,
    generation and passes without gradients run the model's own code.

    Args:
        model: the module that the host calls; its ``training`` flag decides.
        stacks: in data-flow order.
        flows: what stands upstream of each stack.
        keep_dropout: leave dropout in the prefix on.

    Attributes:
        look_up: asked before each training pass of the model, with its arguments, where to start: stack path to
            ``Start``. Stacks that it leaves out run their prefix.
        watch_boundary: called with a stack's path and the hidden states at its boundary in a training pass.
        autocast: (dtype or None) that was in force in the last training pass; "unknown" before the first.
    """

    def __init__(
        self, model: nn.Module, stacks: list[Stack], flows: Mapping[str, Flow], *, keep_dropout: bool = False
    ) -> None:
        self.model = model
        self.stacks = stacks
        self.flows = flows
        self.keep_dropout = keep_dropout
        self.depths: dict[str, int] = {stack.path: 0 for stack in stacks}
        self.look_up: Callable[[tuple[Any, ...], dict[str, Any]], Mapping[str, Start]] | None = None
        self.watch_boundary: Callable[[str, Tensor], None] | None = None
        self.autocast: torch.dtype | str | None = "unknown"
        self._undo = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._entered: set[str] = set()
        self._pass = _Pass()
        self._hands_on: dict[str, tuple[Any, ...] | bool | None] = {}

    def update(self) -> dict[str, int]:
        """Find the prefix as the parameters' flags are now, and make it so. Returns blocks by stack path."""
        depths = {stack.path: self._depth(stack) for stack in self.stacks}
        if depths != self.depths:
            self._undo.close()
            self.depths = depths
            if any(depths.values()):
                self._install()
        return depths

    def restore(self) -> None:
        """Leave every module, hook and flag as it was before."""
        self._undo.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.depths = {stack.path: 0 for stack in self.stacks}

    def _depth(self, stack: Stack) -> int:
        if self.flows[stack.path].live:
            return 0
        for index, block in enumerate(stack.blocks):
            if any(parameter.requires_grad for parameter in block.parameters()):
                return index
        return len(stack)

    def _install(self) -> None:
        enter = self._undo.enter_context
        if not self._handles:
            # They stay while the prefix changes, which it may from a hook of the same pass: torch has listed them then.
            # Whoever calls an inner module between two passes of the model finds nothing to start from.
            self._handles = [
                self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
                self.model.register_forward_hook(self._end, always_call=True),
            ]
        for stack in self.stacks:
            depth = self.depths[stack.path]
            for index, block in enumerate(stack.blocks[:depth]):
                if not self.keep_dropout:
                    enter(_held_in_evaluation(block, self.model))
                enter(held_attribute(block, "gradient_checkpointing", False))
                enter(patched_forward(block, self._graphless(stack, index, block)))
            if depth and not self.keep_dropout:
                for dropout in self.flows[stack.path].dropouts:
                    enter(patched_forward(dropout, self._until_entered(stack, dropout)))
        if all(self.depths.values()):
            # Where one stack still starts from the embeddings, reentrant checkpointing may need their gradient.
            for embeddings in _input_embeddings(self.model):
                handle = embeddings.register_forward_hook(self._detached)
                self._undo.callback(handle.remove)

    def compute(self, inputs: Mapping[str, Any], starts: Mapping[str, Start]) -> dict[str, Tensor] | None:
        """Hidden states at the boundary of every stack that has a prefix, by path: a pass nested in a training pass.

        The model runs on ``inputs`` as in training, without a graph, from ``starts`` where given, and is left at
        the last boundary. None if it did not come to all of them.
        """
        with self._nested(_Pass(starts, recorded={})) as this, torch.no_grad(), suppress(StopForward):
            self.model.forward(**inputs)  # its hooks are for the outer pass
        return this.recorded if self._all_recorded(this.recorded) else None

    def rehearse(self, *args: Any, **inputs: Any) -> Any:
        """The model's forward pass as in training, the prefix computed, noticed by nobody."""
        watch, autocast = self.watch_boundary, self.autocast
        self.watch_boundary = None
        try:
            with self._nested(_Pass()):
                return self.model.forward(*args, **inputs)
        finally:
            self.watch_boundary, self.autocast = watch, autocast

    @contextmanager
    def _nested(self, this: _Pass) -> Iterator[_Pass]:
        """A pass inside a training pass of the model, which goes on afterwards as if there had been none."""
        outer, entered = self._pass, self._entered
        self._pass, self._entered = this, set()
        try:
            with torch.compiler.set_stance("force_eager"):  # it is no pass that a compiler would see again
                yield this
        finally:
            self._pass, self._entered = outer, entered

    @torch.compiler.disable  # looking up is Python through and through
    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass = _Pass()
        if self.look_up is not None and self._active():
            self._pass = _Pass(self.look_up(args, kwargs))
        self._entered.clear()

    @torch.compiler.disable
    def _end(self, *_: Any) -> None:
        self._pass = _Pass()

    def _active(self) -> bool:
        return self.model.training and (torch.is_grad_enabled() or self._pass.recorded is not None)

    def _all_recorded(self, recorded: dict[str, Tensor] | None) -> bool:
        return recorded is not None and all(path in recorded for path, depth in self.depths.items() if depth)

    def _graphless(self, stack: Stack, index: int, block: nn.Module) -> Callable[..., Any]:
        original = block.forward
        path, depth = stack.path, self.depths[stack.path]
        at_boundary = index + 1 == depth
        above = stack.blocks[depth] if depth < len(stack) else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._entered.add(path)
            if not self._active():
                return original(*args, **kwargs)
            if index == 0:
                self._notice_autocast(block)
            this = self._pass
            start = this.starts.get(path)
            args, kwargs = without_cache(
                args, kwargs, filled=False
            )  # or it holds keys and values to the end of the pass
            with torch.no_grad():
                if start is not None and index < start.depth:
                    output = self._skipped(stack, index, start, lambda: original(*args, **kwargs))
                else:
                    output = original(*args, **kwargs)
                    if index == 0:
                        self._hands_on[path] = _beside(output)
            if at_boundary:
                hidden = hidden_states(output)
                if this.recorded is not None:
                    this.recorded[path] = hidden
                    if self._all_recorded(this.recorded):
                        raise StopForward
                    return output
                if above is not None and _checkpoints(above):
                    # Reentrant checkpointing gives no gradient to parameters unless an input requires one.
                    hidden.requires_grad_()
                if self.watch_boundary is not None:
                    self.watch_boundary(path, hidden)
            return output

        return forward

    def _skipped(self, stack: Stack, index: int, start: Start, run: Callable[[], Any]) -> Any:
        """What a skipped block returns: the known hidden states, with what block 0 hands on beside them."""
        path = stack.path
        if index == 0:
            beside = self._hands_on.get(path, True)
            # Tensors that block 0 makes for all others (T5's position bias) depend on the batch's shape: it runs.
            self._pass.handed_on[path] = _after_first(run()) if beside is True else beside  # type: ignore[assignment]
        handed_on = self._pass.handed_on[path]
        return start.states if handed_on is None else (start.states, *handed_on)

    def _notice_autocast(self, block: nn.Module) -> None:
        autocast = autocast_now(next(block.parameters()).device)
        if autocast != self.autocast:
            self.autocast = autocast
            if self._pass.recorded is None:
                self._pass.starts = {}  # they were made under another: this pass computes its own

    def _until_entered(self, stack: Stack, dropout: nn.Module) -> Callable[..., Any]:
        original = dropout.forward

        def forward(x: Tensor) -> Tensor:
            # T5 uses one module before its blocks and after them: only what stands before them is off.
            return original(x) if stack.path in self._entered or not self._active() else x

        return forward

    def _detached(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) and self._active() else None


def autocast_now(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to products on ``device`` here; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _after_first(output: Any) -> tuple[Any, ...] | None:
    return None if isinstance(output, Tensor) else tuple(output[1:])


def _beside(output: Any) -> tuple[Any, ...] | bool | None:
    """What a block returns beside its hidden states: None where it returns them alone; True if it holds tensors."""
    rest = _after_first(output)
    return True if any(True for _ in tensors_in(rest)) else rest


def _checkpoints(block: nn.Module) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False))


@contextmanager
def _held_in_evaluation(block: nn.Module, model: nn.Module) -> Iterator[None]:
    """Keep ``block`` in evaluation mode through ``model.train()``, which hosts call before each micro-step."""
    flags = [(module, module.training) for module in block.modules()]
    was = model.training
    block.eval()
    block.train = lambda mode=True: block  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.train
        for module, flag in flags:
            module.training = flag if model.training == was else model.training


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    return [found] if isinstance(found, nn.Module) else []
