"""The output folder of a run: create it, find earlier runs and checkpoints in it, write settings and page."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .._version import __version__
from ..errors import RunError, warn
from ..integrations.checkpoints import check_checkpoint, last_checkpoint
from ..journal.events import JOURNAL_FILE
from ..report import write_report

__all__ = [
    "CONFIG_FILE",
    "JOURNAL_FILE",
    "clear_run",
    "find_checkpoint",
    "prepare_folder",
    "write_config",
    "write_page",
    "writing",
]

CONFIG_FILE = "adafreeze_config.yaml"
REPORT_FILE = "report.html"

# The files of a run. Overwriting removes all of them: a continued journal, or an old checkpoint that a later
# --resume_from_checkpoint finds, would mix two runs.
_TRACES = (
    *(JOURNAL_FILE, CONFIG_FILE, REPORT_FILE, "adapter_config.json", "adapter_model.*"),
    *("checkpoint-*", "trainer_state.json", "*_results.json"),
)


@contextmanager
def writing(folder: Path | str, flag: str = "--output_dir") -> Iterator[None]:
    """Raise RunError if the operating system refuses to write ``folder``, which ``flag`` named."""
    try:
        yield
    except OSError as error:
        fact = f"{folder} cannot be written ({error.strerror})."
        raise RunError(fact, fix=f"{flag} path/that/you/can/write") from error


def prepare_folder(folder: Path, *, overwrite: bool = False, resume: str | None = None) -> None:
    """Create the folder, or check that it can be used; its files stay.

    Args:
        folder: the output folder.
        overwrite: allow a run in it, which ``clear_run`` removes once the input is known to be good.
        resume: the value of ``--resume_from_checkpoint``; a run in the folder is then expected.

    Raises:
        RunError: it cannot be written, or contains a run that is neither overwritten nor resumed.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    traces = _traces(folder)
    if traces and resume is None and not overwrite:
        raise RunError(
            f"The output folder {folder} already holds a run ({traces[0].name}).",
            fix="Give another --output_dir, or add --overwrite_output_dir to replace that run, or "
            "--resume_from_checkpoint last to continue it.",
        )


def clear_run(folder: Path) -> None:
    """Remove the files of an earlier run in ``folder``, and nothing else."""
    for trace in _traces(folder):
        if trace.is_dir():
            shutil.rmtree(trace)
        else:
            trace.unlink()


def _traces(folder: Path) -> list[Path]:
    return [trace for pattern in _TRACES for trace in sorted(folder.glob(pattern))]


def find_checkpoint(resume: str | None, folder: str | Path) -> str | None:
    """The checkpoint to resume from: a path, or ``last`` (``true`` in transformers) for the newest.

    Raises:
        RunError: there is none, or it is incomplete.
    """
    if resume is None or resume.lower() in ("false", "no"):
        return None
    if resume.lower() not in ("last", "true", "yes"):
        check_checkpoint(resume)
        return str(Path(resume).expanduser())
    found = last_checkpoint(folder)
    if found is None:
        raise RunError(
            f"There is no checkpoint in {folder} to resume from.",
            fix="Leave out --resume_from_checkpoint to start anew; --save_strategy and --save_steps write checkpoints.",
        )
    return found


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """The settings that differ from the defaults, as a file for ``--config``."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    head = f"# adafreeze {__version__}; to repeat the run: adafreeze train --config THIS --output_dir NEW\n"
    (folder / CONFIG_FILE).write_text(head + text, encoding="utf-8")


def write_page(folder: Path, places: Sequence[Path]) -> None:
    """Write the report of finished runs into ``folder``; warn on failure, because the runs are already saved."""
    try:
        print(f"Report: {write_report(places, folder / REPORT_FILE)}")
    except Exception as error:
        warn(
            f"The report of this run failed, but the run is saved ({type(error).__name__}: {error}).",
            fix=f"adafreeze report {' '.join(map(str, places))}",
        )
