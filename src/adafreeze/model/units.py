"""Units: what is frozen as one, and who owns which Parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        name: the block's name (``"bert.encoder.layer.3"``), or the site's (``"....attention.self.query"``).
        stack: path of the stack it belongs to.
        block: index of its block in that stack.
        module: the block or the site: the module whose output is scored.
        sites: the adapted layers it consists of.
        slots: (module, name) of each own Parameter. Looked up at each use: PEFT's dtype casting, FSDP and
            ``.to()`` replace Parameter objects.
        shared: the same for Parameters that other units use too; one freezes when all its owners have.
    """

    name: str
    stack: str
    block: int
    module: nn.Module
    sites: tuple[nn.Module, ...]
    slots: tuple[tuple[nn.Module, str], ...]
    shared: tuple[tuple[nn.Module, str], ...] = field(default=())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its own parameters, as they are now."""
        return map(_parameter, self.slots)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that it shares with other units."""
        return map(_parameter, self.shared)


def find_units(model: nn.Module, stacks: list[Stack], backend: Backend, granularity: str = "block") -> dict[str, Unit]:
    """Find the units of ``model``, by name, bottom to top.

    Raises:
        ModelError: no block holds a trainable adapter, or every adapter parameter is shared by several units.
    """
    drafts = []
    for stack in stacks:
        for index, block in enumerate(stack.blocks):
            adapted = list(backend.sites(block))
            if granularity == "site":
                groups = [(f"{stack.block_name(index)}.{name}", site, [site]) for name, site in adapted]
            else:
                groups = [(stack.block_name(index), block, [site for _, site in adapted])]
            for name, module, members in groups:
                slots = [slot for site in members for slot in _trainable_slots(site)]
                if slots:
                    drafts.append((name, stack.path, index, module, members, slots))
    if not drafts:
        raise _nothing_trains(model, stacks, backend)
    owners: dict[int, set[str]] = {}
    for name, *_, slots in drafts:
        for slot in slots:
            owners.setdefault(id(_parameter(slot)), set()).add(name)
    units = {}
    for name, path, index, module, sites, slots in drafts:
        own = tuple(slot for slot in slots if len(owners[id(_parameter(slot))]) == 1)
        shared = tuple(slot for slot in slots if len(owners[id(_parameter(slot))]) > 1)
        units[name] = Unit(name, path, index, module, tuple(sites), own, shared)
    if len(units) > 1 and not any(unit.slots for unit in units.values()):
        raise ModelError(
            f"All adapter parameters of {users_class(model)} are shared by all its blocks.",
            cause="Freezing one block would freeze every other with it; there is nothing to select.",
            fix="Use a method with weights of its own in each block, such as LoRA, DoRA or IA3.",
        )
    return units


def _nothing_trains(model: nn.Module, stacks: Sequence[Stack], backend: Backend) -> ModelError:
    """Why no block holds a trainable adapter: they are frozen, or stand elsewhere."""
    if any(True for stack in stacks for block in stack.blocks for _ in backend.sites(block)):
        return backend.why_frozen()
    places = [user_name(name) for name, _ in backend.sites(model)]
    return ModelError(
        f"No trainable adapter was found in the blocks of {users_class(model)}.",
        cause=f"Its adapters are outside the blocks of {', '.join(stack.path for stack in stacks)}: {some(places)}.",
        fix="Set target_modules so that it matches layers inside the blocks.",
    )


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
    """Blocks at the bottom of the chains that have no unit but those of ``names``; 0 if there are no names.

    >>> blocks_below([[(), ("a",), ("b", "c"), ("d",)]], ["a", "b", "d"])
    2
    """
    frozen = frozenset(names)
    return sum(len([*takewhile(frozen.issuperset, chain)]) for chain in chains) if frozen else 0


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    names = list(dict.fromkeys(names))
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _parameter(slot: tuple[nn.Module, str]) -> nn.Parameter:
    module, name = slot
    # Not [name]: in a forward pass of ZeRO-3 that gathers the weight, and keeps it as it then is.
    return module._parameters.get(name)  # type: ignore[return-value]


def _trainable_slots(site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    seen = set()
    for module in site.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name
