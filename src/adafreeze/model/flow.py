"""What flows into a stack: the parameters and dropouts below it, read off one traced forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .blocks import Stack, StopForward, patched_forward, quiet

__all__ = ["Flow", "chains_of", "tensors_in", "trace_flow"]


@dataclass
class Flow:
    """What stands upstream of one stack.

    Attributes:
        upstream: parameters outside the stack whose gradient passes through it (trainable embeddings; for a
            decoder, the adapters of the encoder it attends to).
        dropouts: dropout modules outside the blocks that ran before block 0.
        reads: paths of the stacks whose parameters are among ``upstream``.
    """

    upstream: list[nn.Parameter] = field(default_factory=list)
    dropouts: list[nn.Module] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)

    @property
    def live(self) -> bool:
        """Whether something upstream still trains, so that the stack can have no prefix."""
        return any(parameter.requires_grad for parameter in self.upstream)


def trace_flow(model: nn.Module, stacks: list[Stack], batch: dict[str, Any]) -> dict[str, Flow]:
    """Run ``batch`` once with gradients and read what each stack depends on off the autograd graph.

    Exact for any architecture: no list of model families, no guess from names. A hook that makes embeddings
    require grad is a leaf that is no Parameter, and is rightly ignored.
    """
    inside = {id(p): stack.path for stack in stacks for block in stack.blocks for p in block.parameters()}
    in_blocks = {id(m) for stack in stacks for block in stack.blocks for m in block.modules()}
    flows = {stack.path: Flow() for stack in stacks}
    reached: dict[str, dict[int, nn.Parameter]] = {stack.path: {} for stack in stacks}
    started: set[str] = set()
    waiting = [m for m in model.modules() if isinstance(m, _DropoutNd) and id(m) not in in_blocks]
    ran: list[nn.Module] = []
    finished: set[str] = set()
    walked: dict[str, set[Any]] = {stack.path: set() for stack in stacks}

    def watch(stack: Stack, block: nn.Module) -> Any:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if stack.path not in started:
                started.add(stack.path)
                flows[stack.path].dropouts, ran[:] = list(ran), []
            reached[stack.path].update({id(p): p for p in _leaves((args, kwargs), walked[stack.path])})
            if block is stack.blocks[-1]:
                finished.add(stack.path)
            if len(finished) == len(stacks):
                raise StopForward
            return original(*args, **kwargs)

        return forward

    with ExitStack() as undo:
        undo.enter_context(quiet(model))
        undo.enter_context(torch.enable_grad())
        for stack in stacks:
            for block in stack.blocks:
                undo.enter_context(patched_forward(block, watch(stack, block)))
        for dropout in waiting:
            handle = dropout.register_forward_hook(lambda module, *_: ran.append(module))
            undo.callback(handle.remove)
        with suppress(StopForward):
            model(**batch)
    for path, flow in flows.items():
        flow.upstream = [p for key, p in reached[path].items() if inside.get(key) != path]
        sources = [inside[id(p)] for p in flow.upstream if id(p) in inside]
        flow.reads = sorted(set(sources))
    return flows


def _leaves(value: Any, seen: set[Any]) -> Iterator[nn.Parameter]:
    """The Parameters from which any tensor in ``value`` was computed, through graph nodes not yet ``seen``."""
    todo = [tensor.grad_fn for tensor in tensors_in(value) if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            yield variable
        todo.extend(parent for parent, _ in node.next_functions if parent is not None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def chains_of(flows: Mapping[str, Flow]) -> list[list[str]]:
    """Stacks in data-flow order, those that read each other in one chain."""
    chains: list[list[str]] = []
    for path, flow in flows.items():
        chain = next((chain for chain in chains if set(chain) & set(flow.reads)), None)
        if chain is None:
            chains.append([path])
        else:
            chain.append(path)
    return chains
