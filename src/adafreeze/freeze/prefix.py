"""The frozen prefix runs without a graph: this is what turns a freeze into bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import Stack, hidden_states, patched_forward
from ..model.flow import Flow

__all__ = ["Prefix"]


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
    """

    def __init__(self, model: nn.Module, stacks: list[Stack], flows: Mapping[str, Flow]) -> None:
        self.model = model
        self.stacks = stacks
        self.flows = flows
        self.depths: dict[str, int] = {stack.path: 0 for stack in stacks}
        self._undo = ExitStack()
        self._entered: set[str] = set()

    def update(self) -> dict[str, int]:
        """Find the prefix as the parameters' flags are now, and make it so. Returns blocks by stack path."""
        depths = {stack.path: self._depth(stack) for stack in self.stacks}
        if depths != self.depths:
            self.restore()
            self.depths = depths
            if any(depths.values()):
                self._install()
        return depths

    def restore(self) -> None:
        """Leave every module, hook and flag as it was before."""
        self._undo.close()
        self._undo = ExitStack()
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
        self._entered.clear()
        forget = self.model.register_forward_pre_hook(lambda *_: self._entered.clear())
        self._undo.callback(forget.remove)
        for stack in self.stacks:
            depth = self.depths[stack.path]
            for index, block in enumerate(stack.blocks[:depth]):
                above = stack.blocks[index + 1] if index + 1 < len(stack) else None
                boundary = above if index + 1 == depth else None
                enter(_held_in_evaluation(block, self.model))
                enter(_attribute(block, "gradient_checkpointing", False))
                enter(patched_forward(block, self._graphless(stack, block, boundary)))
            if depth:
                for dropout in self.flows[stack.path].dropouts:
                    enter(patched_forward(dropout, self._until_entered(stack, dropout)))
        if all(self.depths.values()):
            # Where one stack still starts from the embeddings, reentrant checkpointing may need their gradient.
            for embeddings in _input_embeddings(self.model):
                handle = embeddings.register_forward_hook(self._detached)
                self._undo.callback(handle.remove)

    def _active(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    def _graphless(self, stack: Stack, block: nn.Module, boundary: nn.Module | None) -> Callable[..., Any]:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._entered.add(stack.path)
            if not self._active():
                return original(*args, **kwargs)
            with torch.no_grad():
                output = original(*args, **kwargs)
            if boundary is not None and _checkpoints(boundary):
                # Reentrant checkpointing gives no gradient to parameters unless an input requires one.
                hidden_states(output).requires_grad_()
            return output

        return forward

    def _until_entered(self, stack: Stack, dropout: nn.Module) -> Callable[..., Any]:
        original = dropout.forward

        def forward(x: Tensor) -> Tensor:
            # T5 uses one module before its blocks and after them: only what stands before them is off.
            return original(x) if stack.path in self._entered or not self._active() else x

        return forward

    def _detached(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output.detach() if isinstance(output, Tensor) and self._active() else None


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


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = module.__dict__.get(name, _attribute)
    if before is not _attribute:
        setattr(module, name, value)
    try:
        yield
    finally:
        if before is not _attribute:
            setattr(module, name, before)


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    return [found] if isinstance(found, nn.Module) else []
