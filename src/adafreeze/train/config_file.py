"""``--config file.yaml``: a run's flags in a file."""

from __future__ import annotations

import difflib
import json
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["flags_from_file"]


def flags_from_file(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """The file that ``--config`` names as flags, to stand in front of those typed.

    Through the same parser, so that a value is checked and converted by one rule wherever it is written
    (YAML reads 1e-4 as text, which a flag is anyway), and the command line wins by standing last.

    Raises:
        ConfigError: the file cannot be read, or has a key that is no flag.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    try:
        path = first.parse_known_args(list(argv))[0].config
    except ArgumentError:
        return []  # --config without a file: the one parser says so
    if path is None:
        return []
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    tokens: list[str] = []
    values = _read_yaml(path)
    unknown = [str(key) for key in values if str(key).replace("-", "_") not in actions]
    if unknown:
        close = difflib.get_close_matches(unknown[0], actions, n=1)
        raise ConfigError(
            f"{path} has unknown keys: {', '.join(unknown)}.",
            cause="Its keys are the names of the flags, without the dashes in front.",
            fix=f"Did you mean {close[0]}?" if close else "`adafreeze train --help` lists all flags.",
        )
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if value is None:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, list) and actions[name].nargs != "+":
            raise ConfigError(
                f"{path}: {key} is a list.",
                cause="This flag takes one value.",
                fix=f"{key}: {value[0] if value else '...'}",
            )
        if actions[name].nargs == "+":
            tokens += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        else:
            tokens.append(f"--{name}={value}")
    return tokens


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The file {path} of --config cannot be read ({error.strerror}).",
            cause="It does not exist, or is not readable.",
            fix=f"Correct the path; `ls {Path(path).parent}` shows what is there.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or error}).",
            cause="A colon without a space behind it, wrong indentation, or an open quote or bracket.",
            fix='Write one "flag: value" a line.',
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if values is None else type(values).__name__}, not names with values.",
            cause="--config needs the names of flags and their values.",
            fix='Write one "flag: value" a line, like "learning_rate: 1e-4".',
        )
    return values
