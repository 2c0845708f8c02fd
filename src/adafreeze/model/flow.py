"""What flows into a stack: the parameters and dropouts below it, read off one traced forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .blocks import Stack, StopForward, quiet
from .patches import patched_forward

__all__ = ["Flow", "chains_of", "leaves", "tensors_in", "trace_flow"]


@dataclass
class Flow:
    """What stands upstream of one stack.

    Attributes:
        places: module and name of each parameter outside the stack whose gradient passes through it (trainable
            embeddings; for a decoder, the adapters of the encoder it attends to). Places, since FSDP2 puts other
            Parameter objects there for the time of a forward pass.
        dropouts: dropout modules outside the blocks that ran before block 0.
        reads: paths of the stacks whose parameters are among them.
    """

    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    dropouts: list[nn.Module] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)

    @property
    def upstream(self) -> list[nn.Parameter]:
        """The parameters that stand in ``places`` now."""
        # By get, as units do: ZeRO-3 listens to [name].
        return [parameter for module, name in self.places if (parameter := module._parameters.get(name)) is not None]

    def add(self, other: Flow) -> None:
        """Take in what another sample has shown."""
        known = {(id(module), name) for module, name in self.places}
        self.places += [place for place in other.places if (id(place[0]), place[1]) not in known]
        ran = {id(module) for module in self.dropouts}
        self.dropouts += [module for module in other.dropouts if id(module) not in ran]
        self.reads = sorted({*self.reads, *other.reads})

    @property
    def live(self) -> bool:
        """Whether something upstream still trains, so that the stack can have no prefix."""
        return any(parameter.requires_grad for parameter in self.upstream)


def trace_flow(
    model: nn.Module, stacks: list[Stack], batch: dict[str, Any], *, to_the_end: bool = False
) -> dict[str, Flow]:
    """Run ``batch`` once with gradients and read what each stack depends on off the autograd graph.

    Exact for any architecture: no list of model families, no guess from names. The pass is left at the last block,
    unless ``to_the_end``: what wraps the model may wait for its end.
    """
    inside: dict[int, str] = {}
    places: dict[int, tuple[nn.Module, str]] = {}
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
            inside.update({id(p): stack.path for p in block.parameters()})
            for module in model.modules():
                places.update({id(p): (module, name) for name, p in module._parameters.items() if p is not None})
            if stack.path not in started:
                started.add(stack.path)
                flows[stack.path].dropouts, ran[:] = list(ran), []
            found = leaves((args, kwargs), walked[stack.path])
            # A hook that makes embeddings require grad gives a leaf that is no Parameter.
            reached[stack.path].update({id(p): p for p in found if isinstance(p, nn.Parameter)})
            if block is stack.blocks[-1]:
                finished.add(stack.path)
            if len(finished) == len(stacks) and not to_the_end:
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
        outside = [key for key in reached[path] if inside.get(key) != path]
        flow.places = [places.get(key) or (nn.ParameterList([reached[path][key]]), "0") for key in outside]
        flow.reads = sorted({inside[key] for key in outside if key in inside})
    return flows


def leaves(value: Any, seen: set[Any] | None = None) -> Iterator[Tensor]:
    """The leaves of the graph from which any tensor in ``value`` was computed, through nodes not yet ``seen``.

    Parameters, and tensors that somebody made require grad; a tensor in ``value`` may be one itself.
    """
    seen, todo = set() if seen is None else seen, []
    for tensor in tensors_in(value):
        if tensor.grad_fn is not None:
            todo.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        todo.extend(parent for parent, _ in node.next_functions if parent is not None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
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
