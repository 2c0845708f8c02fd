"""Scoring: measures the units on the probe, within a budget of FLOPs."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..config import SafeConfig
from ..costs.flops import CountFlops
from ..decide.cka import cka_flops
from ..decide.scores import Score, random_score, resolve_score
from ..errors import ProbeError, warn
from ..model import Stack, Unit
from ..model.backends import Backend
from ..model.batch import CHUNK
from . import Probe

__all__ = ["Scorer"]

# More measurements than this change no decision; the budget they leave is the user's.
MOST_MEASUREMENTS = 24
# A score below this is the rounding of the score itself, in float64.
SMALLEST = 1e-14
# Fewer samples than this say nothing; a run of a few steps pays more than its share for them.
LEAST_SAMPLES = 2
# An adapter at rest changes a block's output by rounding alone: relative, in float32 and in half precision.
ROUNDING = 1e-5
HALF_ROUNDING = 2


class Scorer:
    """Scores of all units, measured on one probe, against the model as the run began.

    Where the adapters are at rest by then (LoRA with B = 0), that is the model with its adapters switched off. Else
    (PiSSA, OLoRA, an adapter that is trained further) it is the model with the weights that trained then: ``begin``
    keeps a copy on the host, and they are put in their places while the reference is taken.

    ``prepare`` fixes how large the probe is and how many measurements the run affords, from counted FLOPs
    alone, so that freeze steps do not depend on the machine's speed:

        cost(S, N) = (1 + N)·P(S)·f + N·Σ_units cka_flops(n(S), d) + floor  ≤  overhead · 2·f·R

    with f the forward FLOPs of one token (counted on a few samples), S the samples of the probe, P(S) their
    tokens with padding, n(S) the tokens looked at, and R the tokens that the run trains on, without padding. The
    right side is less than the plain run spends: its backward pass costs at least its forward pass.

    Args:
        model: as the host calls it.
        stacks: in data-flow order.
        units: by name.
        backend: switches adapters off.
        config: score, probe size, budget.
        probe: the drawn samples.
        collective: a forward pass must run to its end, on all ranks.

    Attributes:
        at_rest: the adapters had no effect as the run began, or nobody knows better.
        goes_on: it has taken up what an earlier process knew.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: list[Stack],
        units: Mapping[str, Unit],
        backend: Backend,
        config: SafeConfig,
        probe: Probe,
        *,
        collective: bool = False,
    ) -> None:
        self.collective = collective
        self.model, self.stacks, self.units, self.backend = model, stacks, units, backend
        self.config = config
        self.probe = probe
        self.score: Score = resolve_score(config.score)
        self.flops_spent = 0
        self.flops_per_measurement = 0
        self.floor: dict[str, float] = {}
        self._references: dict[str, Any] = {}
        self.at_rest = True
        self._began: dict[str, Tensor] = {}
        self.goes_on = False
        self._gradients: dict[str, float] = dict.fromkeys(units, 0.0)

    @property
    def nbytes(self) -> int:
        """Host memory held for scoring: representations and weights of the beginning, the prefix's output."""
        held = (*self._references.values(), *self._began.values())
        return self.probe.nbytes + sum(getattr(one, "nbytes", 0) for one in held)

    def begin(self) -> None:
        """Look at the model before its first optimizer step, and keep the weights that a reference will need.

        Two passes over one sample, and none where LoRA's B is zero: then the adapters are at rest.
        """
        if self.score.needs not in ("outputs", "local_outputs") or self.backend.any_merged():
            return
        self.at_rest = (not self.collective and self._is_zero()) or self._changes_nothing()
        kept = self._trained() if self.score.needs == "outputs" or not self.at_rest else ()
        self._began = {} if self.collective else {name: p.detach().to("cpu", copy=True) for name, p in kept}

    def prepare(self, run_samples: int, most: int) -> int:
        """Fit the probe to the budget, take the pre-trained representations, and say how many measurements to take.

        Args:
            run_samples: samples that the whole run trains on, repetitions counted.
            most: steps in which a measurement can be taken.

        Raises:
            ProbeError: the pre-trained representations would not fit into memory.
        """
        if self.score.needs not in ("outputs", "local_outputs"):
            if not self._references:
                self._references = self._parameters_now() if self.score.needs == "weights" else {}
            if not self.goes_on:
                self._gradients = dict.fromkeys(self.units, 0.0)  # the first interval begins here
            return min(most, MOST_MEASUREMENTS)
        if self.collective and not self.at_rest:
            warn(
                "Scores are measured against the pre-trained model, and the adapters had an effect as the run began.",
                cause="The weights of the beginning cannot be put back: this rank holds a part of each.",
                fix="Use adapters that begin at rest, such as LoraConfig(init_lora_weights=True), or DDP.",
            )
            self.at_rest = True
        probe = self.probe
        affordable_samples = self.config.overhead * 2 * run_samples
        head = probe.head(max(LEAST_SAMPLES, min(CHUNK, int(affordable_samples / 20))))
        with CountFlops() as count:
            together = self._gather(head, adapters=True)
        self.flops_spent += 2 * count.total  # this pass, and the same samples once more for the floor
        per_token = count.total / head.padded_tokens
        shapes = [tensors[-1].shape for tensors in together.values()]  # stages differ in tokens and features
        forward = per_token / (2 if self.score.needs == "local_outputs" else 1)
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
        if self.score.needs == "outputs":
            self._take_references()
        self.flops_per_measurement = int(cost(samples, 1) - cost(samples, 0))
        return affordable

    def state_dict(self, *, measures_again: bool = True) -> dict[str, Any]:
        """What a resumed run cannot measure again, as plain JSON values; weights of adapters as base64 safetensors.

        Args:
            measures_again: with the weights of the beginning, which nothing else needs.
        """
        moving = self.score.needs in ("weights", "gradients")
        return {
            "samples": self.probe.samples,
            "floor": dict(self.floor),
            "gradients": dict(self._gradients),
            "references": _packed(self._references) if moving else None,
            "others": _packed(self._began) if self._began and measures_again else None,
            "at_rest": self.at_rest,
            "flops_spent": self.flops_spent,
            "flops_per_measurement": self.flops_per_measurement,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, measures_again: bool = True) -> None:
        """Take up what ``state_dict`` wrote, on the same probe.

        Takes the representations of the beginning again, unless nothing is to be measured any more.
        """
        self.go_on_from(state)
        if self.score.needs == "outputs" and measures_again:
            spent = self.flops_spent
            self._take_references()
            self.flops_spent = spent
        self.floor, self.flops_per_measurement = dict(state["floor"]), state["flops_per_measurement"]

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Take up of what ``state_dict`` wrote only what cannot be measured again; ``prepare`` may come after it."""
        self.goes_on = True
        self.at_rest = state.get("at_rest", True)
        self._began = _unpacked(state["others"]) if state.get("others") is not None else {}
        if state["references"] is not None:
            self._references = dict(_unpacked(state["references"]))
        self._gradients, self.flops_spent = dict(state["gradients"]), state["flops_spent"]

    def measure(self, prefix: Mapping[str, int]) -> dict[str, float]:
        """The score of each unit above ``prefix`` now; NaN where an activation is not finite.

        Scores at or below what rounding alone gives (measured on the same tokens in other batches) are 0.
        """
        needs = self.score.needs
        if needs == "nothing":
            return {name: random_score(name, self.config.seed) for name in self.units}
        if needs in ("weights", "gradients"):
            if needs == "gradients" and not any(self._gradients.values()):
                return {}
            now, before = self._parameters_now(), self._references
            if self.score.moving_reference or not before:
                self._references = now
                self._gradients = dict.fromkeys(self.units, 0.0)
            # The first interval of gradients has none before it to be compared with.
            return {name: float(self.score.compare(before[name], now[name])) for name in now if name in before}
        with CountFlops() as count:
            # Those in the prefix keep theirs, also where this pass runs it, to record what it ends in.
            above = {name: unit for name, unit in self.units.items() if unit.block >= prefix.get(unit.stack, 0)}
            outputs = self._gather(self.probe, adapters=True, prefix=prefix, units=above)
            scores = {
                name: self._compare(name, tensors)
                for name, tensors in outputs.items()
                if self.score.needs == "local_outputs" or name in self._references
            }
        self.flops_spent += count.total
        return {name: 0.0 if score <= self.floor.get(name, SMALLEST) else score for name, score in scores.items()}

    def listen(self) -> None:
        """Add up the norms of the gradients as they are now (between backward and step)."""
        if self.score.needs != "gradients":
            return
        for name, unit in self.units.items():
            squares = [float(p.grad.detach().float().pow(2).sum()) for p in unit.parameters() if p.grad is not None]
            self._gradients[name] += math.sqrt(sum(squares))

    def _take_references(self) -> None:
        with CountFlops() as count, self._as_it_began():
            before = self._gather(self.probe, adapters=not self.at_rest)
        self.flops_spent += count.total
        for name, tensors in before.items():
            self._references[name] = self.score.prepare(tensors[-1], self.config.normalize_rows)

    def _is_zero(self) -> bool:
        """Whether all adapters are LoRA with B = 0, which no pass needs to show."""

        def factors(site: nn.Module) -> list[Tensor]:
            found = [getattr(site, name, None) for name in ("lora_B", "lora_embedding_B")]
            single = [holder for holder in found if isinstance(holder, Tensor)]
            return [*single, *(p for holder in found if isinstance(holder, nn.Module) for p in holder.parameters())]

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
        """What a reference needs as it was: all that trains, and of adapters at rest what trains beside them.

        Switched off, adapters and the modules in ``modules_to_save`` have no part in it; biases and norms that were
        unfrozen stay.
        """
        owned = {id(p) for unit in self.units.values() for p in (*unit.parameters(), *unit.shared_parameters())}
        for name, parameter in self.model.named_parameters():
            beside = id(parameter) not in owned and ".modules_to_save." not in name
            if parameter.requires_grad and (beside or not self.at_rest):
                yield name, parameter

    @contextmanager
    def _as_it_began(self, within: nn.Module | None = None) -> Iterator[None]:
        """The weights of the beginning in their places, of ``within`` or of the model; then those of now again."""
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
        """``unit`` without what it has learnt in this run."""
        return self.backend.adapters_off(unit.module) if self.at_rest else self._as_it_began(unit.module)

    def _gather(
        self,
        probe: Probe,
        *,
        adapters: bool,
        prefix: Mapping[str, int] | None = None,
        units: Mapping[str, Unit] | None = None,
        local: bool | None = None,
    ) -> dict[str, list[Tensor]]:
        local = self.score.needs == "local_outputs" if local is None else local
        chunks: dict[str, list[list[Tensor]]] = {}
        run = probe.outputs(
            self.model, self.stacks, self.units if units is None else units, self.backend,
            adapters=adapters, without=self._without if local else None, prefix=prefix, to_the_end=self.collective,
        )  # fmt: skip
        for taken in run:
            for name, tensors in taken.items():
                chunks.setdefault(name, []).append(tensors)
        return {name: [torch.cat(parts) for parts in zip(*pieces, strict=True)] for name, pieces in chunks.items()}

    def _compare(self, name: str, tensors: list[Tensor]) -> float:
        device = next(self.model.parameters()).device
        if self.score.needs == "local_outputs":
            reference = self.score.prepare(tensors[0].to(device), self.config.normalize_rows)
        else:
            reference = self._references[name]
        return float(self.score.compare(reference, tensors[-1].to(device)))

    def _take_floor(self, head: Probe, together: dict[str, list[Tensor]]) -> None:
        alone = self._gather(head.one_by_one(), adapters=True)
        compare: Callable[[Any, Tensor], float] = self.score.compare
        for name, tensors in together.items():
            if len(tensors[-1]) >= 4 and name in alone:  # the debiased estimator needs four tokens
                reference = self.score.prepare(tensors[-1], self.config.normalize_rows)
                score = float(compare(reference, alone[name][-1]))
                self.floor[name] = max(score, SMALLEST) if math.isfinite(score) else SMALLEST

    def _parameters_now(self) -> dict[str, Tensor]:
        """Gradient norms or weights of the live units; a frozen one keeps the score it froze with."""
        live = {name: unit for name, unit in self.units.items() if any(p.requires_grad for p in unit.parameters())}
        if self.score.needs == "gradients":
            return {name: torch.tensor(self._gradients[name]) for name in live}
        return {
            name: torch.cat([p.detach().float().flatten().cpu() for p in unit.parameters()])
            for name, unit in live.items()
        }

    def _check_memory(self, shapes: list[tuple[int, int]]) -> None:
        needed = sum(2 * 4 * tokens * features for tokens, features in shapes)  # before and after, float32
        free = psutil.virtual_memory().available
        if needed > free / 2:
            tokens, features = max(shapes)
            raise ProbeError(
                f"The probe of {tokens:,} tokens needs {needed / 2**20:,.0f} MiB of host memory.",
                cause=f"It holds {len(shapes)} units × {features} features twice, and only "
                f"{free / 2**20:,.0f} MiB are free; half of that is the limit.",
                fix=f"SafeConfig(probe_tokens={max(64, int(tokens * free / 4 / needed))})",
            )


def _packed(tensors: Mapping[str, Tensor]) -> str:
    from safetensors.torch import save

    return base64.b64encode(save(dict(tensors))).decode()


def _unpacked(text: str) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(base64.b64decode(text))
