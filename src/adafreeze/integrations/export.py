"""Export: the blocks and scores of a run as the PEFT configuration of the next run."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, RunError
from ..journal import History, read_history
from ..tasks.adapters import CONFIG, config_from_flags, saved_config

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["Export", "ExportedBlock", "export_config", "ranks_by_score"]

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportedBlock:
    """One block with adapters.

    Attributes:
        name: such as ``"bert.encoder.layer.3"``.
        score: the last one measured.
        share: of the total score.
        frozen_at: optimizer step; None if the block trained to the end.
        kept: whether the next run adapts it.
        rank: for the next run; None if the block is not kept or ranks are unchanged.
    """

    name: str
    score: float
    share: float
    frozen_at: int | None
    kept: bool
    rank: int | None


@dataclass(frozen=True)
class Export:
    """The configuration of the next run.

    Attributes:
        config: for ``get_peft_model`` or ``config.save_pretrained(folder)``.
        blocks: all adapted blocks of the run, in model order.
        parameters: adapter parameters in the blocks, of this run and of the next; None if ranks are unchanged or the
            weights are missing.
        notes: remarks, one line each.
    """

    config: PeftConfig
    blocks: tuple[ExportedBlock, ...]
    parameters: tuple[int, int] | None
    notes: tuple[str, ...]


def export_config(
    run: str | os.PathLike[str],
    *,
    adapter_config: str | os.PathLike[str] | None = None,
    min_share: float | None = None,
    keep_ranks: bool = False,
) -> Export:
    """Turn the scores of a run into a PEFT configuration that adapts only the important blocks.

    Blocks: those that trained to the end, or those with at least ``min_share`` of the total score. They are selected by
    ``layers_to_transform`` and ``layers_pattern``; if PEFT cannot select them by number (two stacks, a pattern as
    ``target_modules``, a method without ``layers_to_transform``), by a pattern as ``target_modules``. Adapters outside
    the blocks are kept only if all blocks are.

    Ranks, for LoRA and DoRA: ``rank_pattern`` from ``ranks_by_score``, with the same number of parameters as the run;
    ``alpha_pattern`` keeps α/r (α/√r with ``use_rslora``). One rank of block b costs c_b = Σ (d_in + d_out) parameters
    over its adapted layers and is limited by the smallest d; both come from the saved adapter. Without a saved adapter
    all blocks are assumed to cost the same.

    Args:
        run: the output folder of ``adafreeze train``, or a journal.
        adapter_config: the folder with ``adapter_config.json``; default: the folder of the journal, or if it has none,
            the flags in the journal.
        min_share: between 0 and 1.
        keep_ranks: only select blocks.

    Raises:
        RunError: the journal is missing or has no block scores, the run was a dry run (without ``min_share``), or there
            is no PEFT configuration.
        ConfigError: no block has ``min_share``, or the ranks cannot be redistributed.
        ModelError: PEFT cannot select the blocks.
    """
    if min_share is not None and not 0 < min_share < 1:
        raise ConfigError(f"--min_share is {min_share}; it must be between 0 and 1.", fix="--min_share 0.05")
    history = _scored(run)
    folder = Path(adapter_config).expanduser() if adapter_config is not None else history.path.parent
    has_config = adapter_config is not None or (folder / CONFIG).is_file()
    config = saved_config(folder) if has_config else _config_from_flags(history)
    lora = config.peft_type == "LORA"
    layers = _layers(folder / WEIGHTS, history.units) if lora and (folder / WEIGHTS).is_file() else []
    total = sum(history.last_scores[name] for name in history.units) or 1.0
    shares = {name: history.last_scores[name] / total for name in history.units}
    kept, notes = _kept(history, shares, min_share), list(_notes(history))
    ranks: dict[str, int] = {}
    parameters = None
    if lora and not keep_ranks:
        scores = {name: history.last_scores[name] for name in kept}
        ranks, parameters = _distribute(config, scores, history.units, layers)
    elif not lora:
        notes.append(f"{type(config).__name__} has no ranks to distribute: only the blocks are selected.")
    if config.peft_type == "ADALORA":
        config.rank_pattern = None  # type: ignore[attr-defined]  # the result of this run's own allocation
    if len(kept) < len(history.units):
        _select(config, kept, layers)
        if outside := [layer.name for layer in layers if not layer.block]:
            notes.append(f"Adapters outside the blocks are left out: {', '.join(outside[:3])}.")
    frozen = history.frozen
    blocks = tuple(
        ExportedBlock(name, history.last_scores[name], share, frozen.get(name), name in kept, ranks.get(name))
        for name, share in shares.items()
    )
    return Export(config, blocks, parameters, tuple(notes))


def ranks_by_score(
    scores: Sequence[float], costs: Sequence[int], budget: int, most: Sequence[int] | None = None
) -> list[int]:
    """Ranks in proportion to scores, for a given number of parameters.

    r_b = max(1, min(λ s_b, m_b)) with λ such that Σ c_b r_b is the budget, rounded down; the rest is distributed by the
    largest remainder. If all c_b are equal the sum is the budget, else it is less by less than the largest c_b. A
    budget out of reach gives r_b = 1 or r_b = m_b for all b.

    Args:
        scores: s_b ≥ 0; all zero counts as all equal.
        costs: c_b, parameters per rank.
        budget: parameters.
        most: m_b, the largest useful ranks.

    >>> ranks_by_score([1, 2, 5], [10, 10, 10], 240)
    [3, 6, 15]
    >>> ranks_by_score([0.0, 1.0], [10, 20], 240)
    [1, 11]
    >>> ranks_by_score([1, 9], [1, 1], 20, most=[16, 16])
    [4, 16]
    """
    most = [budget] * len(scores) if most is None else most
    weights = [max(score / (max(scores) or 1.0), 1e-12) for score in scores]

    def ranks(scale: float) -> list[float]:
        return [max(1.0, min(scale * weight, limit)) for weight, limit in zip(weights, most, strict=True)]

    def spent(values: Sequence[float]) -> float:
        return sum(cost * value for cost, value in zip(costs, values, strict=True))

    low, high = 0.0, budget * 1e12
    for _ in range(200):  # bisection to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if spent(ranks(middle)) <= budget else (low, middle)
    exact = [value + 1e-9 for value in ranks(low)]
    whole = [math.floor(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i]):
        if exact[index] - whole[index] > 1e-6 and spent(whole) + costs[index] <= budget:
            whole[index] += 1
    return whole


def _scored(run: str | os.PathLike[str]) -> History:
    """The history of a run with a score for every block."""
    history = read_history(run)
    if not history.units:
        reason = ": it is a run with --method none" if history.method == "none" else ""
        raise RunError(
            f"{history.path} contains no scores{reason}.",
            fix="Train with --method safe, or with SafeCallback(journal=...), and export that run.",
        )
    if history.config.get("granularity") == "site":
        raise RunError(
            f'{history.path} is a run with granularity="site", but only scores of whole blocks can be exported.',
            fix='Train with SafeConfig(granularity="block"), the default.',
        )
    missing = [name for name in history.units if name not in history.last_scores]
    if missing:
        raise RunError(
            f"{history.path} has no score for {len(missing)} of {len(history.units)} blocks, such as {missing[0]}: it "
            f"ends at step {history.steps} of {history.total_steps}, or measuring failed ('measure_failed' events).",
            fix="Export a longer run.",
        )
    return history


def _kept(history: History, shares: Mapping[str, float], min_share: float | None) -> list[str]:
    """Blocks for the next run."""
    if min_share is None and history.config.get("dry_run"):
        raise RunError(
            f"{history.path} is a dry run, in which nothing froze.",
            fix="--min_share 0.05 selects blocks by their share of the score.",
        )
    frozen = history.frozen
    found = [name for name in shares if (name not in frozen if min_share is None else shares[name] >= min_share)]
    if not found:
        most = max(shares.values())
        fact = "All blocks froze" if min_share is None else f"No block has {min_share:.3g} of the score"
        raise ConfigError(f"{fact}; the largest share is {most:.3g}.", fix=f"--min_share {most / 2:.2g}")
    return found


def _notes(history: History) -> Iterator[str]:
    if not history.closed:
        yield f"The run ends at step {history.steps} of {history.total_steps}; these are its scores and blocks so far."
    if not history.frozen:
        yield "Nothing froze in this run."
    if unmeasured := sum(step == 0 for step in history.frozen.values()):
        yield f"{unmeasured} blocks froze before step 0 and were never scored; freeze_at_start=0 scores all blocks."


def _config_from_flags(history: History) -> PeftConfig:
    """The adapter configuration as ``adafreeze train`` makes it from the flags in the journal."""
    from ..tasks.weightless import PLANNED_TASKS

    given: Any = history.settings
    if not given:
        raise RunError(
            f"There is no {CONFIG} in {history.path.parent}, and the journal has no flags of `adafreeze train`.",
            fix="--adapter_config FOLDER, the folder of the saved adapter",
        )
    task_type = PLANNED_TASKS[history.task][1] if history.task is not None else None
    config = config_from_flags(given, task_type, history.total_steps)
    if not given.get("adapter_config"):
        config.base_model_name_or_path = given["model_name_or_path"]
    return config


@dataclass
class _Layer:
    """A layer with LoRA: its name, its block ("" outside the blocks), and the sizes of A and B as saved."""

    name: str
    block: str
    elements: dict[str, int]


def _layers(weights: Path, units: Sequence[str]) -> list[_Layer]:
    """The layers of the saved adapter; reads only the header of the file."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, _Layer] = {}
    try:
        with safe_open(weights, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
                if match:
                    block = next((unit for unit in units if f"{match[1]}.".startswith(f"{unit}.")), "")
                    layer = found.setdefault(match[1], _Layer(match[1], block, {}))
                    layer.elements[match[2]] = math.prod(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{weights} cannot be read ({error}).",
            fix="--adapter_config FOLDER with an intact copy, or move the file away and use --keep_ranks",
        ) from error
    return list(found.values())


def _distribute(
    config: PeftConfig, scores: Mapping[str, float], units: Sequence[str], layers: Sequence[_Layer]
) -> tuple[dict[str, int], tuple[int, int] | None]:
    """Set the ranks of ``config`` by ``scores``.

    Returns:
        The ranks, and the number of parameters before and after if ``layers`` are known.
    """
    from peft.utils.other import get_pattern_key

    settings: Any = config
    root = math.sqrt if settings.use_rslora else float

    def setting(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
        return pattern.get(get_pattern_key(list(pattern), layer), default)

    inside = [layer for layer in layers if layer.block]
    rank = {layer.name: setting(settings.rank_pattern, layer.name, settings.r) for layer in inside}
    scalings = {setting(settings.alpha_pattern, name, settings.lora_alpha) / root(r) for name, r in rank.items()}
    mixed = any(len({rank[layer.name] for layer in inside if layer.block == unit}) > 1 for unit in units)
    unknown = not inside and bool(settings.rank_pattern or settings.alpha_pattern)
    if mixed or unknown or (scalings and max(scalings) - min(scalings) > 1e-6 * max(scalings)):
        reason = (
            f"it has a rank_pattern, but there is no {WEIGHTS} with the names of its layers"
            if unknown
            else "its rank_pattern or alpha_pattern gives the layers of one block different ranks or scalings"
        )
        raise ConfigError(f"The ranks of this run cannot be redistributed: {reason}.", fix="--keep_ranks")
    names = list(scores)
    if inside:
        of = {name: [layer for layer in inside if layer.block == name] for name in names}
        costs = [sum(sum(layer.elements.values()) // rank[layer.name] for layer in of[name]) for name in names]
        most = [min(min(layer.elements.values()) // rank[layer.name] for layer in of[name]) for name in names]
        budget = sum(sum(layer.elements.values()) for layer in inside)
    else:
        costs, most, budget = [1] * len(names), None, settings.r * len(units)
    ranks = dict(zip(names, ranks_by_score(list(scores.values()), costs, budget, most), strict=True))
    scaling = scalings.pop() if scalings else settings.lora_alpha / root(settings.r)
    alphas = {name: round(scaling * root(r), 6) for name, r in ranks.items()}
    pattern = {name: rf"{re.escape(name)}\..*" for name in names}
    settings.rank_pattern = {pattern[name]: r for name, r in ranks.items()}
    settings.alpha_pattern = {pattern[name]: int(a) if a == int(a) else a for name, a in alphas.items()}
    spent = sum(cost * r for cost, r in zip(costs, ranks.values(), strict=True))
    return ranks, (budget, spent) if inside else None


def _select(config: PeftConfig, kept: Sequence[str], layers: Sequence[_Layer]) -> None:
    """Restrict ``config`` to the blocks ``kept``.

    Raises:
        ModelError: PEFT cannot do so.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    settings: Any = config
    numbers: dict[str, list[int]] = {}
    for name in kept:
        path, number = name.rsplit(".", 1)
        numbers.setdefault(path, []).append(int(number))
    targets = settings.target_modules
    by_number = hasattr(config, "layers_to_transform") and not isinstance(targets, str) and len(numbers) == 1
    if by_number:
        (path, indices), *_ = numbers.items()
        settings.layers_to_transform, settings.layers_pattern = indices, re.escape(path)
    if not by_number or not _finds_block(config, kept[0]):
        if not targets or targets == "all-linear":
            raise ModelError(
                f"target_modules is {targets!r}, which does not name the adapted layers.",
                fix=f"--adapter_config FOLDER with an {CONFIG} in which PEFT has filled in the names",
            )
        if hasattr(config, "layers_to_transform"):
            settings.layers_to_transform = settings.layers_pattern = None
        if not isinstance(targets, str):
            targets = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(targets)))})"
        blocks = "|".join(rf"{re.escape(path)}\.(?:{'|'.join(map(str, n))})" for path, n in numbers.items())
        settings.target_modules = rf"(?=(?:.*\.)?(?:{blocks})\.)(?:{targets})"
    wrong = [x.name for x in layers if bool(check_target_module_exists(config, x.name)) != (x.block in kept)]
    if wrong or getattr(config, "target_parameters", None):
        reason = f"its rules do not fit {wrong[0]}" if wrong else "target_parameters cannot be limited to blocks"
        raise ModelError(
            f"PEFT cannot adapt only {', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}: {reason}.",
            fix="Write target_modules by hand, as a pattern of full names.",
        )


def _finds_block(config: PeftConfig, block: str) -> bool:
    """Whether PEFT finds ``block`` by its number: before 0.21 not where the ``layers_pattern`` is how names begin."""
    from peft.tuners.tuners_utils import check_target_module_exists

    probe: Any = copy.copy(config)
    probe.target_modules = {"layer"}
    return bool(check_target_module_exists(probe, f"{block}.layer"))
