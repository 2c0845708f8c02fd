"""Doctor: what adafreeze finds in a model and in a run, and what it makes of it, before step 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import nn

from ..loop.safe import Safe
from ..model import Flow, Stack, Unit
from ..model.backends import Backend
from ..model.obstacles import find_obstacles, remedies
from ..model.units import some
from ..sizes import readable

__all__ = ["Finding", "examine", "examine_run"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: it is.
        verdict: ``"ok"``, ``"arranged"`` (adafreeze sees to it) or ``"costs"`` (memory or time, and what to change).
        text: what was found.
    """

    what: str
    verdict: str
    text: str


def examine(
    model: nn.Module, stacks: list[Stack], units: Mapping[str, Unit], flows: Mapping[str, Flow], backend: Backend
) -> Iterator[Finding]:
    """What can be known of a model with its adapters.

    Args:
        model: as the host calls it.
        stacks: of the model.
        units: by name.
        flows: what stands below each stack.
        backend: knows the adapters.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    named = ", ".join(f"{stack.path} ({len(stack)})" for stack in stacks)
    yield Finding("model", "ok", f"{type(inner).__name__}; blocks: {named}")
    yield _units(model, units)
    yield _peft(units)
    obstacles = find_obstacles(model, stacks, units, flows)
    for path, flow in flows.items():
        here = [obstacle for obstacle in obstacles if obstacle.stack == path]
        below = min((obstacle.block for obstacle in here), default=None)
        if below is not None:
            names = some([obstacle.short for obstacle in here])
            what = f"at most {below} blocks of {path} join it" if below else f"{path} gets none"
            change = remedies(here, backend)
            yield Finding("frozen prefix", "costs", f"{what}: {names} trains in or below the next ({change})")
        elif flow.live:
            sources = " and ".join(flow.reads)
            yield Finding("frozen prefix", "ok", f"{path} gets one when all of {sources} is frozen, which it reads")
        else:
            yield Finding("frozen prefix", "ok", f"the lowest blocks of {path} stop costing when they freeze")
    yield _checkpointing(model)
    hooked = [m for m in model.modules() if getattr(m, "_require_grads_hook", None)]
    if hooked:
        text = "embeddings are made to require grad (enable_input_require_grads); the frozen prefix is detached from it"
        yield Finding("input gradients", "arranged", text)
    yield _dropout(units, backend)
    quantised = getattr(getattr(inner, "config", None), "quantization_config", None)
    if quantised is not None:
        method = getattr(quantised, "quant_method", None) or type(quantised).__name__
        yield Finding("quantised base", "ok", f"{getattr(method, 'value', method)}: its adapters freeze as others do")


def examine_run(safe: Safe, model: nn.Module | None = None) -> Iterator[Finding]:
    """What can be known of a run that is about to start.

    Args:
        safe: made, before its first step.
        model: as it was handed to Safe: compiled, or wrapped.
    """
    yield from examine(safe.model, safe.stacks, safe.units, safe.prefix.flows, safe.backend)
    compiled = [m for m in safe.model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    if compiled or hasattr(model, "_orig_mod"):
        parts = f"{len(compiled)} modules" if compiled else "the whole model"
        yield Finding("torch.compile", "arranged", f"{parts}; what a freeze changes is compiled once more")
    ranks = f"{safe.ranks.size} processes" if safe.ranks.size > 1 else "one process"
    text = {
        "none": "no wrapper",
        "DDP": "DistributedDataParallel; its reducer is built anew after each freeze",
        "FSDP2": "FSDP2; all ranks measure together",
    }.get(safe.parallel.name, safe.parallel.name)
    yield Finding("processes", "ok" if safe.parallel.name == "none" else "arranged", f"{ranks}, {text}")
    probe = safe.decider.probe
    yield Finding("probe", "ok", f"{probe.samples} samples, {probe.real_tokens:,} tokens ({probe.digest()})")
    if safe.frozen and safe.config.share_at_start:
        text = f"{len(safe.frozen)} of {len(safe.units)} units; none with SafeConfig(freeze_at_start=0)"
        yield Finding("frozen at start", "ok", text)
    reason = safe.cache.off_because
    yield Finding("prefix cache", "ok" if reason is None else "costs", "on" if reason is None else f"off: {reason}")
    if safe.budget is None:
        text = "none: the peak of the run is that of its first steps; SafeConfig(memory_budget=...) lowers it"
        yield Finding("memory budget", "ok", text)
    else:
        yield Finding("memory budget", "ok", f"{readable(safe.budget.limit)} from the first step on")
    yield Finding("run", "ok", f"{safe.total_steps} optimizer steps, settings {_changed(safe)}")


def _changed(safe: Safe) -> str:
    defaults = type(safe.config)().to_dict()
    changed = {name: value for name, value in safe.config.to_dict().items() if value != defaults[name]}
    return ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "as by default"


def _units(model: nn.Module, units: Mapping[str, Unit]) -> Finding:
    owned = {id(p): p.numel() for unit in units.values() for p in (*unit.parameters(), *unit.shared_parameters())}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    kinds = sorted({getattr(c.peft_type, "value", str(c.peft_type)) for c in _configs(model)})
    text = f"{len(units)} units of {'/'.join(kinds) or 'adapters'}, {sum(owned.values()):,} parameters"
    if others:
        text += f"; trained to the end beside them: {', '.join(others[:3])}" + (", ..." if len(others) > 3 else "")
    return Finding("adapters", "ok", text)


def _peft(units: Mapping[str, Unit]) -> Finding:
    holds = all(hasattr(site, "_freeze_non_trainable_peft_weights") for unit in units.values() for site in unit.sites)
    text = f"{metadata.version('peft')} " + (
        "keeps frozen adapters frozen through set_adapter and disable_adapter"
        if holds
        else "makes frozen adapters trainable again in set_adapter and disable_adapter; each pass is audited"
    )
    return Finding("PEFT", "ok" if holds else "arranged", text)


def _configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _checkpointing(model: nn.Module) -> Finding:
    on = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if not on:
        return Finding("checkpointing", "ok", "off")
    keywords = getattr(getattr(on[-1], "_gradient_checkpointing_func", None), "keywords", None) or {}
    if keywords.get("use_reentrant", False):
        text = "on, reentrant: the output of the frozen prefix is made to require grad, or nothing above it would learn"
        return Finding("checkpointing", "arranged", text)
    return Finding("checkpointing", "ok", "on; blocks of the frozen prefix leave it")


def _dropout(units: Mapping[str, Unit], backend: Backend) -> Finding:
    rates = {
        float(getattr(parent.get_submodule(key), "p", 0.0))
        for unit in units.values()
        for site in unit.sites
        for parent, key in backend.dropouts(site)
    }
    if any(rates):
        text = (
            f"{max(rates):g}: each target keeps a dropped copy of its input until it freezes; lora_dropout=0 keeps none"
        )
        return Finding("adapter dropout", "costs", text)
    return Finding("adapter dropout", "ok", "none")
