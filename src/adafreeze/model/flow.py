"""The parameters and dropouts below each stack, found in one traced forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

from .blocks import Stack, StopForward, hidden_states, modules_outside, quiet
from .patches import patched_forward
from .restore import temporarily
from .traces import traceless

__all__ = ["Flow", "blocks_by_mode", "chains_of", "graph_leaves", "tensors_in", "trace_flow"]


@dataclass
class Flow:
    """What is upstream of one stack.

    Attributes:
        places: (module, name) of each parameter outside the stack whose gradient passes through it: trainable
            embeddings, or for a decoder the adapters of its encoder. FSDP2 replaces Parameter objects during a
            forward pass, so they are looked up at each use.
        dropouts: dropout modules outside the blocks that ran before block 0.
        reads: paths of the stacks that contain some of these parameters.
        ran: whether a block of the stack ran at all.
    """

    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    dropouts: list[nn.Module] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    ran: bool = False

    @property
    def upstream(self) -> list[nn.Parameter]:
        """The parameters that are at ``places`` now."""
        # get, not [name]: ZeRO-3 hooks into [name].
        return [parameter for module, name in self.places if (parameter := module._parameters.get(name)) is not None]

    def add(self, other: Flow) -> None:
        """Add what another sample's pass has shown."""
        known = {(id(module), name) for module, name in self.places}
        self.places += [place for place in other.places if (id(place[0]), place[1]) not in known]
        ran = {id(module) for module in self.dropouts}
        self.dropouts += [module for module in other.dropouts if id(module) not in ran]
        self.reads = sorted({*self.reads, *other.reads})
        self.ran |= other.ran

    @property
    def live(self) -> bool:
        """Whether something upstream still trains, so that the stack cannot have a prefix."""
        return any(parameter.requires_grad for parameter in self.upstream)


def trace_flow(
    model: nn.Module, stacks: list[Stack], batch: dict[str, Any], *, to_the_end: bool = False
) -> dict[str, Flow]:
    """Run ``batch`` once with gradients, and find in the autograd graph what each stack depends on.

    Exact for any architecture: no list of model families, no guess from names. The pass ends at the last block, unless
    ``to_the_end``: a wrapper may need the whole pass.
    """
    inside: dict[int, str] = {}
    places: dict[int, tuple[nn.Module, str]] = {}
    flows = {stack.path: Flow() for stack in stacks}
    reached: dict[str, dict[int, nn.Parameter]] = {stack.path: {} for stack in stacks}
    ran: list[nn.Module] = []  # dropouts
    finished: set[str] = set()
    walked: dict[str, set[Any]] = {}

    def watch(stack: Stack, block: nn.Module) -> Any:
        original = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            inside.update({id(p): stack.path for p in block.parameters()})
            for module in model.modules():
                places.update({id(p): (module, name) for name, p in module._parameters.items() if p is not None})
            if stack.path not in walked:
                walked[stack.path], flows[stack.path].ran = set(), True
                flows[stack.path].dropouts, ran[:] = list(ran), []
            found = graph_leaves((args, kwargs), walked[stack.path])
            # A hook that makes embeddings require grad creates a leaf that is not a Parameter.
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
        # The graph is walked, and never run backward: keeping activations would make this pass the peak of a run.
        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing))
        for stack in stacks:
            for block in stack.blocks:
                undo.enter_context(patched_forward(block, watch(stack, block)))
        for module in modules_outside(model.modules(), stacks):
            if isinstance(module, _DropoutNd):
                undo.callback(module.register_forward_hook(lambda module, *_: ran.append(module)).remove)
        with suppress(StopForward):
            model(**batch)
    for path, flow in flows.items():
        outside = [key for key in reached[path] if inside.get(key) != path]
        flow.places = [places.get(key) or (nn.ParameterList([reached[path][key]]), "0") for key in outside]
        flow.reads = sorted({inside[key] for key in outside if key in inside})
    return flows


def blocks_by_mode(
    model: nn.Module, stacks: list[Stack], batch: dict[str, Any], *, to_the_end: bool = False
) -> list[nn.Module]:
    """The blocks that compute something else in evaluation mode than in training mode without dropout.

    Such as sparse attention whose pattern depends on the mode, capacities of experts, power iterations. Each block runs
    three times on what enters it: twice in training mode, with its dropout modules off and other random numbers, then
    in evaluation mode. Where the first two differ, functions that read the flag draw random numbers (most models drop
    attention scores so), and evaluation mode is the way to disable that. Blocks of one class are alike: a short sample
    may show it in one of them only.
    """
    found: dict[nn.Module, bool | None] = {}  # None: random

    def compared(block: nn.Module, last: bool) -> Callable[..., Any]:
        original = block.forward
        modules = list(block.modules())
        training = [(module, "training", True) for module in modules if not isinstance(module, _DropoutNd)]

        def in_training(seed: int, args: Any, kwargs: Any) -> Tensor | None:
            copies = tree_map_only(Tensor, torch.clone, (args, kwargs))
            with suppress(Exception), traceless(modules), temporarily(training):
                torch.manual_seed(seed)
                return hidden_states(original(*copies[0], **copies[1]))
            return None

        def forward(*args: Any, **kwargs: Any) -> Any:
            trained = [] if block in found else [in_training(seed, args, kwargs) for seed in range(2)]
            output = original(*args, **kwargs)
            if trained:
                one, other = trained
                agree = one is not None and other is not None and torch.equal(one, other)
                found[block] = not torch.equal(one, hidden_states(output)) if agree else None  # type: ignore[arg-type]
            if last and not to_the_end and len(found) == sum(map(len, stacks)):
                raise StopForward
            return output

        return forward

    with ExitStack() as undo:
        undo.enter_context(quiet(model))
        undo.enter_context(torch.no_grad())
        for stack in stacks:
            for block in stack.blocks:
                undo.enter_context(patched_forward(block, compared(block, block is stack.blocks[-1])))
        with suppress(StopForward):
            model(**batch)
    kinds = {type(block) for block, differs in found.items() if differs}
    return [block for block, differs in found.items() if differs is not None and type(block) in kinds]


def graph_leaves(value: Any, seen: set[Any] | None = None) -> Iterator[Tensor]:
    """The leaves (parameters, tensors that require grad) of the autograd graph of all tensors in ``value``.

    Nodes in ``seen`` are skipped, and visited nodes added to it.
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
    """Stacks in data-flow order; stacks that read each other are in one chain."""
    chains: list[list[str]] = []
    for path, flow in flows.items():
        chain = next((chain for chain in chains if set(chain) & set(flow.reads)), None)
        if chain is None:
            chains.append([path])
        else:
            chain.append(path)
    return chains


def _nothing(_: Any) -> Any:
    return None
