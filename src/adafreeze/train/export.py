"""Export: what a run found out about its blocks, as the PEFT configuration of the next run."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, RunError
from ..journal.scored_run import History
from ..tasks.adapters import CONFIG, config_for_task, make_config, saved_config

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["Export", "ExportedBlock", "export_config", "ranks_by_score"]

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportedBlock:
    """One block with adapters.

    Attributes:
        name: ``"bert.encoder.layer.3"``.
        score: the last that the run measured.
        share: of the total score.
        frozen_at: optimizer steps after which it froze; None if it trained to the end.
        kept: the next run adapts it.
        rank: its next rank; None if it is not kept, or ranks are left as they are.
    """

    name: str
    score: float
    share: float
    frozen_at: int | None
    kept: bool
    rank: int | None


@dataclass(frozen=True)
class Export:
    """The next run's configuration, and what it follows from.

    Attributes:
        config: for ``get_peft_model``, or ``config.save_pretrained(folder)``.
        blocks: all that the run adapted, in the model's order.
        parameters: of the adapters in the blocks, in the run and in the next one; None where the ranks are left as they
            are or no weights lie beside the journal.
        notes: what is worth knowing of it, a line each.
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
    """Turn the scores of a run into a PEFT configuration that adapts the blocks that matter, and no others.

    Blocks: those that trained to the end, or those with at least ``min_share`` of the total score. They are named by
    ``layers_to_transform`` and ``layers_pattern``; where PEFT cannot tell blocks by number (two stacks, a pattern as
    ``target_modules``, a method without ``layers_to_transform``), by a pattern as ``target_modules``. Adapters outside
    the blocks are carried on only if all blocks are.

    Ranks, for LoRA and DoRA: by ``ranks_by_score``, in ``rank_pattern``, with as many parameters as the run had in
    all its blocks; ``alpha_pattern`` keeps α/r (α/√r with ``use_rslora``) what it was. A rank of block b costs
    c_b = Σ (d_in + d_out) parameters over its adapted layers, and is at most the smallest d of them: both are read off
    the saved adapter. Without one, all blocks are taken to cost the same.

    Args:
        run: the output folder of ``adafreeze train``, or a journal.
        adapter_config: the folder with the run's ``adapter_config.json``; the journal's own if not given. Where that
            has none, the configuration follows from the flags in the journal.
        min_share: see above, between 0 and 1.
        keep_ranks: pick blocks alone.

    Raises:
        RunError: there is no journal, it has no scores of blocks, it is of a dry run (without ``min_share``), or there
            is no configuration of a PEFT adapter.
        ConfigError: no block has ``min_share``, or the run's ranks cannot be distributed anew.
        ModelError: PEFT cannot address the blocks.
    """
    if min_share is not None and not 0 < min_share < 1:
        raise ConfigError(
            f"--min_share is {min_share}.", cause="It is a share of the total score.", fix="--min_share 0.05"
        )
    history = History.of(run)
    folder = Path(adapter_config).expanduser() if adapter_config is not None else history.path.parent
    written = adapter_config is not None or (folder / CONFIG).is_file()
    config = saved_config(folder) if written else _config_by_flags(history)
    lora = _kind(config) == "lora"
    sites = _sites(folder / WEIGHTS, history.units) if lora and (folder / WEIGHTS).is_file() else []
    kept, notes = history.kept(min_share), list(history.notes())
    ranks: dict[str, int] = {}
    parameters = None
    if lora and not keep_ranks:
        ranks, parameters = _distribute(config, {name: history.scores[name] for name in kept}, history.units, sites)
    elif not lora:
        notes.append(f"The method {_kind(config)} has no ranks to distribute: the blocks are picked, and that is all.")
    if _kind(config) == "adalora":
        # What its own allocation came to: the next run's starts anew.
        config.rank_pattern = None  # type: ignore[attr-defined]
    if len(kept) < len(history.units):
        _address(config, kept, sites)
        outside = [site.module for site in sites if not site.block]
        if outside:
            notes.append(f"Adapters outside the blocks are left out: {', '.join(outside[:3])}.")
    blocks = tuple(
        ExportedBlock(name, score, history.share(name), history.frozen.get(name), name in kept, ranks.get(name))
        for name, score in history.scores.items()
    )
    return Export(config, blocks, parameters, tuple(notes))


def ranks_by_score(
    scores: Sequence[float], costs: Sequence[int], budget: int, most: Sequence[int] | None = None
) -> list[int]:
    """Ranks in proportion to scores, at a given number of parameters.

    r_b = max(1, min(λ s_b, m_b)), with λ such that Σ c_b r_b is the budget; then rounded down, and what that leaves is
    given out by the largest remainder. Where all c_b are equal the sum is the budget; else it falls short by less than
    the largest c_b. All m_b, or 1 everywhere, is what it comes to where the budget lies beyond them.

    Args:
        scores: s_b ≥ 0; all zero counts as all equal.
        costs: c_b, parameters of one rank.
        budget: parameters.
        most: m_b, beyond which a rank adds nothing; none if not given.

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
    for _ in range(200):  # by halves, to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if spent(ranks(middle)) <= budget else (low, middle)
    exact = [value + 1e-9 for value in ranks(low)]
    whole = [math.floor(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i]):
        if exact[index] - whole[index] > 1e-6 and spent(whole) + costs[index] <= budget:
            whole[index] += 1
    return whole


def _config_by_flags(history: History) -> PeftConfig:
    """The adapter as ``adafreeze train`` makes it from the flags in the journal."""
    from ..tasks.weightless import PLANNED_TASKS

    given: Any = history.settings
    if given is None:
        raise RunError(
            f"There is no {CONFIG} in {history.path.parent}.",
            cause="The journal is of a script of your own, and does not say how its adapters were set up.",
            fix="--adapter_config FOLDER, where the trained adapter was saved",
        )
    task_type = PLANNED_TASKS[history.task][1] if history.task is not None else None
    if given.get("adapter_config"):
        return config_for_task(saved_config(Path(given["adapter_config"])), task_type)
    config = make_config(
        given.get("adapter", "lora"),
        task_type,
        r=given.get("adapter_r"),
        alpha=given.get("adapter_alpha"),
        dropout=given.get("adapter_dropout"),
        target_modules=given.get("target_modules"),
        total_steps=history.total_steps,
        options=json.loads(given.get("adapter_kwargs", "{}")),
    )
    config.base_model_name_or_path = given["model_name_or_path"]
    return config


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


@dataclass
class _Site:
    """A layer with LoRA: its name, its block ("" if in none), and elements of A and of B as they were saved."""

    module: str
    block: str
    elements: dict[str, int]


def _sites(weights: Path, units: Sequence[str]) -> list[_Site]:
    """What the saved adapter consists of, by the header of its file alone."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, _Site] = {}
    try:
        with safe_open(weights, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
                if match:
                    block = next((unit for unit in units if f"{match[1]}.".startswith(f"{unit}.")), "")
                    site = found.setdefault(match[1], _Site(match[1], block, {}))
                    site.elements[match[2]] = math.prod(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{weights} cannot be read ({error}).",
            cause="It is damaged, or was not written to its end.",
            fix="--adapter_config path/to/a/whole/copy, or --keep_ranks on the journal alone",
        ) from error
    return list(found.values())


def _distribute(
    config: PeftConfig, scores: Mapping[str, float], units: Sequence[str], sites: Sequence[_Site]
) -> tuple[dict[str, int], tuple[int, int] | None]:
    """Set the ranks of ``config`` by ``scores``; these, and parameters before and after, where ``sites`` are known."""
    from peft.utils.other import get_pattern_key

    settings: Any = config
    root = math.sqrt if settings.use_rslora else float

    def of(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
        return pattern.get(get_pattern_key(list(pattern), module), default)

    inside = [site for site in sites if site.block]
    rank = {site.module: of(settings.rank_pattern, site.module, settings.r) for site in inside}
    scalings = {of(settings.alpha_pattern, name, settings.lora_alpha) / root(r) for name, r in rank.items()}
    mixed = any(len({rank[site.module] for site in inside if site.block == unit}) > 1 for unit in units)
    unknown = not inside and bool(settings.rank_pattern or settings.alpha_pattern)
    if mixed or unknown or (scalings and max(scalings) - min(scalings) > 1e-6 * max(scalings)):
        raise ConfigError(
            "The ranks of this run cannot be distributed anew.",
            cause=f"It has a rank_pattern, and no {WEIGHTS} lies beside it to say which layers that meant."
            if unknown
            else "Its rank_pattern or alpha_pattern gives the layers of one block different ranks or scalings.",
            fix="--keep_ranks, to pick blocks alone",
        )
    names = list(scores)
    if inside:
        costs = [sum(sum(s.elements.values()) // rank[s.module] for s in inside if s.block == name) for name in names]
        most = [min(min(s.elements.values()) // rank[s.module] for s in inside if s.block == name) for name in names]
        budget = sum(sum(site.elements.values()) for site in inside)
    else:
        costs, most, budget = [1] * len(names), None, settings.r * len(units)
    ranks = dict(zip(names, ranks_by_score(list(scores.values()), costs, budget, most), strict=True))
    scaling = scalings.pop() if scalings else settings.lora_alpha / root(settings.r)
    alphas = {name: round(scaling * root(r), 6) for name, r in ranks.items()}
    settings.rank_pattern = {_within(name): r for name, r in ranks.items()}
    settings.alpha_pattern = {_within(name): int(a) if a == int(a) else a for name, a in alphas.items()}
    spent = sum(cost * r for cost, r in zip(costs, ranks.values(), strict=True))
    return ranks, (budget, spent) if inside else None


def _within(block: str) -> str:
    return rf"{re.escape(block)}\..*"


def _address(config: PeftConfig, kept: Sequence[str], sites: Sequence[_Site]) -> None:
    """Let ``config`` adapt the blocks ``kept``, and no others.

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
    if hasattr(config, "layers_to_transform") and not isinstance(targets, str) and len(numbers) == 1:
        (path, indices), *_ = numbers.items()
        settings.layers_to_transform, settings.layers_pattern = indices, re.escape(path)
    elif targets and targets != "all-linear":
        if hasattr(config, "layers_to_transform"):
            settings.layers_to_transform = settings.layers_pattern = None
        if not isinstance(targets, str):
            targets = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(targets)))})"
        blocks = "|".join(rf"{re.escape(path)}\.(?:{'|'.join(map(str, n))})" for path, n in numbers.items())
        settings.target_modules = rf"(?=(?:.*\.)?(?:{blocks})\.)(?:{targets})"
    else:
        raise ModelError(
            f"Which layers carry adapters is not known: target_modules is {targets!r}.",
            cause="It depends on the model, and the blocks of this run can only be told apart by a pattern of names.",
            fix=f"--adapter_config FOLDER, whose {CONFIG} has the names that PEFT put in their place",
        )
    wrong = [s.module for s in sites if bool(check_target_module_exists(config, s.module)) != (s.block in kept)]
    if wrong or getattr(config, "target_parameters", None):
        raise ModelError(
            f"PEFT cannot adapt just {', '.join(kept[:3])}" + (", ..." if len(kept) > 3 else "."),
            cause=f"Its rules for names take {wrong[0]} wrongly." if wrong else "target_parameters go by no block.",
            fix="Write target_modules by hand, as a pattern of full names.",
        )
