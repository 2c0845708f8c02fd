"""Computes the kept states of a run's training samples ahead of the run."""

from __future__ import annotations

import dataclasses

from ..errors import ConfigError, RunError
from ..loop import Safe
from ..methods import Method
from ..tasks.adapters import optimizer_steps
from .arguments import Arguments
from .run import make_trainer, prepare

__all__ = ["fill"]


def fill(arguments: Arguments) -> None:
    """Store what is not stored yet; every process of a launcher takes its share.

    Args:
        arguments: of the run, as for ``train``; nothing is trained or saved.

    Raises:
        AdafreezeError: the input cannot be used, or the states of this model cannot be kept.
    """
    if arguments.safe is None:
        raise ConfigError("Without freezing there is no prefix.", fix="adafreeze cache fill without --method none")
    made = prepare(arguments, Method(), {})
    trainer = make_trainer(made, [])
    trainer.accelerator.prepare_model(made.model, evaluation_mode=True)  # device and autocast, as in training
    safe = Safe(
        made.model,
        dataclasses.replace(arguments.safe, keep_cache=True, fill=None),
        probe=trainer.get_train_dataloader(),
        total_steps=optimizer_steps(arguments.training, len(made.setup.rows)),
        batch_size=arguments.training.train_batch_size,
    )
    try:
        if not any(safe.prefixes.values()):
            raise RunError(
                "No block is frozen from step 0, so no states are the same in all runs.", fix="--freeze_at_start 0.5"
            )
        safe.cache.fill(safe.ranks.rank, safe.ranks.size, strict=True)
    finally:
        safe.close()
