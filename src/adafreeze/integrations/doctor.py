"""Doctor: what adafreeze finds in a model, a script or a run before step 0."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import AdafreezeError, ConfigError, ModelError, RunError
from ..loop.safe import Safe
from ..memory._planner import StepPlanner
from ..memory.rehearsal import failing_module
from ..model import Flow, Stack, Unit
from ..model.backends import Backend
from ..model.blocks import base_model
from ..model.obstacles import find_obstacles, remedies
from ..model.units import some
from ..sizes import readable
from ..tasks.weightless import adapted, build, configuration, example_inputs
from .script import run

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["Finding", "examine_model", "examine_script"]


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        what: its subject.
        verdict: ``"ok"``, ``"arranged"`` (adafreeze handles it) or ``"costs"`` (memory or time; the text has the fix).
        text: one sentence.
    """

    what: str
    verdict: str
    text: str


def examine_model(model: str, task: str, adapter: PeftConfig, *, trust_remote_code: bool = False) -> list[Finding]:
    """Findings from a model's configuration and an adapter, without weights.

    Args:
        model: a name on the Hub, a folder, or a config.json.
        task: a key of ``tasks.weightless.PLANNED_TASKS``.
        adapter: its configuration.
        trust_remote_code: run code that comes with the model.

    Raises:
        AdafreezeError: the model or adapter cannot be built, or does not run on tensors without data.
    """
    config = configuration(model, trust_remote_code=trust_remote_code)

    def batch(rows: int, module: nn.Module) -> dict[str, Any]:
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return example_inputs(config, task, rows, 16, padded=True, dtype=dtype)

    try:
        built = adapted(build(config, task), adapter)
        with StepPlanner(built, batch) as planner:
            return list(_examine(built, planner.stacks, planner.units, planner.flows, planner.freezer.backend))
    except AdafreezeError:
        raise
    except Exception as error:  # from the model's own code, which may read values or use an unknown operator
        raise ModelError(
            f"{failing_module(error)} does not run on tensors without data ({type(error).__name__}: {error}).",
            fix="adafreeze doctor script.py, which looks at the real model",
        ) from error


class _SeenEnoughError(BaseException):
    """Ends a script; not an Exception, so that ``except Exception`` in the script does not catch it."""


def examine_script(script: str, arguments: Sequence[str]) -> list[Finding]:
    """Run a training script until it has made its Safe, and examine that.

    Raises:
        AdafreezeError: the script does not exist, fails, or makes no Safe.
        SystemExit: the script ends with an exit code of its own.
    """
    if not Path(script).is_file():
        raise ConfigError(f"There is no script {script} in {Path.cwd()}.", fix="adafreeze doctor path/to/script.py")
    found: list[Finding] = []

    def look(safe: Safe, model: nn.Module) -> None:
        if safe.ranks.is_main:
            found.extend(_examine_run(safe, model))
        safe.close()
        raise _SeenEnoughError

    try:
        Safe.on_made.append(look)
        run(script, arguments)
    except _SeenEnoughError:
        return found
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    except AdafreezeError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
        number = lines[-1] if lines else getattr(error, "lineno", None)
        place = "" if number is None else f" in line {number}"
        raise RunError(
            f"{script} failed{place}, before adafreeze looked at its model: {type(error).__name__}: {error}",
            fix=f"python {' '.join([script, *arguments])}, which shows the whole traceback",
        ) from error
    finally:
        Safe.on_made.remove(look)
    raise ConfigError(
        f"{script} ended without a Safe, and without training a Trainer with a SafeCallback.",
        fix="callbacks=[SafeCallback()] in its Trainer, or Safe(model, ...) before its loop",
    )


def _examine(
    model: nn.Module, stacks: list[Stack], units: Mapping[str, Unit], flows: Mapping[str, Flow], backend: Backend
) -> Iterator[Finding]:
    """Findings in a model with its adapters; ``flows`` are what is below each stack."""
    inner = base_model(model)
    named = ", ".join(f"{stack.path} ({len(stack)})" for stack in stacks)
    yield Finding("model", "ok", f"{type(inner).__name__}; blocks: {named}")

    owned = {id(p): p.numel() for unit in units.values() for p in unit.all_parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    configs = getattr(model, "peft_config", None)
    kinds = {_name(c.peft_type) for c in configs.values()} if isinstance(configs, dict) else {"adapters"}
    text = f"{len(units)} units of {'/'.join(sorted(kinds))}, {sum(owned.values()):,} parameters"
    if others:
        text += f"; also trained, to the end: {', '.join(others[:3])}" + (", ..." if len(others) > 3 else "")
    yield Finding("adapters", "ok", text)

    sites, version = [site for unit in units.values() for site in unit.sites], metadata.version("peft")
    if all(hasattr(site, "_freeze_non_trainable_peft_weights") for site in sites):
        yield Finding("PEFT", "ok", f"{version} keeps frozen adapters frozen in set_adapter and disable_adapter")
    else:
        text = "makes frozen adapters trainable again in set_adapter and disable_adapter; each pass is checked"
        yield Finding("PEFT", "arranged", f"{version} {text}")

    obstacles = find_obstacles(model, stacks, units, flows)
    for path, flow in flows.items():
        here = [obstacle for obstacle in obstacles if obstacle.stack == path]
        if here:
            names, below = some([obstacle.short for obstacle in here]), min(obstacle.block for obstacle in here)
            what = f"at most {below} blocks of {path} join it" if below else f"{path} gets none"
            text = f"{what}: {names} trains in or below the next block ({remedies(here, backend)})"
            yield Finding("frozen prefix", "costs", text)
        elif flow.live:
            text = f"{path} gets one when all of {' and '.join(flow.reads)}, which it reads, is frozen"
            yield Finding("frozen prefix", "ok", text)
        else:
            yield Finding("frozen prefix", "ok", f"the lowest blocks of {path} join it when they freeze")

    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    function = getattr(checkpointed[-1], "_gradient_checkpointing_func", None) if checkpointed else None
    if not checkpointed:
        yield Finding("checkpointing", "ok", "off")
    elif (getattr(function, "keywords", None) or {}).get("use_reentrant", False):
        text = "on, reentrant: the output of the frozen prefix is made to require grad, so that the blocks above learn"
        yield Finding("checkpointing", "arranged", text)
    else:
        yield Finding("checkpointing", "ok", "on; blocks of the frozen prefix skip it")
    if any(getattr(module, "_require_grads_hook", None) for module in model.modules()):
        text = "enable_input_require_grads makes embeddings require grad; the frozen prefix is detached from them"
        yield Finding("input gradients", "arranged", text)

    dropouts = [parent.get_submodule(key) for site in sites for parent, key in backend.dropouts(site)]
    rate = max((float(getattr(dropout, "p", 0.0)) for dropout in dropouts), default=0.0)
    text = f"{rate:g}: each target saves a dropped-out input until it freezes; lora_dropout=0 avoids this"
    yield Finding("adapter dropout", "costs", text) if rate else Finding("adapter dropout", "ok", "none")
    quantized = getattr(getattr(inner, "config", None), "quantization_config", None)
    if quantized is not None:
        method = _name(getattr(quantized, "quant_method", None) or type(quantized).__name__)
        yield Finding("quantized base", "ok", f"{method}: its adapters freeze like others")


def _name(kind: Any) -> str:
    """Of an enum of PEFT or transformers."""
    return str(getattr(kind, "value", kind))


def _examine_run(safe: Safe, model: nn.Module) -> Iterator[Finding]:
    """Findings in a run before its first step; ``model`` is as given to Safe, maybe compiled or wrapped."""
    yield from _examine(safe.model, safe.stacks, safe.units, safe.prefix.flows, safe.backend)
    compiled = sum(getattr(module, "_compiled_call_impl", None) is not None for module in safe.model.modules())
    if compiled or hasattr(model, "_orig_mod"):
        parts = f"{compiled} modules" if compiled else "the whole model"
        yield Finding("torch.compile", "arranged", f"{parts}; each freeze recompiles what it changes")
    ranks = f"{safe.ranks.size} processes" if safe.ranks.size > 1 else "one process"
    wrapper = {
        "none": "no wrapper",
        "DDP": "DistributedDataParallel; its reducer is rebuilt after each freeze",
        "FSDP2": "FSDP2; all ranks measure together",
    }.get(safe.parallel.name, safe.parallel.name)
    yield Finding("processes", "ok" if safe.parallel.name == "none" else "arranged", f"{ranks}, {wrapper}")
    probe = safe.decider.probe
    yield Finding("probe", "ok", f"{probe.samples} samples, {probe.real_tokens:,} tokens ({probe.digest()})")
    if safe.frozen and safe.config.share_at_start:
        text = f"{len(safe.frozen)} of {len(safe.units)} units; none with SafeConfig(freeze_at_start=0)"
        yield Finding("frozen at start", "ok", text)
    reason = safe.cache.off_because
    yield Finding("prefix cache", "ok" if reason is None else "costs", "on" if reason is None else f"off: {reason}")
    text = "none: the first steps have the peak of the run; SafeConfig(memory_budget=...) lowers it"
    if safe.budget is not None:
        text = f"{readable(safe.budget.limit)} from the first step"
    yield Finding("memory budget", "ok", text)
    values, defaults = safe.config.to_dict(), type(safe.config)().to_dict()
    changed = ", ".join(f"{name}={value!r}" for name, value in values.items() if value != defaults[name])
    yield Finding("run", "ok", f"{safe.total_steps} optimizer steps, settings {changed or 'all default'}")
