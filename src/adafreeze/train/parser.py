"""Parser: flags and YAML files to values; every mistake is a ConfigError."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentError, ArgumentParser, Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigError

__all__ = ["Parser", "build", "flag", "read_yaml"]


def flag(help: str, default: Any = None, *, aliases: Sequence[str] = (), choices: Iterable[str] | None = None) -> Any:
    """A field of a dataclass of flags."""
    limits = {} if choices is None else {"choices": list(choices)}
    return dataclasses.field(default=default, metadata={"help": help, "aliases": list(aliases), **limits})


def build(kind: Any, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from the values of its flags."""
    return kind(**{entry.name: values[entry.name] for entry in dataclasses.fields(kind) if entry.init})


class _Formatter(ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: Action) -> str | None:
        """Without "(default: None)" and "(default: False)"."""
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        """One spelling of two, and the value once: ``--learning_rate LEARNING_RATE``."""
        names = [name for name in action.option_strings if "-" not in name.lstrip("-") or name == "--help-all"]
        values = self._format_args(action, self._get_default_metavar_for_optional(action)) if names else ""
        return " ".join([", ".join(names), values]).strip() if names else super()._format_action_invocation(action)


class _HelpAll(Action):
    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        for action, text in parser.hidden.items():
            action.help = text
        parser.print_help()
        raise SystemExit(0)


class Parser(HfArgumentParser):
    """HfArgumentParser that raises ConfigError instead of printing two screens of usage.

    Flags cannot be abbreviated: an abbreviation would change its meaning when a flag with the same beginning is added.

    Attributes:
        hidden: flags that ``--help`` leaves out, and their texts.
    """

    def __init__(self, *groups: type, **options: Any) -> None:
        if groups:  # argparse would list every flag
            options.setdefault("usage", "%(prog)s [--flag value ...]")
        super().__init__(groups, allow_abbrev=False, formatter_class=_Formatter, **options)  # type: ignore[arg-type]
        self.hidden: dict[Action, str | None] = {}

    def hide(self, title: str, but: Collection[str]) -> None:
        """Leave the flags of the group ``title`` to ``--help-all``, but for some."""
        group = next(group for group in self._action_groups if group.title == title)
        for action in group._group_actions:
            if action.dest not in but:
                self.hidden[action] = action.help
                action.help = SUPPRESS
        group.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all flags of this group, too")

    @property
    def _lists_all(self) -> str:
        return f"`{self.prog} {'--help-all' if self.hidden else '--help'}` lists all flags"

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # one spelling of two
        raise ConfigError(
            message[0].upper() + message[1:].rstrip(".") + ".",
            fix=f"{self._lists_all} and their values.",
        )

    def parse_args(self, words: Sequence[str]) -> Namespace:  # type: ignore[override]
        """The value of every flag.

        Raises:
            ConfigError: a flag is unknown or has no such value.
        """
        namespace, unknown = self.parse_known_args(list(words))
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")] or unknown
            options = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"Unknown: {' '.join(flags)}.", fix=self._closest(flags[0], options))
        return namespace

    def with_file(self, words: Sequence[str]) -> list[str]:
        """``words`` behind the flags in the file that ``--config`` names, so that the command line wins.

        Raises:
            ConfigError: the file cannot be read, or has a key that is not a flag.
        """
        first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        first.add_argument("--config")
        try:
            path = first.parse_known_args(list(words))[0].config
        except ArgumentError:  # --config without a file: `parse_args` raises the error
            path = None
        return list(words) if path is None else [*self.words(read_yaml(path), path), *words]

    def words(self, settings: Mapping[Any, Any], source: str) -> list[str]:
        """Settings as command-line words, so that a value in ``source`` is converted and checked like a typed one.

        YAML for example reads 1e-4 as text, which a flag accepts. None values are left out.

        Raises:
            ConfigError: a key is not a flag, or a list is given to a flag with one value.
        """
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        unknown = [str(key) for key in settings if str(key).replace("-", "_") not in actions]
        if unknown:
            raise ConfigError(
                f"{source} has unknown keys: {', '.join(unknown)}.", fix=self._closest(unknown[0], actions)
            )
        words: list[str] = []
        for key, value in settings.items():
            name = str(key).replace("-", "_")
            if actions[name].nargs == "+" and value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
            elif isinstance(value, (list, tuple)):
                raise ConfigError(
                    f"{source}: {key} is a list, but takes one value.", fix=f"{key}: {value[0] if value else '...'}"
                )
            elif value is not None:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return words

    def _closest(self, name: str, known: Iterable[str]) -> str:
        close = difflib.get_close_matches(name, list(known), n=1)
        return f"Did you mean {close[0]}?" if close else f"{self._lists_all}."


def read_yaml(path: str) -> dict[Any, Any]:
    """The flags and values in the file that ``--config`` names.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The file {path} of --config cannot be read ({error.strerror}).",
            fix=f"Correct the path; `ls {Path(path).parent}` lists the files there.",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or error}).",
            fix='Write one "flag: value" per line; check indentation, quotes, brackets and the space after each colon.',
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} contains {'nothing' if values is None else type(values).__name__}, not flags with values.",
            fix='Write one "flag: value" per line, such as "learning_rate: 1e-4".',
        )
    return values
