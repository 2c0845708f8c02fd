"""Units: the adapter parameters that freeze together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from ..errors import ModelError
from .backends import Backend
from .blocks import Stack, user_name, users_class

__all__ = ["Unit", "find_units"]


@dataclass(frozen=True)
class Unit:
    """The trainable adapter parameters that freeze together.

    Attributes:
        name: of its block (``"bert.encoder.layer.3"``), or of its adapted layer (``"....attention.self.query"``).
        stack: path of its stack.
        block: index of its block in that stack.
        module: the block or adapted layer, whose output is scored.
        sites: its adapted layers.
        slots: (module, name) of each own Parameter, looked up at each use: PEFT's dtype casting, FSDP and ``.to()``
            replace Parameter objects.
        shared: the same for Parameters that other units use too; one freezes when all its units are frozen.
    """

    name: str
    stack: str
    block: int
    module: nn.Module
    sites: tuple[nn.Module, ...]
    slots: tuple[tuple[nn.Module, str], ...]
    shared: tuple[tuple[nn.Module, str], ...] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its own parameters."""
        return map(_parameter, self.slots)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that it shares with other units."""
        return map(_parameter, self.shared)

    def all_parameters(self) -> Iterator[nn.Parameter]:
        """Its own and shared parameters."""
        return map(_parameter, self.slots + self.shared)


def find_units(model: nn.Module, stacks: list[Stack], backend: Backend, granularity: str = "block") -> dict[str, Unit]:
    """Find the units of ``model`` by name, bottom to top.

    Raises:
        ModelError: no block contains a trainable adapter, or units share every adapter parameter.
    """
    drafts: list[Unit] = []
    for stack in stacks:
        for index, block in enumerate(stack.blocks):
            name, adapted = stack.block_name(index), list(backend.sites(block))
            groups = [(name, block, [site for _, site in adapted])]
            if granularity == "site":
                groups = [(f"{name}.{inner}", site, [site]) for inner, site in adapted]
            for name, module, sites in groups:
                slots = tuple(slot for site in sites for slot in _trainable_slots(site))
                if slots:
                    drafts.append(Unit(name, stack.path, index, module, tuple(sites), slots))
    if not drafts:
        raise _nothing_trains(model, stacks, backend)
    uses = Counter(key for unit in drafts for key in set(map(id, unit.parameters())))
    units = {}
    for unit in drafts:
        shared = tuple(slot for slot in unit.slots if uses[id(_parameter(slot))] > 1)
        own = tuple(slot for slot in unit.slots if slot not in shared)
        units[unit.name] = replace(unit, slots=own, shared=shared)
    if len(units) > 1 and not any(unit.slots for unit in units.values()):
        raise ModelError(
            f"All adapter parameters of {users_class(model)} are shared by all its blocks, so no block can freeze.",
            fix="Use a method with separate weights in each block, such as LoRA, DoRA or IA3.",
        )
    return units


def _nothing_trains(model: nn.Module, stacks: Sequence[Stack], backend: Backend) -> ModelError:
    """The error for adapters that are all frozen, or outside the blocks."""
    if any(True for stack in stacks for block in stack.blocks for _ in backend.sites(block)):
        reason, fix = backend.why_frozen()
    else:
        places = some([user_name(name) for name, _ in backend.sites(model)])
        reason = f"its adapters are outside the blocks of {', '.join(stack.path for stack in stacks)}: {places}"
        fix = "Set target_modules so that it matches layers inside the blocks."
    fact = f"No trainable adapter was found in the blocks of {users_class(model)}"
    return ModelError(f"{fact}; {reason}.", fix=fix)


def frozen_parameters(units: Mapping[str, Unit], frozen: Iterable[str]) -> list[nn.Parameter]:
    """All parameters of the units ``frozen`` that no other unit uses, each once."""
    frozen = set(frozen)
    live = {id(p) for name, unit in units.items() if name not in frozen for p in unit.all_parameters()}
    found = {id(p): p for name in sorted(frozen) for p in units[name].all_parameters()}
    return [parameter for key, parameter in found.items() if key not in live]


def units_along(
    chains: Sequence[Sequence[str]], stacks: Sequence[Stack], units: Mapping[str, Unit]
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Names of the units of each block, bottom to top, along each chain of stacks."""
    names: dict[tuple[str, int], list[str]] = {}
    for name, unit in units.items():
        names.setdefault((unit.stack, unit.block), []).append(name)
    blocks = {stack.path: [tuple(names.get((stack.path, i), ())) for i in range(len(stack))] for stack in stacks}
    return tuple(tuple(block for path in chain for block in blocks[path]) for chain in chains)


def blocks_below(chains: Sequence[Sequence[Sequence[str]]], names: Iterable[str]) -> int:
    """Blocks at the bottom of the chains whose units are all in ``names``; 0 without names.

    >>> blocks_below([[(), ("a",), ("b", "c"), ("d",)]], ["a", "b", "d"])
    2
    """
    frozen = frozenset(names)
    return sum(len([*takewhile(frozen.issuperset, chain)]) for chain in chains) if frozen else 0


def something_else_trains(model: nn.Module, units: Mapping[str, Unit]) -> bool:
    """Whether a parameter outside the units is trainable."""
    owned = {id(p) for unit in units.values() for p in unit.all_parameters()}
    return any(p.requires_grad and id(p) not in owned for p in model.parameters())


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _parameter(slot: tuple[nn.Module, str]) -> nn.Parameter:
    module, name = slot
    # get, not [name]: in a forward pass of ZeRO-3 that would gather the weight, and keep it gathered.
    return module._parameters.get(name)  # type: ignore[return-value]


def _trainable_slots(site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    seen = set()
    for module in site.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name
