"""``adafreeze doctor``: what adafreeze finds in a model or in a script, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass

from rich.console import Console
from rich.table import Table

from ..env import environment
from ..errors import ConfigError
from ..integrations.doctor import Finding, examine_model, examine_script
from ..tasks.adapters import config_from_flags
from ..tasks.weightless import PLANNED_TASKS
from ..train.arguments import AdapterArguments
from ..train.parser import Parser, build, flag

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

    model_name_or_path: str = flag("A name on the Hub, a folder, or a config.json.", MISSING)
    task: str = flag("What the model learns to do.", "causal-lm", choices=PLANNED_TASKS)
    trust_remote_code: bool = flag("Run code that comes with the model.", False)


def main(argv: Sequence[str]) -> None:
    """Examine and print."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    target, *rest = argv
    if target.startswith("-"):
        raise ConfigError(
            f"{target} stands before the model or script, which must be first.", fix=f"adafreeze doctor MODEL {target}"
        )
    _show(target, examine_script(target, rest) if target.endswith(".py") else _of_model(target, rest))


def _of_model(target: str, flags: Sequence[str]) -> list[Finding]:
    parser = Parser(DoctorArguments, AdapterArguments, prog="adafreeze doctor")
    values = vars(parser.parse_args(["--model_name_or_path", target, *flags]))
    given = build(DoctorArguments, values)
    adapter = config_from_flags(vars(build(AdapterArguments, values)), PLANNED_TASKS[given.task][1])
    return examine_model(target, given.task, adapter, trust_remote_code=given.trust_remote_code)


def _show(target: str, findings: Sequence[Finding]) -> None:
    if not findings:  # on all ranks but the first
        return
    table = Table("what", "", "found", title=f"adafreeze doctor {target}", title_justify="left")
    for finding in findings:
        table.add_row(finding.what, finding.verdict, finding.text)
    console = Console()
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    console.print(f"Versions: {versions}", markup=False, highlight=False)
