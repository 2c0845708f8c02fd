"""AdapterFreezing: one callback in a script that uses Lightning's Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import SafeConfig
from ..errors import ModelError, RunError
from ..journal import Journal
from ..loop.safe import Safe
from ..measure.draw import batch_size_of, samples_of, train_samples
from ..parallel.fsdp import is_fsdp1

__all__ = ["AdapterFreezing"]


class _Hooks:
    """Selective adapter freezing in a Lightning Trainer:

        from adafreeze.integrations.lightning import AdapterFreezing

        trainer = Trainer(..., callbacks=[AdapterFreezing()])

    The model is the part of the LightningModule with PEFT adapters. The probe is drawn from the train dataloader's
    dataset. ``safe/...`` scalars are logged by the module. Checkpoints contain the state of the freezing;
    ``fit(ckpt_path=...)`` restores it. After ``fit``, also after an exception, only the weights of the model differ.

    Args:
        config: settings; the defaults need no tuning.
        probe: batches to measure scores on; default: drawn from the train dataloader.
        journal: a path or a Journal; None keeps events in ``callback.safe.journal.events``.

    Attributes:
        safe: of the last fit; None before the first.
    """

    def __init__(
        self,
        config: SafeConfig | None = None,
        probe: Any = None,
        journal: Journal | str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config
        self.probe = probe
        self.journal = journal
        self.safe: Safe | None = None
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; Lightning saves rank 0's, which lacks the random states of other ranks."""
        return {} if self.safe is None else self.safe.state_dict(random_state=self.safe.ranks.size == 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store the state for ``on_train_start``: there is no optimizer yet."""
        self._loaded = state or None  # empty if saved before fitting began

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start Safe, after weights and optimizer are restored.

        Raises:
            ModelError: not exactly one part of the LightningModule has PEFT adapters.
            RunError: manual optimization or FSDP1.
        """
        if not pl_module.automatic_optimization or is_fsdp1(trainer.strategy.model):
            raise RunError(
                f"{type(pl_module).__name__} trains with automatic_optimization={pl_module.automatic_optimization} "
                f"and {type(trainer.strategy).__name__}; a callback cannot see the steps of a manual loop, and FSDP1 "
                "flattens many adapters into one parameter.",
                fix="Safe(...) in your own training_step, with safe.step() after optimizer.step(); "
                'or Trainer(strategy="ddp").',
            )
        data = trainer.train_dataloader
        self.safe = Safe(
            adapted_model(pl_module),
            self.config,
            optimizer=trainer.optimizers[0],
            probe=train_samples(data) if self.probe is None else self.probe,
            total_steps=trainer.estimated_stepping_batches,
            batch_size=batch_size_of(data),
            samples_per_epoch=samples_of(data),
            journal=self.journal,
        )
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self.safe.steps = trainer.global_step
        else:
            self.safe.load_state_dict(loaded)
            self._catch_up(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure and freeze when due; log ``safe/...``."""
        self._catch_up(trainer)
        if self.safe is not None and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self.safe.logs())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the model except for its weights."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the model except for its weights."""
        if self.safe is not None:
            self.safe.close()

    def _catch_up(self, trainer: Any) -> None:
        """Step up to the Trainer's optimizer steps: none for a batch that only accumulates, else one."""
        while self.safe is not None and self.safe.steps < trainer.global_step:
            with trainer.precision_plugin.forward_context():
                self.safe.step()


def adapted_model(module: nn.Module) -> nn.Module:
    """The outermost part of ``module`` with PEFT adapters.

    Raises:
        ModelError: there is none, or several.
    """
    found = list(_adapted(module))
    if len(found) != 1:
        raise ModelError(
            f"{type(module).__name__} has {len(found)} models with PEFT adapters; it must have 1.",
            fix="Use Safe(...) for each of them, in your own training_step."
            if found
            else "self.model = get_peft_model(model, LoraConfig(...)) in its __init__",
        )
    return found[0]


def _adapted(module: nn.Module) -> Iterator[nn.Module]:
    if getattr(module, "peft_config", None):
        yield module
    else:
        for child in module.children():
            yield from _adapted(child)


if TYPE_CHECKING:

    class AdapterFreezing(_Hooks):
        """See ``_Hooks``."""


def __getattr__(name: str) -> Any:
    """Make AdapterFreezing on first use: its base class needs Lightning, which is optional."""
    if name != "AdapterFreezing":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning.pytorch import Callback

    made = type(name, (_Hooks, Callback), {"__doc__": _Hooks.__doc__, "__module__": __name__})
    globals()[name] = made  # one class, which pickle finds by its name
    return made
