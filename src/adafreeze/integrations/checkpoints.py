"""Checkpoints of transformers' Trainer: which of them were written to their end."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..errors import RunError, note

__all__ = ["check_checkpoint", "last_checkpoint"]


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest whole checkpoint in a Trainer's output folder; None if there is none:

        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))

    A run that is killed while it saves leaves a folder without an end, which ``resume_from_checkpoint=True`` takes for
    the newest checkpoint and fails on. One line names what is passed over.
    """
    places = [place for place in Path(folder).expanduser().glob("checkpoint-*") if place.name[11:].isdecimal()]
    for place in sorted(places, key=lambda place: int(place.name[11:]), reverse=True):
        try:
            check_checkpoint(place)
        except RunError as error:
            note(f"Passed over: {error.fact}")
        else:
            return str(place)
    return None


def check_checkpoint(place: str | os.PathLike[str]) -> None:
    """See whether a checkpoint was written to its end: the Trainer writes ``trainer_state.json`` last.

    Raises:
        RunError: it was not, or is none.
    """
    path = Path(place).expanduser() / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_bytes())
        found = None if isinstance(state, dict) and "global_step" in state else "holds no global_step"
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    except ValueError as error:  # no JSON, or no text at all
        found = f"is not valid JSON ({error})"
    if found is not None:
        raise RunError(
            f"{place} is not a checkpoint: its {TRAINER_STATE_NAME} {found}.",
            cause="The run was stopped while it wrote it, the file was edited, or it is another folder.",
            fix="Resume from an earlier one: `ls -d " + str(Path(place).parent) + "/checkpoint-*`",
        )
