"""Runs a script or module as Python would, in this process."""

from __future__ import annotations

import functools
import importlib.util
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from ..config import SafeConfig
from ..errors import ConfigError, note, warn
from ..journal import JOURNAL_FILE
from ..loop.safe import Safe
from .transformers import SafeCallback, has_callback, output_folder

__all__ = ["run", "run_with_safe"]


def run(target: str, arguments: Sequence[str], *, module: bool = False) -> None:
    """Run ``python target arguments``, or with ``module`` ``python -m target arguments``.

    ``sys.argv`` and ``sys.path`` are as before when it ends.

    Raises:
        ConfigError: there is no such module.
        SystemExit: it ends with an exit code of its own.
        Exception: whatever it raises.
    """
    argv, path = sys.argv, list(sys.path)
    try:
        sys.argv = [target, *arguments]
        sys.path.insert(0, "" if module else str(Path(target).resolve().parent))
        if module:
            _check_module(target)
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def run_with_safe(
    target: str, arguments: Sequence[str], config: SafeConfig | None = None, *, module: bool = False
) -> None:
    """Run a script with a SafeCallback in every Trainer that it makes, unless it gives one itself.

    Each Trainer's journal is in its ``output_dir``. If nothing was frozen because nothing was trained by a Trainer, a
    warning says so at the end.

    Args:
        target: a Python file, a command of the environment that is one (``llamafactory-cli``), or a module.
        arguments: its own.
        config: settings; default: those of SafeConfig.
        module: ``target`` is a module.

    Raises:
        ConfigError: there is no such file, command or module.
        SystemExit: as ``run``; so for the exceptions of the script.
    """
    file = target if module else _file(target)
    starts: list[Safe] = []

    def count(safe: Safe, model: nn.Module) -> None:
        starts.append(safe)

    Safe.on_made.append(count)
    try:
        with _in_every_trainer(config) as trainers:
            try:
                run(file, arguments, module=module)
            except SystemExit as ended:
                if ended.code not in (None, 0):
                    raise
    finally:
        Safe.on_made.remove(count)
    if not starts:
        _say_that_nothing_froze(target, len(trainers))


@contextmanager
def _in_every_trainer(config: SafeConfig | None) -> Iterator[list[Trainer]]:
    """Trainers that are made within the block have a SafeCallback; yields them."""
    made: list[Trainer] = []
    journals: Counter[Path] = Counter()
    make: Any = Trainer.__init__

    @functools.wraps(make)
    def make_with_safe(self: Trainer, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)
        if has_callback(self):
            note("The script gives its Trainer a SafeCallback of its own, which is used.")
            return
        folder = output_folder(self)
        journals[folder] += 1
        name = JOURNAL_FILE if journals[folder] == 1 else f"{journals[folder]}-{JOURNAL_FILE}"
        self.add_callback(SafeCallback(config, journal=folder / name))

    # Not through transformers' list of default callbacks: it has one entry for all Trainers, and each needs a journal
    # and a Safe of its own.
    Trainer.__init__ = make_with_safe  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Trainer.__init__ = make  # type: ignore[method-assign]


def _file(target: str) -> str:
    """The Python file that ``target`` names."""
    if Path(target).is_file():
        return target
    found = shutil.which(target)
    if found is None:
        raise ConfigError(
            f"There is no script {target} in {Path.cwd()}, and no command of this name.",
            fix="adafreeze run path/to/script.py ..., or adafreeze run -m package.module ...",
        )
    with open(found, "rb") as file:
        if b"python" not in file.readline():
            raise ConfigError(
                f"The command {target} ({found}) is not a Python script.",
                fix="adafreeze run -m package.module ..., with the module that the command runs",
            )
    return found


def _check_module(name: str) -> None:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ModuleNotFoundError, ValueError) as error:  # of a package above it, or ".name"
        if getattr(error, "name", None) not in (None, *accumulate(name.split("."), "{}.{}".format)):
            raise  # the package itself misses something
        spec = None
    if spec is None:
        raise ConfigError(
            f"There is no module {name} that can be run.",
            fix="pip install the package that has it, or correct its name.",
        )


def _say_that_nothing_froze(target: str, trainers: int) -> None:
    if trainers:
        warn(
            f"{target} made {trainers} Trainer{'s' if trainers > 1 else ''} and trained none, so nothing froze.",
            fix="Call trainer.train(), or pass the script's own flag for it (often --do_train).",
        )
        return
    warn(
        f"{target} made no Trainer of transformers in this process, so nothing froze.",
        fix="Where it starts other processes (accelerate, torchrun), start those around adafreeze: "
        "accelerate launch -m adafreeze run script.py; in a loop of its own, Safe(model, ...) freezes.",
    )
