"""``adafreeze``: find the command, run it, and print errors without a traceback."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import AdafreezeError

__all__ = ["main"]

# Each command is a module of this folder with a main(argv), imported when it is used.
COMMANDS = {
    "train": "fine-tune a model with adapters that freeze themselves",
    "run": "a script or tool of your own, with a SafeCallback in its Trainers",
    "plan": "memory and FLOPs of a run before it starts: will it fit?",
    "doctor": "what adafreeze finds in a model or a script, before anything is trained",
    "export-config": "the PEFT configuration of the next run, from the scores of a run",
    "compare": "SAFE, plain and rival methods on the same tasks and seeds, in one table",
    "analyze": "are the minima flatter? Hessian, sharpness and loss slices of finished runs",
    "report": "one page about runs: savings, scores, the stack over time, curves",
    "cache": "states kept for later runs: list, fill, prune, delete",
    "demo": "see it work in a few minutes on the CPU",
}

USAGE = f"""usage: adafreeze COMMAND ...

Fine-tune a transformer with adapters, and freeze those that contribute little.

commands:
{chr(10).join(f"  {name:<15}{text}" for name, text in COMMANDS.items())}

options:
  -h, --help  show this help; `adafreeze COMMAND --help` shows the flags of a command
  --version   show the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(f"adafreeze {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"error: There is no command {command!r}.\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f".{command.replace('-', '_')}", __package__).main(rest)
    except AdafreezeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
