"""Preflight: what can be known to go wrong is said before step 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .config import SafeConfig
from .decide.policy import Situation, choose
from .decide.scores import resolve_score
from .errors import ConfigError, ProbeError, RunError, note, warn
from .freeze.parallel import Parallel, Ranks
from .journal import Journal
from .model import Flow, Probe, Stack, Unit, trace_flow
from .model.draw import keep_random_state

__all__ = ["check_parallel", "check_run", "check_units", "drawn_by_main", "flows_of", "frozen_at_start"]


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


def check_units(names: tuple[str, ...], units: Mapping[str, Unit]) -> None:
    """Refuse names to freeze by hand that are no units.

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
    *,
    head: bool,
    ranks_move: bool = False,
) -> list[str]:
    """Names of the units that are frozen before step 0: by hand, and the lowest blocks'; those a dry run only tells.

    Args:
        config: ``freeze``, ``freeze_at_start``, and ``min_live_blocks``, which holds here as well.
        chains: unit names by block by chain.
        journal: of the run.
        head: something else than adapters trains.
        ranks_move: of AdaLoRA, until something freezes: then only what was asked for is frozen.
    """
    if not config.share_at_start or (ranks_move and config.freeze_at_start is None):
        return list(config.freeze)
    rest: dict[str, Any] = {"min_live_blocks": config.min_live_blocks, "something_else_trains": head}
    by_hand = frozenset(config.freeze)
    lowest = choose("bottom_up", Situation(0, 1.0, {}, chains, by_hand, freeze_share=config.share_at_start, **rest))
    if config.dry_run and lowest:
        journal.write("would_freeze", step=0, units=lowest)
        note(f"Before step 0 {len(lowest)} units would freeze (freeze_at_start); a dry run goes on without that.")
        return list(config.freeze)
    return [*config.freeze, *lowest]


def flows_of(
    model: nn.Module, stacks: list[Stack], units: Mapping[str, Unit], probe: Probe, *, collective: bool = False
) -> dict[str, Flow]:
    """Trace one sample of the probe through the model; warn of what trains below the blocks.

    Raises:
        ProbeError: the model does not take the probe.
    """
    one = probe.first_sample(next(model.parameters()).device)
    try:
        with keep_random_state():
            flows = trace_flow(model, stacks, one, to_the_end=collective)
    except Exception as error:
        raise ProbeError(
            f"The model does not take the probe: {type(error).__name__}: {error}",
            cause=f"It was called with {', '.join(one)} of one sample.",
            fix="Pass batches as the model gets them in training: probe=[batch, ...]",
        ) from error
    owned = {id(p) for unit in units.values() for p in (*unit.parameters(), *unit.shared_parameters())}
    for path, flow in flows.items():
        outside = {id(p) for p in flow.upstream if id(p) not in owned}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in outside]
        if names:
            warn(
                f"Trainable parameters stand below the blocks of {path}: {', '.join(names[:4])}.",
                cause="Their gradient passes through every block, so no prefix can be cut off; freezing saves "
                "hardly any memory or time.",
                fix='Leave embeddings out of modules_to_save, and set LoraConfig(bias="none").',
                stacklevel=5,
            )
    return flows
