"""Other rules by which adapters freeze while they train, on the same freezer, prefix and cache."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import AS_PUBLISHED, SafeConfig
from ..costs import expected_ratios
from ..decide.policy import PolicyInput
from ..errors import ConfigError, note
from .method import Method, Setup

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["AutoFreeze", "BottomUp", "GradES", "RandomFreezing", "StaticPrefix"]

# The warm-up then lasts its whole share of the run: scores that settle would end it sooner.
NEVER_SETTLED: dict[str, Any] = {"settle_patience": 10**9}
# For a rule that asks nobody: nothing is measured, and the loss is not waited for.
NO_SCORE: dict[str, Any] = {"score": "random", "wait_for_loss": False, "freeze_at_start": 0.0}


class AutoFreeze(Method):
    """AutoFreeze (Liu et al. 2021): the lowest live blocks freeze whose gradient norm has changed least.

    At each measurement, from the bottom: a block freezes if the relative change of its accumulated gradient norm is at
    most the median of those of all live blocks, and all blocks below are frozen.
    """

    name = "autofreeze"

    def configure(self, setup: Setup) -> None:
        """Freeze by gradient norms, to the end of the run."""
        fields = {**AS_PUBLISHED, **NEVER_SETTLED, "score": "grad_norm", "policy": calmest_prefix}
        setup.safe = SafeConfig.from_dict({**setup.settings, **fields, "warmup": 0.1, "ramp_end": 1.0})


def calmest_prefix(situation: PolicyInput) -> Iterator[str]:
    """The lowest live blocks whose scores are at most the median of all live blocks'."""
    if situation.ramp <= 0:
        return
    for chain in situation.chains:
        live = [block for block in chain if block and not situation.frozen.issuperset(block)]
        changes = [max(_or_infinite(situation.finite_score(name)) for name in block) for block in live]
        if not any(changes):
            continue
        for block, change in zip(live, changes, strict=True):
            if change > statistics.median(changes) or math.isinf(change):
                break
            yield from block


def _or_infinite(change: float | None) -> float:
    """Of what could not be measured nobody knows that it is calm."""
    return math.inf if change is None else change


class GradES(Method):
    """GradES (Wen et al. 2025): a matrix freezes, wherever it stands, once its weights hardly move.

    Its authors' package ``grades`` where it is installed and knows the layers (q_proj, gate_proj, ... of a Llama), else
    our ``weight_change`` score by block. Its threshold is absolute and is tuned by model in the paper; our reading
    needs no tuning: half of what the weights moved at their fastest; for the package, which compares the change of a
    matrix summed over its weights with one threshold for all, half of learning rate × weights of an average matrix,
    about what Adam moves at most. Nothing freezes in the first 30 % of the run, its default.
    """

    name = "grades"
    share = 0.5
    alpha = 0.3

    def configure(self, setup: Setup) -> None:
        """Freeze by our score, unless the package can."""
        if not self._package_fits(setup.base):
            note("grades: by the weight_change score, since the package is not installed or does not know the layers.")
            fields = {**AS_PUBLISHED, **NEVER_SETTLED, "score": "weight_change", "policy": _Converged(self.share)}
            fields |= {"warmup": self.alpha, "ramp_end": 1.0}
            setup.safe = SafeConfig.from_dict({**setup.settings, **fields})

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Give the Trainer the package's callback."""
        if not self._package_fits(setup.base):
            return
        from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        per_matrix = 2 * sum(sizes) / len(sizes)  # LoRA's A and B are counted as one
        tau = self.share * setup.training.learning_rate * per_matrix
        callback = GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=tau, alpha=self.alpha))
        setup.callbacks += [callback, _Forget()]
        setup.kinds.append(lambda: frozenset(callback.frozen_components))

    @staticmethod
    def _package_fits(model: nn.Module) -> bool:
        if importlib.util.find_spec("grades") is None:
            return False
        return any(name.endswith(".self_attn.q_proj") for name, _ in model.named_modules())


class _Converged:
    """Units whose score has fallen below ``share`` of their own highest."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.highest: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"below {self.share} of its highest"

    def __call__(self, situation: PolicyInput) -> list[str]:
        for name in situation.scores:
            self.highest[name] = max(self.highest.get(name, 0.0), situation.finite_score(name) or 0.0)
        if situation.ramp <= 0:
            return []
        scores = {name: situation.finite_score(name) for name in self.highest}
        return [name for name, score in scores.items() if score is not None and score < self.share * self.highest[name]]


class _Forget(TrainerCallback):
    """AdamW moves a frozen parameter on as long as it has a gradient."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The package leaves them."""
        for parameter in kwargs["model"].parameters():
            if not parameter.requires_grad:
                parameter.grad = None


class BottomUp(Method):
    """A fixed schedule: from the bottom, as many blocks as SAFE froze, by the same warm-up and ramp, and no score.

    ``freeze_at_start`` is SAFE's.
    """

    name = "bottom-up"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Freeze by place."""
        safe = setup.outcome("safe")
        fields = {**NO_SCORE, **NEVER_SETTLED, "policy": "bottom_up"}
        fields["freeze_share"] = safe.frozen / max(1, len(safe.units))
        fields["freeze_at_start"] = SafeConfig.from_dict(setup.settings).share_at_start
        setup.safe = SafeConfig.from_dict({**setup.settings, **fields})


class StaticPrefix(Method):
    """The lowest blocks frozen from step 0, with the prefix cache, and nothing later: no score, no warm-up.

    As many blocks as come nearest to SAFE's FLOPs by arithmetic (``costs.expected_ratios``): what the cache alone
    would give for the same money. Learning rates stay as they were.
    """

    name = "static-prefix"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Freeze by hand."""
        safe = setup.outcome("safe")
        if (theory := safe.theory()) is None or len(safe.units) != safe.blocks:
            raise ConfigError(
                "What a static prefix costs cannot be said.",
                cause=f"SAFE's run had {len(safe.units)} units in {safe.blocks} blocks.",
                fix="--granularity block, and adapters in every block",
            )
        epoch = safe.steps / safe.epochs if safe.cached and safe.epochs else None

        def beside(depth: int) -> float:
            return abs(expected_ratios(safe.blocks, [depth] * safe.steps, epoch)[1] - theory[1])

        depth = min(range(safe.blocks), key=beside)
        fields = {**NO_SCORE, "policy": _nothing, "freeze": safe.units[:depth]}
        setup.safe = SafeConfig.from_dict({**setup.settings, **fields})


def _nothing(situation: PolicyInput) -> list[str]:
    return []


class RandomFreezing(Method):
    """As many units as SAFE froze, drawn at random, when SAFE did: at the next of 24 steps up to the ramp's end."""

    name = "random"
    after = ("safe",)

    def configure(self, setup: Setup) -> None:
        """Freeze by chance."""
        safe = setup.outcome("safe")
        order = torch.randperm(len(safe.units), generator=torch.Generator().manual_seed(setup.training.seed)).tolist()
        units = [safe.units[i] for i in order]
        at_start = max((frozen for step, frozen, _ in safe.freezes if step == 0), default=0)
        policy = _Replay(units, [(step, frozen) for step, frozen, _ in safe.freezes])
        fields = {**NO_SCORE, "warmup": 0.0, "policy": policy, "freeze": units[:at_start]}
        setup.safe = SafeConfig.from_dict({**setup.settings, **fields})


class _Replay:
    """The first units of a list, as many as were frozen at that step."""

    def __init__(self, units: Sequence[str], freezes: Sequence[tuple[int, int]]) -> None:
        self.units, self.freezes = units, freezes

    def __repr__(self) -> str:
        return f"in the order {', '.join(self.units)}"

    def __call__(self, situation: PolicyInput) -> list[str]:
        count = max((frozen for step, frozen in self.freezes if step <= situation.step), default=0)
        return list(self.units[:count])
