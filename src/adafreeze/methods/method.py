"""Method: a way to train, as a small class that changes what it must of a run and nothing else."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from ..config import SafeConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from .outcome import Outcome

__all__ = ["Combined", "Method", "Setup"]


@dataclass
class Setup:
    """A run before it starts. A method changes what stands in it.

    Attributes:
        safe: how adapters freeze while it trains; None: they do not.
        settings: the fields of SafeConfig that the user gave, for all methods that freeze.
        collator: what makes a batch of rows.
        training: arguments of the Trainer.
        adapter: configuration of the adapters.
        base: the pre-trained model, before the adapters are put in.
        rows: that are trained on, prepared; None before the adapters are in.
        found: what the methods named in ``Method.after`` came to, on the same task and seed.
        callbacks: of the Trainer, in front of SafeCallback.
        optimizer: instead of the Trainer's own.
        kinds: each is asked before every step for something hashable that changes when the cost of a step does.
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

    def is_lora(self) -> bool:
        """Whether the adapters are LoRA's, DoRA among it."""
        return str(getattr(self.adapter.peft_type, "value", self.adapter.peft_type)) == "LORA"

    def outcome(self, method: str) -> Outcome:
        """What ``method`` came to.

        Raises:
            ConfigError: it was not run, or did not fit.
        """
        found = self.found.get(method)
        if found is None or found.reason is not None:
            raise ConfigError(
                f"There is no result of {method!r} on this task and seed.",
                cause="It was not run, or failed." if found is None or found.reason is None else found.reason,
                fix=f"--methods {method} ...",
            )
        return found


class Method:
    """Plain adapter-tuning; each subclass is one other way.

    A method of your own is a subclass in a file: ``adafreeze compare --methods plain safe my_method.py:MyMethod``.

    Attributes:
        name: as typed after ``--methods``.
        after: methods whose results it needs, on the same task and seed.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()

    def configure(self, setup: Setup) -> None:
        """Before the adapters are put in.

        Raises:
            AdafreezeError: the method does not fit this model or these adapters; the table shows the reason.
        """

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """With the adapters in, before there is a Trainer; raises as ``configure``."""

    def digest(self, found: Mapping[str, Outcome]) -> str:
        """Of the files of this class and those that it is made from, and of the results ``found`` that it builds on.

        Cells of a table are taken up only if it is the same. Files are read once, when this is first asked.
        """
        kinds = [kind for kind in type(self).__mro__ if kind not in (Method, object)]
        parts = [type(self).__qualname__, *dict.fromkeys(_source(kind.__module__) for kind in kinds)]
        parts += [repr((name, one.steps, one.flops, one.freezes)) for name, one in sorted(found.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def _source(module: str) -> str:
    """Its code without comments and docstrings, which change no result."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or edited since
        return module
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


class Combined(Method):
    """Several methods in one run, each in its turn.

    Args:
        parts: in order; where two change the same thing, the later one wins.
    """

    def __init__(self, parts: list[Method]) -> None:
        self.parts = parts
        self.name = "+".join(part.name for part in parts)  # type: ignore[misc]
        self.after = tuple(dict.fromkeys(name for part in parts for name in part.after))  # type: ignore[misc]

    def digest(self, found: Mapping[str, Outcome]) -> str:
        """Of all parts."""
        return hashlib.sha256(" ".join(part.digest(found) for part in self.parts).encode()).hexdigest()[:16]

    def configure(self, setup: Setup) -> None:
        """Each part's."""
        for part in self.parts:
            part.configure(setup)

    def prepare(self, model: PeftModel, setup: Setup) -> None:
        """Each part's."""
        for part in self.parts:
            part.prepare(model, setup)
