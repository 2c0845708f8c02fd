"""Other rules for freezing adapters during training, on the same freezer, prefix and cache."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..config import AS_PUBLISHED, SafeConfig
from ..decide.policy import PolicyInput
from ..errors import note
from .method import Method, Setup

__all__ = [
    *("AutoFreeze", "BottomUp", "GradES", "RandomFreezing"),
    *("StaticPrefix", "StaticHalf", "StaticThird", "StaticTwoThirds"),
]

# The warm-up lasts its full share of the run; settled scores would end it sooner.
NEVER_SETTLED: dict[str, Any] = {"settle_patience": 10**9}
# For rules without scores: measures nothing and does not wait for the loss.
NO_SCORE: dict[str, Any] = {"score": "random", "wait_for_loss": False, "freeze_at_start": 0.0}


class AutoFreeze(Method):
    """AutoFreeze (Liu et al. 2021): freezes the lowest live blocks whose gradient norm has changed least.

    At each measurement, from the bottom: a block freezes if the relative change of its accumulated gradient norm is at
    most the median over all live blocks and all blocks below are frozen.
    """

    name = "autofreeze"

    def configure(self, setup: Setup) -> None:
        """Freeze by gradient norms, to the end of the run."""
        rule = {"score": "grad_norm", "policy": calmest_prefix, "warmup": 0.1, "ramp_end": 1.0}
        setup.freeze(**AS_PUBLISHED | NEVER_SETTLED | rule)


def calmest_prefix(inputs: PolicyInput) -> Iterator[str]:
    """The lowest live blocks whose scores are at most the median over all live blocks; missing scores count as ∞."""
    if inputs.ramp <= 0:
        return
    for chain in inputs.chains:
        live = [block for block in chain if block and not inputs.frozen.issuperset(block)]
        scores = [[inputs.finite_score(name) for name in block] for block in live]
        changes = [max(math.inf if score is None else score for score in block) for block in scores]
        if not any(changes):
            continue
        for block, change in zip(live, changes, strict=True):
            if change > statistics.median(changes) or math.isinf(change):
                break
            yield from block


class GradES(Method):
    """GradES (Wen et al. 2025): a matrix freezes, in any block, when its weights hardly change any more.

    Uses its authors' package ``grades`` if it is installed and supports the layers (q_proj, gate_proj, ... of a Llama),
    else our ``weight_change`` score per block. The paper tunes an absolute threshold per model. Our reading needs no
    tuning: half of the fastest change so far; for the package, which compares the summed change of each matrix with one
    threshold, half of learning rate × size of an average matrix, about the most that Adam moves. Nothing freezes in the
    first 30 % of the run, its default.
    """

    name = "grades"
    share = 0.5
    alpha = 0.3

    def configure(self, setup: Setup) -> None:
        """Freeze by our score, unless the package can."""
        if not self._package_fits(setup.base):
            note("grades: uses the weight_change score; the package is not installed or does not support the layers.")
            rule = {"score": "weight_change", "policy": _Converged(self.share), "warmup": self.alpha, "ramp_end": 1.0}
            setup.freeze(**AS_PUBLISHED | NEVER_SETTLED | rule)

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Add the callback of the package."""
        if not self._package_fits(setup.base):
            return
        from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        per_matrix = 2 * sum(sizes) / len(sizes)  # LoRA's A and B count as one
        tau = self.share * setup.training.learning_rate * per_matrix
        callback = GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=tau, alpha=self.alpha))
        setup.callbacks += [callback, _ClearGradients()]
        setup.kinds.append(lambda: frozenset(callback.frozen_components))

    @staticmethod
    def _package_fits(model: nn.Module) -> bool:
        if importlib.util.find_spec("grades") is None:
            return False
        return any(name.endswith(".self_attn.q_proj") for name, _ in model.named_modules())


class _Converged:
    """Policy: units whose score has fallen below ``share`` of its own maximum."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.highest: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"below {self.share} of its maximum"

    def __call__(self, inputs: PolicyInput) -> list[str]:
        for name in inputs.scores:
            self.highest[name] = max(self.highest.get(name, 0.0), inputs.finite_score(name) or 0.0)
        if inputs.ramp <= 0:
            return []
        scores = {name: inputs.finite_score(name) for name in self.highest}
        return [name for name, score in scores.items() if score is not None and score < self.share * self.highest[name]]


class _ClearGradients(TrainerCallback):
    """The package leaves gradients on frozen parameters, and AdamW would keep moving them."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear them."""
        for parameter in kwargs["model"].parameters():
            if not parameter.requires_grad:
                parameter.grad = None


class BottomUp(Method):
    """A fixed schedule: as many blocks as SAFE froze, from the bottom, with SAFE's warm-up and ramp and no score."""

    name = "bottom-up"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Freeze by depth; ``freeze_at_start`` is SAFE's."""
        safe = setup.outcome("safe")
        at_start = SafeConfig.from_dict(setup.settings).share_at_start
        rule = {"freeze_share": safe.frozen / max(1, len(safe.units)), "freeze_at_start": at_start}
        setup.freeze(**NO_SCORE | NEVER_SETTLED | rule, policy="bottom_up")


class StaticPrefix(Method):
    """The lowest blocks frozen from step 0, with the prefix cache: no score, no later freeze, no scaled learning rates.

    Attributes:
        share: of the blocks with adapters, rounded down.
    """

    share: float

    def configure(self, setup: Setup) -> None:
        """Freeze the lowest blocks at the start."""
        setup.freeze(**NO_SCORE | {"freeze_at_start": self.share}, policy=_nothing)


class StaticThird(StaticPrefix):
    """A third of the blocks."""

    name, share = "static-third", 1 / 3


class StaticHalf(StaticPrefix):
    """Half of the blocks."""

    name, share = "static-half", 1 / 2


class StaticTwoThirds(StaticPrefix):
    """Two thirds of the blocks."""

    name, share = "static-two-thirds", 2 / 3


def _nothing(inputs: PolicyInput) -> list[str]:
    return []


class RandomFreezing(Method):
    """As many units as SAFE froze, drawn at random, at the steps at which SAFE froze.

    The policy runs at 24 steps up to the end of the ramp, so a freeze may come at the next of these.
    """

    name = "random"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Freeze at random."""
        safe = setup.outcome("safe")
        order = torch.randperm(len(safe.units), generator=torch.Generator().manual_seed(setup.training.seed)).tolist()
        units = [safe.units[i] for i in order]

        def replay(inputs: PolicyInput) -> list[str]:
            return units[: max((frozen for step, frozen, _ in safe.freezes if step <= inputs.step), default=0)]

        at_start = max((frozen for step, frozen, _ in safe.freezes if step == 0), default=0)
        setup.freeze(**NO_SCORE, warmup=0.0, policy=replay, freeze=units[:at_start])
