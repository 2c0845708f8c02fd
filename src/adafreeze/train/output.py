"""The output folder of a run: may it be written, does it already hold a run, what can be resumed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import RunError, warn
from ..journal.events import JOURNAL_FILE

__all__ = [
    "CONFIG_FILE",
    "JOURNAL_FILE",
    "clear_run",
    "find_checkpoint",
    "prepare_folder",
    "write_config",
    "write_page",
]

CONFIG_FILE = "adafreeze_config.yaml"
REPORT_FILE = "report.html"

# What a run leaves behind: found, the folder holds a run; overwritten, all of it goes, because a journal
# that goes on, or a checkpoint of the old run that a later --resume_from_checkpoint finds, would mix two
# runs.
_TRACES = (
    JOURNAL_FILE,
    CONFIG_FILE,
    "adapter_config.json",
    "adapter_model.*",
    "checkpoint-*",
    "*_results.json",
    "trainer_state.json",
    REPORT_FILE,
)


def prepare_folder(path: str, *, overwrite: bool = False, resume: str | None = None) -> Path:
    """Create the folder, or make sure that it may be used; nothing in it is touched yet.

    Args:
        path: the folder.
        overwrite: a run that it holds may be removed (by ``clear_run``, once the input has proved good).
        resume: what was given to ``--resume_from_checkpoint``: the folder is expected to hold that run.

    Raises:
        RunError: it cannot be written, or holds a run that was neither to be overwritten nor resumed.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"The output folder {path} cannot be written ({error.strerror}).",
            cause="It or a folder above it is a file or read-only, or the disk is full.",
            fix="--output_dir path/that/you/can/write",
        ) from error
    if resume is not None:
        return folder
    traces = _traces(folder)
    if traces and not overwrite:
        raise RunError(
            f"The output folder {path} already holds a run ({traces[0].name}).",
            cause="A second run would mix its files with those of the first.",
            fix="Give another --output_dir, or add --overwrite_output_dir to replace that run, or "
            "--resume_from_checkpoint last to go on with it.",
        )
    return folder


def clear_run(folder: Path) -> None:
    """Remove what an earlier run left in ``folder``, and nothing else."""
    for trace in _traces(folder):
        if trace.is_dir():
            shutil.rmtree(trace)
        else:
            trace.unlink()


def _traces(folder: Path) -> list[Path]:
    return [trace for pattern in _TRACES for trace in sorted(folder.glob(pattern))]


def find_checkpoint(resume: str | None, folder: str) -> str | None:
    """The checkpoint to go on from: a path, or ``last`` (``true``, in transformers' words) for the newest.

    Raises:
        RunError: there is none, or it was not written to its end.
    """
    from ..integrations.checkpoints import check_checkpoint, last_checkpoint

    if resume is None or resume.lower() in ("false", "no"):
        return None
    if resume.lower() in ("last", "true", "yes"):
        found = last_checkpoint(folder)
        if found is None:
            raise RunError(
                f"There is no checkpoint in {folder} to resume from.",
                cause="The run wrote none (see --save_strategy and --save_steps), or it is another folder.",
                fix="Leave out --resume_from_checkpoint to start anew.",
            )
        return found
    check_checkpoint(resume)
    return str(Path(resume).expanduser())


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """The settings that differ from the defaults, as a file for ``--config``."""
    import yaml

    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    head = f"# adafreeze {__version__}; to repeat the run: adafreeze train --config THIS --output_dir NEW\n"
    (folder / CONFIG_FILE).write_text(head + text, encoding="utf-8")


def write_page(folder: Path, places: Sequence[Path]) -> None:
    """A page about what has just ended, in ``folder``. The run is done and saved: no trouble of the page's ends it."""
    from ..report import write_report

    try:
        print(f"A page about it: {write_report(places, folder / REPORT_FILE)}")
    except Exception as error:
        warn(
            f"There is no page about this run ({type(error).__name__}: {error}).",
            cause="Only the page failed: everything else is in its place.",
            fix=f"adafreeze report {' '.join(map(str, places))}",
        )
