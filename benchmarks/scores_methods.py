"""The runs of benchmarks/scores.py: plain LoRA, with all scores read on the way."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from adafreeze import SafeConfig
from adafreeze.measure import Probe, Scorer
from adafreeze.measure.draw import collect
from adafreeze.methods import Setup
from adafreeze.methods.plain import Plain
from adafreeze.model import find_stacks, find_units
from adafreeze.model.backends import Backend, find_backend
from adafreeze.model.blocks import device_of, quiet
from adafreeze.model.restore import keep_random_state

PACKAGED = ("cka", "cka_debiased", "local_cka", "grad_norm", "weight_change", "random")
READ_AT = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the run
PROBE_TOKENS = 2048
ABLATION_CHUNKS = 16  # of 8 samples: losses vary more than representations


class Scored(Plain):
    """Plain; the scores go to scores.json beside the run's journal."""

    name = "scored"

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Add the callback that reads them."""
        setup.training.eval_on_start = True  # a callback sees the held-out rows from the first evaluation on
        setup.callbacks.append(_Read(setup.training.seed))


def drawn(model: nn.Module, loader: Any, seed: int) -> list[dict[str, Any]]:
    """Samples to ablate on, in chunks."""
    return collect(loader, 10**6, seed, getattr(model.config, "pad_token_id", None))[:ABLATION_CHUNKS]


def ablated(
    model: nn.Module, backend: Backend, modules: list[nn.Module], chunks: list[dict[str, Any]]
) -> list[list[float]]:
    """Losses by chunk with the adapters of the lowest k modules off (k = 0, 1, ...)."""
    device = device_of(model)

    def losses(off: list[nn.Module]) -> list[float]:
        found = []
        with ExitStack() as undo:
            undo.enter_context(torch.no_grad())
            undo.enter_context(quiet(model))
            for module in off:
                undo.enter_context(backend.adapters_off(module))
            for chunk in chunks:
                moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in chunk.items()}
                found.append(float(model(**moved).loss))
        return found

    return [losses(modules[:count]) for count in range(len(modules) + 1)]


class _Read(TrainerCallback):
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.readings: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the probes, and take the references of the packaged scores."""
        self.model = model = kwargs["model"]
        self.stacks, self.backend = find_stacks(model), find_backend(model)
        self.units = find_units(model, self.stacks, self.backend)
        self.at = {max(1, round(share * state.max_steps)): share for share in READ_AT}
        pad = getattr(model.config, "pad_token_id", None)
        with keep_random_state():
            probe = Probe.draw(kwargs["train_dataloader"], PROBE_TOKENS, self.seed, pad)
            self.probes = {"train": drawn(model, kwargs["train_dataloader"], self.seed)}
            self.scorers = {}
            for name in PACKAGED:
                config = SafeConfig(score=name, overhead=1.0, seed=self.seed)
                self.scorers[name] = Scorer(model, self.stacks, self.units, self.backend, config, probe)
                self.scorers[name].begin()
                self.scorers[name].prepare(10**6, len(READ_AT))
        # Sums over steps since the last reading, by unit: gradient times weight of B, and |gradient|.
        self.sums: dict[str, dict[str, float]] = {"first_order": defaultdict(float), "potential": defaultdict(float)}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read gradients when they pass by."""
        for scorer in self.scorers.values():
            scorer.listen()
        with torch.no_grad():
            for name, unit in self.units.items():
                for parameter, is_b in self._factors(unit):
                    if parameter.grad is None:
                        continue
                    if is_b:  # with B = 0 the loss changes by −gradient · B, to first order
                        self.sums["first_order"][name] -= float((parameter.grad * parameter).sum())
                    self.sums["potential"][name] += float(parameter.grad.abs().sum())

    @staticmethod
    def _factors(unit: Any) -> list[tuple[nn.Parameter, bool]]:
        return [
            (parameter, name == "lora_B")
            for site in unit.sites
            for name in ("lora_A", "lora_B")
            for parameter in getattr(site, name).parameters()
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read all scores at the steps to read at."""
        if state.global_step not in self.at:
            return
        with keep_random_state():
            if "held_out" not in self.probes:
                self.probes["held_out"] = drawn(self.model, kwargs["eval_dataloader"], self.seed)
            found: dict[str, Any] = {name: scorer.measure({}) for name, scorer in self.scorers.items()}
            modules = [unit.module for unit in self.units.values()]
            for name, chunks in self.probes.items():
                found[f"ablation_{name}"] = ablated(self.model, self.backend, modules, chunks)
        found |= {name: dict(sums) for name, sums in self.sums.items()}
        for sums in self.sums.values():
            sums.clear()
        self.readings[str(self.at[state.global_step])] = {"step": state.global_step, **found}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them."""
        found = {"units": list(self.units), "readings": self.readings}
        Path(args.output_dir, "scores.json").write_text(json.dumps(found) + "\n")
