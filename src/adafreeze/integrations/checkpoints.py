"""Checkpoints of transformers' Trainer: finding the last complete one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import RunError, note

__all__ = ["check_checkpoint", "last_checkpoint"]

# transformers.trainer has this constant too, and imports datasets and scipy.
TRAINER_STATE_NAME = "trainer_state.json"


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in a Trainer's output folder, or None:

        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

    A run that is killed while saving leaves an incomplete folder, on which ``resume_from_checkpoint=True`` fails. Each
    folder that is skipped is logged.
    """
    places = [place for place in Path(folder).expanduser().glob("checkpoint-*") if place.name[11:].isdecimal()]
    for place in sorted(places, key=lambda place: int(place.name[11:]), reverse=True):
        try:
            check_checkpoint(place)
        except RunError as error:
            note(f"Skipped: {error.fact}")
        else:
            return str(place)
    return None


def check_checkpoint(place: str | os.PathLike[str]) -> None:
    """Check that a checkpoint is complete: the Trainer writes ``trainer_state.json`` last.

    Raises:
        RunError: it is not.
    """
    path = Path(place).expanduser() / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_bytes())
        found = None if isinstance(state, dict) and "global_step" in state else "has no global_step"
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    except ValueError as error:
        found = f"is not valid JSON ({error})"
    if found is not None:
        raise RunError(
            f"{place} is not a checkpoint: its {TRAINER_STATE_NAME} {found}.",
            fix=f"Resume from an earlier one: `ls -d {Path(place).parent}/checkpoint-*`",
        )
