"""``adafreeze doctor``: what adafreeze finds in a model or in a script, before anything is trained."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdafreezeError, ConfigError, ModelError, RunError
from ..train.adapter import AdapterArguments, peft_config
from ..train.arguments import parse_flags

if TYPE_CHECKING:
    from ..integrations.doctor import Finding

__all__ = ["main"]

USAGE = """usage: adafreeze doctor MODEL [--task TASK] [--adapter ADAPTER ...]
       adafreeze doctor script.py [its own arguments ...]

Prints what adafreeze finds in a model (by hub name, folder or config.json; no weights are loaded), or in a training
script, which runs until Safe or SafeCallback has looked at its model, and is ended there, before the first step.

The flags for a model are those of `adafreeze plan`: --task, --adapter, --adapter_r, --target_modules, ...
"""


@dataclass
class DoctorArguments:
    """Which model."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "A name on the Hub, a folder, or a config.json."})
    task: str = field(default="causal-lm", metadata={"help": "What the model learns to do."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


class _SeenEnoughError(BaseException):
    """Leaves a script, through whatever it catches."""


def main(argv: Sequence[str] | None = None) -> int:
    """Look, and print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    target, *rest = arguments
    if target.startswith("-"):
        raise ConfigError(
            f"{target} stands before the model or script.",
            cause="The first word says what is to be looked at.",
            fix=f"adafreeze doctor script.py {target}",
        )
    findings = _of_script(target, rest) if target.endswith(".py") else _of_model(target, rest)
    if findings:
        _show(target, findings)
    return 0


def _of_model(target: str, flags: list[str]) -> list[Finding]:
    run, adapter = parse_flags(
        [DoctorArguments, AdapterArguments],
        ["--model_name_or_path", target, *flags],
        prog="adafreeze doctor",
        description="What adafreeze finds in a model.",
    )
    from ..integrations.doctor import examine
    from ..memory._stage import Stage
    from ..memory.rehearsal import failing_module
    from ..tasks.weightless import PLANNED_TASKS, adapted, build, configuration, example_inputs

    if run.task not in PLANNED_TASKS:
        raise ConfigError(
            f"--task is {run.task!r}.",
            cause=f"It must be one of {', '.join(PLANNED_TASKS)}.",
            fix="--task causal-lm",
        )
    config = configuration(target, trust_remote_code=run.trust_remote_code)
    adapter_config = peft_config(adapter, PLANNED_TASKS[run.task][1])

    def batch(rows: int, module: Any) -> dict[str, Any]:
        own = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return example_inputs(config, run.task, rows, 16, padded=True, dtype=own)

    try:
        model = adapted(build(config, run.task), adapter_config)
        with Stage(model, batch, "adamw_torch", False, None, False, target="cpu", fake=True) as stage:
            return list(examine(model, stage.stacks, stage.units, stage.flows, stage.freezer.backend))
    except AdafreezeError:
        raise
    except Exception as error:  # the model's own code, on tensors without data
        raise ModelError(
            f"{failing_module(error)} does not run without data ({type(error).__name__}: {error}).",
            cause="It reads values of its tensors, or uses an operator whose shapes torch does not know.",
            fix="adafreeze doctor script.py, which looks at the real model",
        ) from error


def _of_script(script: str, arguments: list[str]) -> list[Finding]:
    if not Path(script).is_file():
        raise ConfigError(
            f"There is no script {script}.",
            cause=f"It was looked for in {Path.cwd()}.",
            fix="adafreeze doctor path/to/script.py",
        )
    from ..integrations.doctor import examine_run
    from ..loop.safe import Safe

    found: list[Finding] = []
    make = Safe.__init__

    def made(self: Safe, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.ranks.is_main:
            found.extend(examine_run(self, *args[:1], **{k: v for k, v in kwargs.items() if k == "model"}))
        self.close()
        raise _SeenEnoughError

    argv, path = sys.argv, list(sys.path)
    try:
        Safe.__init__ = made  # type: ignore[method-assign]
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(script, run_name="__main__")
    except _SeenEnoughError:
        return found
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise
    except AdafreezeError:
        raise
    except Exception as error:
        raise RunError(
            f"{script} failed before adafreeze had looked at its model: {type(error).__name__}: {error}",
            cause=f"Its own code raised this{_line_of(script, error)}.",
            fix=f"python {' '.join([script, *arguments])}, which shows the whole traceback",
        ) from error
    finally:
        Safe.__init__ = make  # type: ignore[method-assign]
        sys.argv, sys.path[:] = argv, path
    raise ConfigError(
        f"{script} came to its end without adafreeze.",
        cause="It made no Safe, and trained no Trainer with a SafeCallback.",
        fix="callbacks=[SafeCallback()] in its Trainer, or Safe(model, ...) before its loop",
    )


def _line_of(script: str, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
    number = lines[-1] if lines else getattr(error, "lineno", None)
    return "" if number is None else f", in line {number}"


def _show(target: str, findings: Iterable[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..env import environment

    table = Table(title=f"adafreeze doctor {target}", title_justify="left")
    for column in ("what", "", "found"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.what, finding.verdict, finding.text)
    console = Console()
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    console.print(f"Versions: {versions}", markup=False, highlight=False)
