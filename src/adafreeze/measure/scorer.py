"""Scorer: measures the units on the probe, within a budget of FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..config import SafeConfig
from ..costs.flops import CountFlops
from ..decide.cka import cka_flops
from ..decide.scores import Score, resolve_score
from ..errors import ProbeError, warn
from ..model import Stack, Unit
from ..model.backends import Backend
from ..model.batch import CHUNK, tensors_as_text, tensors_of_text
from .probe import Probe

__all__ = ["Scorer"]

# More measurements than this change no decision.
MOST_MEASUREMENTS = 24
# A score below this is the rounding error of the score itself, in float64.
SMALLEST = 1e-14
# The least useful probe; a run of a few steps exceeds its overhead for it.
LEAST_SAMPLES = 2
# The most that an adapter at rest changes a block's output, by rounding: relative, and in units of eps in half
# precision.
ROUNDING = 1e-5
HALF_ROUNDING = 2


@dataclass(eq=False)
class Scorer:
    """Scores of all units, measured on one probe, relative to the model as training began.

    Where the adapters are at rest at that time (LoRA with B = 0), that is the model with its adapters switched off.
    Otherwise (PiSSA, OLoRA, an adapter that is trained further) ``begin`` copies the trainable weights to the host, and
    the reference is taken with the copies in place.

    ``prepare`` fixes the size of the probe and the number of measurements from counted FLOPs alone, so that freeze
    steps do not depend on the machine's speed:

        cost(S, N) = (1 + N)·P(S)·f + N·Σ_units cka_flops(n(S), d) + floor  ≤  overhead · 2·f·R

    with f the forward FLOPs of one token (counted on a few samples), S the samples of the probe, P(S) their tokens with
    padding, n(S) the tokens looked at, and R the tokens that the run trains on, without padding. The right side is a
    lower bound of the plain run's FLOPs: its backward pass costs at least its forward pass.

    Args:
        model: as the host calls it.
        stacks: in data-flow order.
        units: by name.
        backend: switches adapters off.
        config: score, probe size, budget.
        probe: the drawn samples.
        collective: a forward pass must run to its end, on all ranks.

    Attributes:
        at_rest: the adapters had no effect when training began, or that is unknown.
    """

    model: nn.Module
    stacks: list[Stack]
    units: Mapping[str, Unit]
    backend: Backend
    config: SafeConfig
    probe: Probe
    collective: bool = False

    def __post_init__(self) -> None:
        self.score: Score = resolve_score(self.config.score)
        self.seed = self.config.seed
        self.flops_spent = 0
        self.flops_per_measurement = 0
        self.floor: dict[str, float] = {}
        self.at_rest = True
        self.resumed = False
        self._references: dict[str, Any] = {}
        self._began: dict[str, Tensor] = {}
        self._gradients: dict[str, float] = dict.fromkeys(self.units, 0.0)
        self._prefix: Mapping[str, int] = {}

    def with_probe(self, probe: Probe) -> Scorer:
        """A scorer of the same model that has measured nothing yet."""
        return replace(self, probe=probe)

    @property
    def runs_model(self) -> bool:
        """Whether a measurement takes forward passes on the probe."""
        return self.score.reads == "outputs"

    @property
    def nbytes(self) -> int:
        """Host memory of references, weights at the start, and the prefix's output."""
        stored = (*self._references.values(), *self._began.values())
        return self.probe.nbytes + sum(getattr(one, "nbytes", 0) for one in stored)

    def begin(self) -> None:
        """Check before the first optimizer step whether the adapters are at rest, and copy the weights that count.

        Two passes over one sample, and none if every LoRA B is zero.
        """
        if not self.runs_model or self.backend.any_merged():
            return
        self.at_rest = (not self.collective and self._is_zero()) or self._changes_nothing()
        kept = self._trained() if self.score.reference == "start" or not self.at_rest else ()
        self._began = {} if self.collective else {name: p.detach().to("cpu", copy=True) for name, p in kept}

    def prepare(self, run_samples: int, most: int) -> int:
        """Fit the probe to the budget and take the reference. Returns the number of measurements to take.

        Args:
            run_samples: samples that the whole run trains on, repetitions included.
            most: steps at which a measurement can be taken.

        Raises:
            ProbeError: the references would not fit into memory.
        """
        if not self.runs_model:
            if self.score.reads == "weights" and not self._references:
                self._references = self.weights()
            if not self.resumed:
                self._gradients = dict.fromkeys(self.units, 0.0)  # the first interval begins here
            return min(most, MOST_MEASUREMENTS)
        if self.collective and not self.at_rest:
            warn(
                "Scores are relative to the pre-trained model, although the adapters had an effect when training "
                "began: this rank holds only a shard of each weight.",
                fix="Use adapters that start at zero, such as LoraConfig(init_lora_weights=True), or DDP.",
            )
            self.at_rest = True
        probe = self.probe
        affordable_samples = self.config.overhead * 2 * run_samples
        head = probe.head(max(LEAST_SAMPLES, min(CHUNK, int(affordable_samples / 20))))
        with CountFlops() as count:
            together = self._gather(head)
        self.flops_spent += 2 * count.total  # this pass, and the same samples again for the floor
        per_token = count.total / head.padded_tokens
        shapes = [tensors[-1].shape for tensors in together.values()]  # stages differ in tokens and features
        forward = per_token / (2 if self._is_local else 1)
        budget = affordable_samples * forward * probe.real_tokens / probe.samples

        def looked_at(tokens: int, samples: int) -> int:
            return min(probe.tokens, int(tokens / head.samples * samples))

        def cost(samples: int, measurements: int) -> float:
            passing = samples * probe.padded_tokens / probe.samples * per_token
            comparing = sum(cka_flops(looked_at(tokens, samples), features) for tokens, features in shapes)
            return (1 + measurements) * passing + measurements * comparing + 2 * count.total

        least = min(self.config.min_measurements, most)
        samples = probe.samples
        while samples > LEAST_SAMPLES and cost(samples, least) > budget:
            samples -= 1
        self.probe = probe.shrunk(samples)
        affordable = least
        while affordable < min(most, MOST_MEASUREMENTS) and cost(samples, affordable + 1) <= budget:
            affordable += 1
        self._check_memory([(looked_at(tokens, samples), features) for tokens, features in shapes])
        self._take_floor(head, together)
        if self.score.reference == "start":
            self._take_references()
        self.flops_per_measurement = int(cost(samples, 1) - cost(samples, 0))
        return affordable

    def state_dict(self, *, measures_again: bool = True) -> dict[str, Any]:
        """What a resumed run cannot measure again, as plain JSON values; weights as base64 safetensors.

        Args:
            measures_again: include the weights at the start, which only further measurements need.
        """
        return {
            "samples": self.probe.samples,
            "floor": dict(self.floor),
            "gradients": dict(self._gradients),
            "references": tensors_as_text(self._references) if not self.runs_model else None,
            "began": tensors_as_text(self._began) if self._began and measures_again else None,
            "at_rest": self.at_rest,
            "flops_spent": self.flops_spent,
            "flops_per_measurement": self.flops_per_measurement,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, measures_again: bool = True) -> None:
        """Continue where ``state_dict`` was written, on the same probe; takes the references again if needed."""
        self.load_unmeasurable(state)
        if self.runs_model and self.score.reference == "start" and measures_again:
            spent = self.flops_spent
            self._take_references()
            self.flops_spent = spent
        self.floor, self.flops_per_measurement = dict(state["floor"]), state["flops_per_measurement"]

    def load_unmeasurable(self, state: Mapping[str, Any]) -> None:
        """Load only what cannot be measured again; ``prepare`` may follow."""
        self.resumed = True
        self.at_rest = state["at_rest"]
        self._began = tensors_of_text(state["began"]) if state["began"] is not None else {}
        if state["references"] is not None:
            self._references = dict(tensors_of_text(state["references"]))
        self._gradients, self.flops_spent = dict(state["gradients"]), state["flops_spent"]

    def measure(self, prefix: Mapping[str, int]) -> dict[str, float]:
        """The score of each unit above ``prefix`` now; NaN where an activation is not finite.

        Scores at or below the rounding error (measured on the same tokens in other batches) are 0.
        """
        self._prefix = prefix
        with CountFlops() as count:
            captured = self.score.capture(self)
            if self.score.reference is None:
                pairs = {
                    name: (self._prepared(self._on_device(before)), now) for name, (before, now) in captured.items()
                }
            else:
                pairs = {n: (self._references[n], now) for n, now in captured.items() if n in self._references}
            scores = {n: float(self.score.compare(before, self._on_device(now))) for n, (before, now) in pairs.items()}
        if self.score.reference == "previous" and captured:
            self._references = dict(captured)
        if not self.runs_model:
            return scores
        self.flops_spent += count.total
        return {name: 0.0 if score <= self.floor.get(name, SMALLEST) else score for name, score in scores.items()}

    def listen(self) -> None:
        """Add up the gradient norms, between backward pass and optimizer step."""
        if self.score.reads != "gradients":
            return
        for name, unit in self.units.items():
            squares = [float(p.grad.detach().float().pow(2).sum()) for p in unit.parameters() if p.grad is not None]
            self._gradients[name] += math.sqrt(sum(squares))

    # What a score can capture.

    def names(self) -> list[str]:
        """The names of all units."""
        return list(self.units)

    def outputs(self) -> dict[str, Tensor]:
        """Outputs of the units above the prefix on the probe, of shape (tokens, features), on the host."""
        return {name: tensors[-1] for name, tensors in self._measured_outputs().items()}

    def local_outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The same without and with the unit's own adapter, on the same input."""
        return {name: (without, now) for name, (without, now) in self._measured_outputs().items()}

    def _measured_outputs(self) -> dict[str, list[Tensor]]:
        # A unit in the prefix keeps its score, also if this pass runs the prefix to record its output.
        above = {name: unit for name, unit in self.units.items() if unit.block >= self._prefix.get(unit.stack, 0)}
        return self._gather(self.probe, prefix=self._prefix, units=above)

    def weights(self) -> dict[str, Tensor]:
        """The flattened parameters of the live units, in float32 on the host."""
        return {
            name: torch.cat([p.detach().float().flatten().cpu() for p in unit.parameters()])
            for name, unit in self._live().items()
        }

    def gradient_norms(self) -> dict[str, Tensor]:
        """The summed gradient norms of the live units since the last call; empty if there was no gradient."""
        norms, self._gradients = self._gradients, dict.fromkeys(self.units, 0.0)
        return {name: torch.tensor(norms[name]) for name in self._live()} if any(norms.values()) else {}

    def _live(self) -> dict[str, Unit]:
        return {name: unit for name, unit in self.units.items() if any(p.requires_grad for p in unit.parameters())}

    @property
    def _is_local(self) -> bool:
        return self.runs_model and self.score.reference is None

    def _take_references(self) -> None:
        with CountFlops() as count, self._as_it_began():
            before = self._gather(self.probe, adapters=not self.at_rest)
        self.flops_spent += count.total
        for name, tensors in before.items():
            self._references[name] = self._prepared(tensors[-1])

    def _prepared(self, before: Any) -> Any:
        return self.score.prepare(before, self.config.normalize_rows)

    def _is_zero(self) -> bool:
        """Whether every adapter is LoRA with B = 0, which needs no pass to check."""

        def factors(site: nn.Module) -> list[Tensor]:
            found = [getattr(site, name, None) for name in ("lora_B", "lora_embedding_B")]
            single = [one for one in found if isinstance(one, Tensor)]
            return [*single, *(p for one in found if isinstance(one, nn.Module) for p in one.parameters())]

        every = [factors(site) for unit in self.units.values() for site in unit.sites]
        return all(some and all(one.numel() and not one.any() for one in some) for some in every)

    def _changes_nothing(self) -> bool:
        """Whether one sample's block outputs are the same with adapters on and off, up to rounding."""
        one = self.probe.head(1)
        with CountFlops() as count:
            on, off = (self._gather(one, adapters=adapters, local=False) for adapters in (True, False))
        self.flops_spent += count.total
        for name in on.keys() & off.keys():
            with_it, without = (tensors[name][-1] for tensors in (on, off))
            half = with_it.dtype in (torch.float16, torch.bfloat16)
            bound = HALF_ROUNDING * torch.finfo(with_it.dtype).eps if half else ROUNDING
            difference = (with_it.float() - without.float()).norm()
            if not difference <= bound * without.float().norm():
                return False
        return True

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that a reference needs as they were at the start.

        That is all that trains; with adapters at rest, only what trains beside them. Adapters that are switched off and
        ``modules_to_save`` have no effect on a reference then, but unfrozen biases and norms do.
        """
        owned = {id(p) for unit in self.units.values() for p in unit.all_parameters()}
        for name, parameter in self.model.named_parameters():
            beside = id(parameter) not in owned and ".modules_to_save." not in name
            if parameter.requires_grad and (beside or not self.at_rest):
                yield name, parameter

    @contextmanager
    def _as_it_began(self, within: nn.Module | None = None) -> Iterator[None]:
        """Swap the weights of the start into ``within``, or the model; swap back at the end."""
        inside = None if within is None else {id(p) for p in within.parameters()}
        swapped = [
            (p, p.detach().clone(), self._began[name])
            for name, p in (self.model.named_parameters() if self._began else ())
            if name in self._began and (inside is None or id(p) in inside)
        ]
        try:
            for parameter, _, before in swapped:
                parameter.data.copy_(before)
            yield
        finally:
            for parameter, now, _ in swapped:
                parameter.data.copy_(now)

    def _without(self, unit: Unit) -> AbstractContextManager[None]:
        """``unit`` without what it learned in this run."""
        return self.backend.adapters_off(unit.module) if self.at_rest else self._as_it_began(unit.module)

    def _gather(
        self,
        probe: Probe,
        *,
        adapters: bool = True,
        prefix: Mapping[str, int] | None = None,
        units: Mapping[str, Unit] | None = None,
        local: bool | None = None,
    ) -> dict[str, list[Tensor]]:
        local = self._is_local if local is None else local
        chunks: dict[str, list[list[Tensor]]] = {}
        run = probe.outputs(
            self.model, self.stacks, self.units if units is None else units, self.backend,
            adapters=adapters, without=self._without if local else None, prefix=prefix, to_the_end=self.collective,
        )  # fmt: skip
        for taken in run:
            for name, tensors in taken.items():
                chunks.setdefault(name, []).append(tensors)
        return {name: [torch.cat(parts) for parts in zip(*pieces, strict=True)] for name, pieces in chunks.items()}

    def _on_device(self, captured: Any) -> Any:
        """Outputs are compared where the model is."""
        return captured.to(next(self.model.parameters()).device) if self.runs_model else captured

    def _take_floor(self, head: Probe, together: dict[str, list[Tensor]]) -> None:
        """What rounding alone scores: the same samples, in one batch and one by one."""
        alone = self._gather(head.one_by_one())
        for name, tensors in together.items():
            if len(tensors[-1]) >= 4 and name in alone:  # the debiased estimator needs four tokens
                score = float(self.score.compare(self._prepared(tensors[-1]), alone[name][-1]))
                self.floor[name] = max(score, SMALLEST) if math.isfinite(score) else SMALLEST

    def _check_memory(self, shapes: list[tuple[int, int]]) -> None:
        needed = sum(2 * 4 * tokens * features for tokens, features in shapes)  # before and after, float32
        free = psutil.virtual_memory().available
        if needed > free / 2:
            tokens = max(shapes)[0]
            raise ProbeError(
                f"The probe of {tokens:,} tokens needs {needed / 2**20:,.0f} MiB of host memory, more than half of the "
                f"{free / 2**20:,.0f} MiB that are free.",
                fix=f"SafeConfig(probe_tokens={max(64, int(tokens * free / 4 / needed))})",
            )
