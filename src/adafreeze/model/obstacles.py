"""Obstacles: parameters below adapters that never freeze, so that freezing the adapters would save almost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .backends import Backend
from .blocks import Stack, user_name
from .flow import Flow
from .units import Unit

__all__ = ["Obstacle", "find_obstacles", "remedies", "units_below"]


@dataclass(frozen=True)
class Obstacle:
    """A parameter, in or below a block with adapters, that trains to the end.

    Attributes:
        name: as in ``model.named_parameters()``.
        stack: path of the stack that its gradient passes through.
        block: the lowest block of that stack that its gradient passes through.
        owners: names of the units that share it; empty if it belongs to no unit.
    """

    name: str
    stack: str
    block: int
    owners: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """Its name without PEFT's prefix."""
        return user_name(self.name)


def find_obstacles(
    model: nn.Module, stacks: Sequence[Stack], units: Mapping[str, Unit], flows: Mapping[str, Flow]
) -> list[Obstacle]:
    """Find them, stack by stack and bottom to top, with those below a stack first.

    A shared parameter is one if the topmost adapted block uses it: that block stays live.
    """
    top: dict[str, int] = {}
    owners: dict[int, list[str]] = {}
    for name, unit in units.items():
        top[unit.stack] = max(unit.block, top.get(unit.stack, 0))
        for parameter in unit.shared_parameters():
            owners.setdefault(id(parameter), []).append(name)
    freezable = {id(parameter) for unit in units.values() for parameter in unit.parameters()}
    freezable |= {key for key, shared in owners.items() if all(units[n].block < top[units[n].stack] for n in shared)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def places(stack: Stack) -> Iterator[tuple[int, nn.Parameter]]:
        yield from ((0, parameter) for parameter in flows[stack.path].upstream)
        for index, block in enumerate(stack.blocks[: top[stack.path] + 1]):
            yield from ((index, parameter) for parameter in block.parameters())

    found: dict[tuple[str, int], Obstacle] = {}
    for stack in (stack for stack in stacks if stack.path in top):
        for index, parameter in places(stack):
            key = id(parameter)
            if parameter.requires_grad and key not in freezable and (stack.path, key) not in found:
                name = names.get(key, "a parameter outside the model")
                found[stack.path, key] = Obstacle(name, stack.path, index, tuple(owners.get(key, ())))
    return list(found.values())


def units_below(units: Mapping[str, Unit], obstacles: Sequence[Obstacle]) -> frozenset[str]:
    """Names of the units below the lowest obstacle of their stack: freezing these saves memory and time."""
    lowest: dict[str, int] = {}
    for obstacle in obstacles:
        lowest[obstacle.stack] = min(obstacle.block, lowest.get(obstacle.stack, obstacle.block))
    return frozenset(name for name, unit in units.items() if unit.block < lowest.get(unit.stack, unit.block + 1))


def remedies(obstacles: Sequence[Obstacle], backend: Backend) -> str:
    """What to change so that these parameters do not train: the first three fixes, each once."""
    shared = "a method with separate weights in each block, such as LoRA, DoRA or IA3"
    found = list(dict.fromkeys(shared if one.owners else backend.remedy(one.name) for one in obstacles))
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more of the kind" if found[3:] else "")
