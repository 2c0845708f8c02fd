"""Method: one way to train, as a small class that changes the setup of a run."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..config import SafeConfig
from ..errors import ConfigError
from .outcome import Outcome

__all__ = ["Combined", "Method", "Setup"]


@dataclass
class Setup:
    """A run before it starts; methods change its fields.

    Attributes:
        safe: the freezing during training; None for no freezing.
        settings: fields of SafeConfig that the user set, for all methods that freeze.
        collator: makes a batch of rows.
        training: arguments of the Trainer.
        adapter: configuration of the adapters.
        base: the pre-trained model without adapters.
        rows: prepared training rows; None until the adapters are in the model.
        found: outcomes of the methods in ``Method.after`` on the same task and seed.
        callbacks: of the Trainer, called before SafeCallback.
        optimizer: replaces the Trainer's own.
        kinds: called before every step; a changed return value means that a step now has other costs.
    """

    safe: SafeConfig | None
    settings: Mapping[str, Any]
    collator: Callable[..., Any]
    training: TrainingArguments
    adapter: PeftConfig
    base: PreTrainedModel
    rows: Any = None
    found: Mapping[str, Outcome] = field(default_factory=dict)
    callbacks: list[TrainerCallback] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    kinds: list[Callable[[], Hashable]] = field(default_factory=list)

    def freeze(self, **fields: Any) -> None:
        """Freeze with the user's settings, overridden by ``fields``."""
        self.safe = SafeConfig.from_dict({**self.settings, **fields})

    def lora(self, method: str) -> Any:
        """The configuration of the adapters if they are LoRA or DoRA.

        Raises:
            ConfigError: they are not, but ``method`` needs it.
        """
        if self.adapter.peft_type != "LORA":
            kind = getattr(self.adapter.peft_type, "value", self.adapter.peft_type)
            raise ConfigError(f"{method} is a kind of LoRA, but the adapters are {kind}.", fix="--adapter lora")
        return self.adapter

    def outcome(self, method: str) -> Outcome:
        """The outcome of ``method``.

        Raises:
            ConfigError: it was not run, or failed.
        """
        found = self.found.get(method)
        if found is None or found.reason is not None:
            reason = "it was not run" if found is None else found.reason
            raise ConfigError(
                f"There is no result of {method!r} on this task and seed: {reason}", fix=f"--methods {method} ..."
            )
        return found


class Method:
    """Adapter-tuning with the user's settings; subclasses change it.

    Use a subclass from your own file with ``adafreeze compare --methods plain safe my_method.py:MyMethod``.

    Attributes:
        name: as typed after ``--methods``.
        after: methods whose results it needs, on the same task and seed.
    """

    name: str
    after: tuple[str, ...] = ()

    def configure(self, setup: Setup) -> None:
        """Change the setup before the adapters are added.

        Raises:
            AdafreezeError: the method does not fit this model or these adapters; the table shows the reason.
        """

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Change the setup after the adapters are added, before the Trainer is made; raises as ``configure``."""

    def digest(self, found: Mapping[str, Outcome]) -> str:
        """A digest of the source files of this class and its bases, and of the results ``found`` that it builds on.

        `compare` reuses a finished cell only if the digest is unchanged. Each file is read once.
        """
        kinds = [kind for kind in type(self).__mro__ if kind not in (Method, object)]
        parts = [type(self).__qualname__, *dict.fromkeys(_source(kind.__module__) for kind in kinds)]
        parts += [repr((name, one.steps, one.flops, one.freezes)) for name, one in sorted(found.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def _source(module: str) -> str:
    """Its code without comments and docstrings, which do not change results."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError):  # defined in an interactive session, or the file has changed
        return module
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


class Combined(Method):
    """Several methods in one run, applied in order; later ones override earlier ones."""

    def __init__(self, parts: list[Method]) -> None:
        self.parts = parts
        self.name = "+".join(part.name for part in parts)
        self.after = tuple(dict.fromkeys(name for part in parts for name in part.after))

    def digest(self, found: Mapping[str, Outcome]) -> str:
        """A digest of all parts."""
        return hashlib.sha256(" ".join(part.digest(found) for part in self.parts).encode()).hexdigest()[:16]

    def configure(self, setup: Setup) -> None:
        """Configure by all parts."""
        for part in self.parts:
            part.configure(setup)

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Prepare by all parts."""
        for part in self.parts:
            part.prepare(model, setup)
