"""Obstacles: what trains to the end below adapters, so that freezing these would save hardly any memory or time."""

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
    """A trainable parameter that freezing adapters cannot freeze, in or below a block that holds adapters.

    Attributes:
        name: as in ``model.named_parameters()``.
        stack: path of the stack whose backward pass it keeps long.
        block: the lowest block of that stack through which its gradient passes, or in which it stands.
        owners: names of the units that share it; none if it belongs to no unit.
    """

    name: str
    stack: str
    block: int
    owners: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """Its name in the model before PEFT wrapped it."""
        return user_name(self.name)


def find_obstacles(
    model: nn.Module, stacks: Sequence[Stack], units: Mapping[str, Unit], flows: Mapping[str, Flow]
) -> list[Obstacle]:
    """Find them, stack by stack and bottom to top, with those below a stack first.

    A parameter that units share is one if a unit of the topmost adapted block shares it: that block stays live.
    """
    own = {id(parameter) for unit in units.values() for parameter in unit.parameters()}
    owners: dict[int, list[str]] = {}
    for name, unit in units.items():
        for parameter in unit.shared_parameters():
            owners.setdefault(id(parameter), []).append(name)
    top: dict[str, int] = {}
    for unit in units.values():
        top[unit.stack] = max(unit.block, top.get(unit.stack, 0))
    staying = {key for key, names in owners.items() if any(units[n].block == top[units[n].stack] for n in names)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def trains_on(parameter: nn.Parameter) -> bool:
        key = id(parameter)
        return parameter.requires_grad and key not in own and (key not in owners or key in staying)

    def places(stack: Stack) -> Iterator[tuple[int, nn.Parameter]]:
        yield from ((0, parameter) for parameter in flows[stack.path].upstream)
        for index, block in enumerate(stack.blocks[: top[stack.path] + 1]):
            yield from ((index, parameter) for parameter in block.parameters())

    found: dict[tuple[str, int], Obstacle] = {}
    for stack in stacks:
        for index, parameter in places(stack) if stack.path in top else ():
            key = id(parameter)
            if trains_on(parameter) and (stack.path, key) not in found:
                name = names.get(key, "a parameter outside the model")
                found[stack.path, key] = Obstacle(name, stack.path, index, tuple(owners.get(key, ())))
    return list(found.values())


def units_below(units: Mapping[str, Unit], obstacles: Sequence[Obstacle]) -> frozenset[str]:
    """Names of the units that stand below the lowest obstacle of their stack: freezing these can pay."""
    lowest: dict[str, int] = {}
    for obstacle in obstacles:
        lowest[obstacle.stack] = min(obstacle.block, lowest.get(obstacle.stack, obstacle.block))
    return frozenset(name for name, unit in units.items() if unit.block < lowest.get(unit.stack, unit.block + 1))


def remedies(obstacles: Sequence[Obstacle], backend: Backend, most: int = 3) -> str:
    """What to change so that none of them trains: the first ``most``, each once."""
    shared = "a method with weights of its own in each block, such as LoRA, DoRA or IA3"
    found = list(dict.fromkeys(shared if one.owners else backend.remedy(one.name) for one in obstacles))
    return "; ".join([*found[:most], *([f"and {len(found) - most} more of the kind"] if found[most:] else [])])
