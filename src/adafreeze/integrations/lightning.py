"""AdapterFreezing: one callback for a Lightning Trainer.

lightning is optional, and its Trainer wants callbacks of its own class: the class is made when it is first asked for.
"""

from __future__ import annotations

import os
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

    Its model is the part of the LightningModule that PEFT put adapters into, and the probe is drawn from the train
    dataloader's dataset. ``safe/...`` scalars are logged with the module's own. Checkpoints carry the state of the
    freezing; ``fit(ckpt_path=...)`` takes it up again. When fitting ends, also by an exception, the model is as it was,
    but for the trained weights.

    Args:
        config: settings; the defaults need no tuning.
        probe: batches to measure scores on, if not drawn from the train dataloader.
        journal: path of the run journal (JSON Lines); None keeps it in ``callback.safe.journal.events``.

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
        """What a checkpoint keeps; of several ranks Lightning asks one, which has no random state for the others."""
        return {} if self.safe is None else self.safe.state_dict(random_state=self.safe.ranks.size == 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep it for ``on_train_start``: Lightning gives it before there is an optimizer."""
        self._loaded = state or None  # of a checkpoint that was written before fitting began

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the model, when weights and optimizer have their state, and freeze what is to be from the start.

        Raises:
            ModelError: PEFT put adapters into no part of the LightningModule, or into several.
            RunError: the module is to be optimized by hand, or by FSDP1.
        """
        if not pl_module.automatic_optimization or is_fsdp1(trainer.strategy.model):
            raise RunError(
                f"{type(pl_module).__name__} trains with automatic_optimization={pl_module.automatic_optimization} "
                f"and {type(trainer.strategy).__name__}.",
                cause="A callback does not see which steps of a manual loop train the adapters, and FSDP1 flattens the "
                "parameters of many adapters into one.",
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
        """Measure and freeze, where it is time to; add ``safe/...`` to what is logged."""
        self._catch_up(trainer)
        if self.safe is not None and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self.safe.logs())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the model as it was, but for the trained weights."""
        if self.safe is not None:
            self.safe.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the model as it was, but for the trained weights."""
        if self.safe is not None:
            self.safe.close()

    def _catch_up(self, trainer: Any) -> None:
        """To the Trainer's optimizer steps: none in a batch that accumulates, one in others."""
        while self.safe is not None and self.safe.steps < trainer.global_step:
            with trainer.precision_plugin.forward_context():
                self.safe.step()


def adapted_model(module: nn.Module) -> nn.Module:
    """The outermost part of ``module`` that PEFT put adapters into.

    Raises:
        ModelError: there is none, or several.
    """
    found = list(_adapted(module))
    if len(found) != 1:
        raise ModelError(
            f"{type(module).__name__} holds {len(found)} models with adapters.",
            cause="adafreeze freezes the adapters of one model, which PEFT put there.",
            fix="self.model = get_peft_model(model, LoraConfig(...)) in its __init__"
            if not found
            else "Use Safe(...) for each of them, in your own training_step.",
        )
    return found[0]


def _adapted(module: nn.Module) -> Any:
    if getattr(module, "peft_config", None):
        yield module
    else:
        for child in module.children():
            yield from _adapted(child)


if TYPE_CHECKING:

    class AdapterFreezing(_Hooks):
        """See ``_Hooks``."""


def __getattr__(name: str) -> Any:
    if name != "AdapterFreezing":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning.pytorch import Callback

    made = type(name, (_Hooks, Callback), {"__doc__": _Hooks.__doc__, "__module__": __name__})
    globals()[name] = made  # one class, which pickle finds by its name
    return made
