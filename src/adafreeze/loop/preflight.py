"""Preflight: checks before step 0."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from ..config import SafeConfig
from ..decide.policy import PolicyInput, choose, is_prefix_only
from ..decide.scores import resolve_score
from ..errors import ConfigError, ProbeError, RunError, error_line, note, warn
from ..journal import Journal
from ..measure import Probe
from ..model import Flow, Stack, Unit, trace_flow
from ..model.backends import Backend
from ..model.batch import called_by_column, forward_names, with_features
from ..model.blocks import device_of
from ..model.flow import blocks_by_mode
from ..model.obstacles import find_obstacles, remedies, units_below
from ..model.offloaded import any_away
from ..model.patches import owners
from ..model.traces import traceless
from ..model.units import some
from ..parallel import Parallel, Ranks

__all__ = [
    "by_mode_of",
    "check_parallel",
    "check_run",
    "check_names",
    "close_earlier",
    "drawn_by_main",
    "flows_of",
    "frozen_at_start",
    "offload_kind",
    "paying_units",
    "warn_compiled",
    "warn_of_units_left_out",
]


def close_earlier(model: nn.Module) -> None:
    """Close every Safe that still has ``model`` or a part of it, after a run that was interrupted or left open."""
    for earlier in owners(model) if isinstance(model, nn.Module) else ():  # find_stacks refuses other types
        frozen = len(earlier.frozen)
        earlier.close()
        note(f"An earlier Safe still had this model; it was closed, and its {frozen} frozen units train again.")


def check_run(config: Any, optimizer: Any, total_steps: Any, **counts: Any) -> None:
    """Check the arguments of Safe that no other part checks.

    Args:
        config: a SafeConfig, or None.
        optimizer: one, a wrapper of one, or None.
        total_steps: of the run.
        counts: by the argument's name; None where it was not given.

    Raises:
        ConfigError: one of them is of another type, or not positive.
    """
    if config is not None and not isinstance(config, SafeConfig):
        raise ConfigError(
            f"config is {_briefly(config)}, but must be a SafeConfig.",
            fix="Safe(model, SafeConfig(...), ...); SafeConfig.from_dict takes a dictionary.",
        )
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise ConfigError(
            f"optimizer is {_briefly(optimizer)}, but must be the optimizer of the run.",
            fix="Safe(..., optimizer=optimizer) with the object whose step() the loop calls.",
        )
    if not _is_count(total_steps):
        raise ConfigError(
            f"total_steps is {total_steps!r}, but must be the number of optimizer steps of the run: warm-up and ramp "
            "are shares of it.",
            fix="Safe(..., total_steps=len(train_dataloader) // accumulation * epochs)",
        )
    for name, value in counts.items():
        if value is not None and not _is_count(value):
            raise ConfigError(
                f"{name} is {_briefly(value)}, but must be a positive whole number.",
                fix=f"Leave out {name} to take it from the dataloader, or pass a number of samples.",
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _briefly(value: Any) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def check_parallel(config: SafeConfig, parallel: Parallel) -> SafeConfig:
    """The settings that the parallel host supports.

    Raises:
        RunError: a memory budget or offload is not supported, or the score reads what the host hides.
    """
    if parallel.no_budget is not None and config.memory_budget is not None:
        raise RunError(
            f"SafeConfig.memory_budget is {config.memory_budget!r}, which {parallel.name} does not support: "
            f"{parallel.no_budget}.",
            fix="SafeConfig(memory_budget=None), with gradient checkpointing if memory is short.",
        )
    if parallel.no_offload is not None and config.offload in ("cpu", "disk"):
        raise RunError(
            f"SafeConfig.offload is {config.offload!r}, which {parallel.name} does not support: {parallel.no_offload}.",
            fix='SafeConfig(offload="off")',
        )
    reads = resolve_score(config.score).reads
    if reads in parallel.hidden:
        raise RunError(
            f"SafeConfig.score is {config.score!r}, which reads {reads}, and {parallel.hidden[reads]}.",
            fix='SafeConfig(score="cka"), or "local_cka"; or run on FSDP2 or DDP.',
        )
    if parallel.no_cache is None or config.cache == "off":
        return config
    note(f"Prefix cache off: {parallel.no_cache}.")
    return config.changed(cache="off")


def offload_kind(config: SafeConfig, model: nn.Module, wrapped: nn.Module, parallel: Parallel) -> str | None:
    """Where the weights of the prefix may go: ``"cpu"``, ``"disk"``, or None: they stay."""
    device = device_of(model)
    if is_compiled(wrapped):
        if config.offload in ("cpu", "disk"):
            warn_compiled(config)
        return None
    if config.offload == "off" or parallel.no_offload is not None or config.cache == "off" or config.dry_run:
        return None
    if config.offload == "auto":
        return None if config.memory_budget is None else "disk" if device.type == "cpu" else "cpu"
    if config.offload == "cpu" and device.type == "cpu":
        if not any_away(model):
            warn(
                'SafeConfig.offload is "cpu", and the model is on the CPU already: nothing moves.',
                fix='SafeConfig(offload="disk") frees host memory.',
                stacklevel=5,
            )
        return None
    return config.offload


def warn_compiled(config: SafeConfig) -> None:
    """Warn that nothing leaves the device where torch.compile compiled the model or its blocks."""
    warn(
        f"SafeConfig.offload is {config.offload!r}, and torch.compile compiles the weights that would leave into its "
        "graphs: they stay.",
        fix="Train without torch.compile, or SafeConfig(offload='off').",
        stacklevel=5,
    )


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to a part of it."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def check_names(names: Iterable[str], units: Collection[str]) -> None:
    """Check the names of units to freeze by hand.

    Raises:
        ConfigError: a name is no unit.
    """
    for name in names:
        if name not in units:
            raise ConfigError(
                f"There is no unit {name!r} to freeze; the units of this model are {', '.join(list(units)[:3])}, ... "
                f"({len(units)} in all).",
                fix=f'freeze=["{next(iter(units))}"]',
            )


def warn_of_units_left_out(optimizer: Any, units: Mapping[str, Unit], parallel: Parallel) -> None:
    """Warn of units whose parameters the optimizer does not have: they get gradients and never change.

    Not where parameters are sharded, and not for one optimizer per layer: those have other tensors in their place.
    """
    if optimizer is None or parallel.name not in ("none", "DDP") or hasattr(optimizer, "optimizer_dict"):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        name for name, unit in units.items() if not any(id(parameter) in held for parameter in unit.all_parameters())
    ]
    if not missing:
        return
    if len(missing) == len(units):
        fact = "The optimizer has none of the adapters' parameters"
    else:
        fact = f"The optimizer does not have the parameters of {len(missing)} of {len(units)} units ({some(missing)})"
    warn(
        f"{fact}, so they do not train unless another optimizer has them.",
        fix="torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], ...), made after get_peft_model",
        stacklevel=5,
    )


def drawn_by_main(source: Any, model: nn.Module, config: SafeConfig, ranks: Ranks) -> Probe:
    """The probe, as rank 0 draws it from ``source``."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    drawn: list[Probe] = []
    if called_by_column(model):
        source = with_features(source, model)
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
    """Names of the units to freeze before step 0: by hand, and those of the lowest blocks. A dry run only logs these.

    Args:
        config: ``freeze``, ``freeze_at_start``, ``min_live_blocks``.
        chains: unit names by block by chain.
        journal: of the run.
        paying: units that can join a prefix; None for all.
        head: something besides adapters trains.
        ranks_move: AdaLoRA allocates ranks until something freezes: freeze only what was asked for.
    """
    if not config.share_at_start or (ranks_move and config.freeze_at_start is None):
        return list(config.freeze)
    rest: dict[str, Any] = {"min_live_blocks": config.min_live_blocks, "something_else_trains": head}
    by_hand = frozenset(config.freeze)
    lowest = choose("bottom_up", PolicyInput(0, 1.0, {}, chains, by_hand, freeze_share=config.share_at_start, **rest))
    lowest = [name for name in lowest if paying is None or name in paying]
    if config.dry_run and lowest:
        journal.write("would_freeze", step=0, units=lowest)
        note(f"Before step 0 {len(lowest)} units would freeze (freeze_at_start), without dry_run.")
        return list(config.freeze)
    return [*config.freeze, *lowest]


def flows_of(
    model: nn.Module, stacks: list[Stack], units: Mapping[str, Unit], probe: Probe, *, collective: bool = False
) -> dict[str, Flow]:
    """Trace one sample of each kind in the probe through the model: what feeds a stack may differ between kinds.

    Warns of stacks with units that no sample reaches.

    Raises:
        ProbeError: the model does not take the probe.
    """
    flows = {stack.path: Flow() for stack in stacks}
    one: dict[str, Any] = {}
    try:
        with traceless(model.modules()):
            for one in probe.kinds(device_of(model)):
                for path, flow in trace_flow(model, stacks, one, to_the_end=collective).items():
                    flows[path].add(flow)
    except Exception as error:
        raise ProbeError(
            f"The model does not take the probe: called with {', '.join(one)} of one sample, it raised "
            f"{type(error).__name__}: {error}.",
            fix="Pass batches as the model gets them in training, by the argument names of its forward "
            f"({', '.join(forward_names(model)[:4])}): probe=[batch, ...]",
        ) from error
    if missed := [path for path in {unit.stack for unit in units.values()} if not flows[path].ran]:
        warn(
            f"No sample of the probe reaches {some(missed)}: the adapters there get no score, and do not freeze by it.",
            fix="Pass samples of every kind that is trained on, as the model gets them: probe=[batch, ...]",
        )
    return flows


def by_mode_of(
    model: nn.Module, stacks: list[Stack], probe: Probe, *, collective: bool = False
) -> frozenset[nn.Module]:
    """The blocks that must stay in training mode when they are frozen, to compute what they do in plain training."""
    try:
        # The longest, because short ones may have no pattern to differ in; two, because a batch may be treated as one.
        with traceless(model.modules()):
            found = blocks_by_mode(model, stacks, probe.longest(2, device_of(model)), to_the_end=collective)
    except Exception as error:  # from the model's own code
        note(
            f"A pass on two samples fails ({error_line(error)}), so it is not known whether a block computes something "
            "else in evaluation mode, which frozen blocks are in."
        )
        return frozenset()
    if found:
        note(
            f"{len(found)} blocks ({type(found[0]).__name__}) compute something else in evaluation mode. Once frozen, "
            "they stay in training mode, without dropout."
        )
    return frozenset(found)


def paying_units(
    config: SafeConfig,
    model: nn.Module,
    stacks: list[Stack],
    units: Mapping[str, Unit],
    flows: Mapping[str, Flow],
    backend: Backend,
) -> frozenset[str]:
    """Names of the units that can join a frozen prefix; warns of what keeps the others out.

    Prefix policies and ``freeze_at_start`` freeze no others: they would stop learning and save nothing.
    """
    obstacles = find_obstacles(model, stacks, units, flows)
    paying = units_below(units, obstacles)
    if len(paying) == len(units):
        return paying
    count = f"{len(paying)} of {len(units)} units"
    if not (is_prefix_only(config.policy) or config.share_at_start):
        fact = f"Freezing saves memory and time in no more than {count}"
    else:
        fact = f"Only {count} can freeze" if paying else "Nothing will freeze"
    where = "the others" if paying else "all adapters"
    names = list(dict.fromkeys(obstacle.short for obstacle in obstacles))
    shared = {owner for obstacle in obstacles for owner in obstacle.owners}
    shares = f", and {len(shared)} units share parameters" if shared else ""
    warn(
        f"{fact}: {some(names)} train{'s' * (len(names) == 1)} in or below the blocks of {where}{shares}, and the "
        "backward pass runs down to the lowest parameter that trains.",
        fix=remedies(obstacles, backend) + ". SafeConfig(freeze=[...]) freezes units regardless.",
        stacklevel=5,
    )
    return paying
