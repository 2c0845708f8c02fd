"""Preflight: what can be known to go wrong is said before step 0."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..config import SafeConfig
from ..decide.policy import PolicyInput, choose, freezes_prefixes
from ..decide.scores import resolve_score
from ..errors import ConfigError, ProbeError, RunError, note, warn
from ..journal import Journal
from ..measure import Probe
from ..model import Flow, Stack, Unit, trace_flow
from ..model.backends import Backend
from ..model.batch import forward_names
from ..model.blocks import device_of
from ..model.obstacles import find_obstacles, remedies, units_below
from ..model.patches import owners
from ..model.traces import traceless
from ..model.units import some
from ..parallel import Parallel, Ranks

__all__ = [
    "check_parallel",
    "check_run",
    "check_units",
    "close_earlier",
    "drawn_by_main",
    "flows_of",
    "frozen_at_start",
    "paying_units",
]


# Sets of input names of which one sample each is traced; what comes beside them is seen in training.
MOST_KINDS = 8


def close_earlier(model: nn.Module) -> None:
    """Close every Safe that still has ``model``, or a part of it: of a run that was interrupted, or left open."""
    for earlier in owners(model) if isinstance(model, nn.Module) else ():  # what is none is refused with its reason
        frozen = len(earlier.frozen)
        earlier.close()
        note(f"An earlier Safe still had this model; it was closed, and its {frozen} frozen units train again.")


def check_run(total_steps: Any) -> None:
    """Refuse runs whose length is unknown.

    Raises:
        ConfigError: ``total_steps`` is not a positive whole number.
    """
    if not isinstance(total_steps, int) or total_steps < 1:
        raise ConfigError(
            f"total_steps is {total_steps!r}.",
            cause="Warm-up and ramp are shares of the run, so its length in optimizer steps must be known.",
            fix="Safe(..., total_steps=len(train_dataloader) // accumulation * epochs)",
        )


def check_parallel(config: SafeConfig, parallel: Parallel) -> SafeConfig:
    """Settings that do for the way the run is spread over processes; what cannot be is left out, and said.

    Raises:
        RunError: a memory budget where none can be kept, or a score of what cannot be read.
    """
    if parallel.no_budget is not None and config.memory_budget is not None:
        raise RunError(
            f"SafeConfig.memory_budget is {config.memory_budget!r}, and the run uses {parallel.name}.",
            cause=f"There is none: {parallel.no_budget}.",
            fix="SafeConfig(memory_budget=None), with gradient checkpointing where memory is short.",
        )
    needs = resolve_score(config.score).needs
    if needs in parallel.hidden:
        raise RunError(
            f"SafeConfig.score is {config.score!r}, and the run uses {parallel.name}.",
            cause=f"It is made of {needs}, and {parallel.hidden[needs]}.",
            fix='SafeConfig(score="cka"), or "local_cka"; or run on FSDP2 or DDP.',
        )
    if parallel.no_cache is None or config.cache == "off":
        return config
    note(f"Prefix cache off: {parallel.no_cache}.")
    return config.changed(cache="off")


def check_units(names: tuple[str, ...], units: Mapping[str, Unit], optimizer: Any, parallel: Parallel) -> None:
    """Refuse names to freeze by hand that are no units; warn of units that the optimizer does not hold.

    Raises:
        ConfigError: the first of them, with the names there are.
    """
    for name in names:
        if name not in units:
            raise ConfigError(
                f"SafeConfig.freeze names {name!r}, which is no unit of this model.",
                cause=f"Its units are {', '.join(list(units)[:3])}, ... ({len(units)} in all).",
                fix=f'SafeConfig(freeze=["{next(iter(units))}"])',
            )
    _warn_of_units_left_out(optimizer, units, parallel)


def _warn_of_units_left_out(optimizer: Any, units: Mapping[str, Unit], parallel: Parallel) -> None:
    """Warn of units whose parameters the optimizer does not hold: they get gradients and never move.

    Not where parameters are spread over processes, and not of an optimizer per layer: those hold others in their place.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
    if optimizer is None or parallel.name not in ("none", "DDP") or hasattr(optimizer, "optimizer_dict"):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        name
        for name, unit in units.items()
        if not any(id(parameter) in held for parameter in (*unit.parameters(), *unit.shared_parameters()))
    ]
    if not missing:
        return
    if len(missing) == len(units):
        fact = "The optimizer holds none of the adapters' parameters."
        cause = "It was made before the adapters were."
    else:
        fact = f"The optimizer does not hold the parameters of {len(missing)} of {len(units)} units: {some(missing)}."
        cause = "They were left out of its groups, or put into the model after it was made."
    warn(
        fact,
        cause=cause + " Unless another optimizer holds them, they do not train.",
        fix="torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], ...), made after get_peft_model",
        stacklevel=4,
    )


def drawn_by_main(source: Any, model: nn.Module, config: SafeConfig, ranks: Ranks) -> Probe:
    """The probe, as rank 0 draws it from ``source``.

    Raises:
        ProbeError: there is nothing in it that the model takes.
    """
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    drawn: list[Probe] = []
    ranks.of_main(lambda: drawn.append(Probe.draw(source, config.probe_tokens, config.seed, pad)))
    if ranks.size == 1:
        return drawn[0]
    chunks = ranks.tensors_of_main(drawn[0].chunks if drawn else [])
    return drawn[0] if drawn else Probe(chunks, config.probe_tokens, config.seed)


def frozen_at_start(
    config: SafeConfig,
    chains: tuple[tuple[tuple[str, ...], ...], ...],
    journal: Journal,
    paying: Collection[str] | None = None,
    *,
    head: bool,
    ranks_move: bool = False,
) -> list[str]:
    """Names of the units that are frozen before step 0: by hand, and the lowest blocks'; those a dry run only tells.

    Args:
        config: ``freeze``, ``freeze_at_start``, and ``min_live_blocks``, which holds here as well.
        chains: unit names by block by chain.
        journal: of the run.
        paying: units whose freezing can pay; None for all.
        head: something else than adapters trains.
        ranks_move: of AdaLoRA, until something freezes: then only what was asked for is frozen.
    """
    if not config.share_at_start or (ranks_move and config.freeze_at_start is None):
        return list(config.freeze)
    rest: dict[str, Any] = {"min_live_blocks": config.min_live_blocks, "something_else_trains": head}
    by_hand = frozenset(config.freeze)
    lowest = choose("bottom_up", PolicyInput(0, 1.0, {}, chains, by_hand, freeze_share=config.share_at_start, **rest))
    lowest = [name for name in lowest if paying is None or name in paying]
    if config.dry_run and lowest:
        journal.write("would_freeze", step=0, units=lowest)
        note(f"Before step 0 {len(lowest)} units would freeze (freeze_at_start); a dry run goes on without that.")
        return list(config.freeze)
    return [*config.freeze, *lowest]


def flows_of(model: nn.Module, stacks: list[Stack], probe: Probe, *, collective: bool = False) -> dict[str, Flow]:
    """Trace one sample of each kind in the probe through the model: what feeds a stack may differ between them.

    Raises:
        ProbeError: the model does not take the probe.
    """
    flows = {stack.path: Flow() for stack in stacks}
    one: dict[str, Any] = {}
    try:
        with traceless(model.modules()):
            for one in probe.kinds(device_of(model))[:MOST_KINDS]:
                for path, flow in trace_flow(model, stacks, one, to_the_end=collective).items():
                    flows[path].add(flow)
    except Exception as error:
        raise ProbeError(
            f"The model does not take the probe: {type(error).__name__}: {error}",
            cause=f"It was called with {', '.join(one)} of one sample.",
            fix="Pass batches as the model gets them in training, by the names of its forward "
            f"({', '.join(forward_names(model)[:4])}): probe=[batch, ...]",
        ) from error
    return flows


def paying_units(
    config: SafeConfig,
    model: nn.Module,
    stacks: list[Stack],
    units: Mapping[str, Unit],
    flows: Mapping[str, Flow],
    backend: Backend,
) -> frozenset[str]:
    """Names of the units whose freezing can pay; warns of what keeps the others from it, once for all of them.

    Policies that freeze prefixes, and ``freeze_at_start``, freeze no others: nothing would be saved for what no longer
    learns.
    """
    obstacles = find_obstacles(model, stacks, units, flows)
    paying = units_below(units, obstacles)
    if len(paying) == len(units):
        return paying
    count = f"{len(paying)} of {len(units)} units"
    if not (freezes_prefixes(config.policy) or config.share_at_start):
        fact = f"Freezing saves memory and time in no more than {count}"
    else:
        fact = f"Only {count} can freeze" if paying else "Nothing will freeze"
    where = "the others" if paying else "all adapters"
    names = list(dict.fromkeys(obstacle.short for obstacle in obstacles))
    shared = {owner for obstacle in obstacles for owner in obstacle.owners}
    warn(
        fact + f": {some(names)} train{'s' * (len(names) == 1)} in or below the blocks of {where}.",
        cause=(f"{len(shared)} units share parameters, which train until the last of them freezes. " if shared else "")
        + "The backward pass runs down to the lowest parameter that trains, so a frozen adapter above it saves hardly "
        "any memory or time.",
        fix=remedies(obstacles, backend) + ". SafeConfig(freeze=[...]) freezes all the same what it names.",
        stacklevel=5,
    )
    return paying
