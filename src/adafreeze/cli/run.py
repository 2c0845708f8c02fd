"""``adafreeze run``: a script or tool that knows nothing of adafreeze, with a SafeCallback in its Trainers."""

from __future__ import annotations

from argparse import REMAINDER, SUPPRESS
from collections.abc import Sequence

from ..config import SafeConfig
from ..integrations.script import run_with_safe
from ..train.parser import Parser, read_yaml

__all__ = ["main"]

USAGE = """usage: adafreeze run [--config adafreeze.yaml] script.py [its own arguments ...]
       adafreeze run [--config adafreeze.yaml] -m module [its own arguments ...]

Runs a script, a module, or a command that is a Python script, in this process; every Trainer of transformers, TRL or a
tool on top of them that it makes freezes adapters as if it had callbacks=[SafeCallback()]. Each writes journal.jsonl
into its output_dir.

  --config FILE  fields of SafeConfig, one "field: value" per line, before the script

With several processes: torchrun --nproc_per_node 2 -m adafreeze run script.py ..., or accelerate launch -m adafreeze
run script.py ...
"""


def main(argv: Sequence[str]) -> None:
    """Run it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    parser = Parser(prog="adafreeze run", add_help=False)
    parser.add_argument("--config", default=None)
    parser.add_argument("-m", dest="module", action="store_true")
    parser.add_argument("target", metavar="script.py")
    parser.add_argument("arguments", nargs=REMAINDER, help=SUPPRESS)
    given = parser.parse_args(argv)
    config = None if given.config is None else SafeConfig.from_dict(read_yaml(given.config))
    run_with_safe(given.target, given.arguments, config, module=given.module)
