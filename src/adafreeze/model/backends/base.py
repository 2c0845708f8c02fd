"""Backend: what adafreeze needs from an adapter library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..blocks import user_name
from ..patches import before_call

__all__ = ["Backend"]


class Backend:
    """The adapters that one library put into ``model``.

    To support another library, add one file with a subclass, and one line in ``find.py``.
    """

    merge_method = "merge"
    """The method of an adapted layer that merges its adapter into the base weight."""
    moves_ranks = False
    """Whether the adapters have rank allocation (AdaLoRA), which the first ``keep_frozen`` stops."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this library adapted ``model``."""
        raise NotImplementedError

    def is_layer(self, module: nn.Module) -> bool:
        """Whether ``module`` is a layer of the library that can contain adapters."""
        raise NotImplementedError

    def active(self, site: nn.Module) -> tuple[str, ...]:
        """Names of the active adapters of an adapted layer."""
        raise NotImplementedError

    def configs(self) -> Mapping[str, Any]:
        """The configuration of each adapter; each has a ``to_dict``."""
        raise NotImplementedError

    def settings(self, site: nn.Module) -> tuple[Any, ...]:
        """What the output of ``site`` depends on besides weights: active adapters, their scaling, merged or not."""
        raise NotImplementedError

    def is_at_rest(self, site: nn.Module) -> bool:
        """Whether the adapters of ``site`` do nothing, whatever enters: it computes what its pre-trained layer does."""
        return False

    def adapters_off(self, within: nn.Module | None = None) -> AbstractContextManager[None]:
        """Run ``within`` (default: the model) as pre-trained; all flags are restored."""
        raise NotImplementedError

    def dropouts(self, site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """(parent, name) of each adapter dropout of ``site``, which an Identity can replace."""
        raise NotImplementedError

    def why_frozen(self) -> tuple[str, str]:
        """(reason, fix) for a model whose blocks contain adapters, none of them trainable."""
        raise NotImplementedError

    def remedy(self, name: str) -> str:
        """What to change so that the parameter ``name``, which belongs to no unit, does not train."""
        return f"requires_grad_(False) on {user_name(name)}"

    def is_site(self, module: nn.Module) -> bool:
        """Whether ``module`` is an adapted layer."""
        return self.is_layer(module)

    def sites(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The outermost adapted layers in ``block`` with their names in it."""
        found: list[str] = []
        for name, module in block.named_modules():
            if self.is_site(module) and not any(name.startswith(f"{path}.") for path in found):
                found.append(name)
                yield name, module

    def any_merged(self) -> bool:
        """Whether an adapter is merged into its base weight; a forward pass would unmerge it, which rounds."""
        return any(self.is_layer(module) and getattr(module, "merged", False) for module in self.model.modules())

    def merges(self, block: nn.Module, notice: Callable[[], None]) -> Iterator[AbstractContextManager[None]]:
        """Contexts in which ``notice`` is called before an adapter of ``block`` is merged into its base weight."""
        for module in block.modules():
            if self.is_layer(module) and hasattr(module, self.merge_method):
                yield before_call(module, self.merge_method, notice)

    def described(self) -> list[str]:
        """The settings of all adapters as text, the same in every process."""

        def plain(value: Any) -> Any:
            return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

        return [
            f"{name}: {json.dumps(config.to_dict(), sort_keys=True, default=plain)}"
            for name, config in sorted(self.configs().items())
        ]

    def keep_frozen(self, sites: Iterable[nn.Module], live: set[int]) -> None:
        """Let the library itself keep ``sites`` frozen, except parameters whose id is in ``live``; stop moving ranks.

        Without such a switch in the library, the audit before each training pass keeps the freeze.
        """

    def keeps_frozen(self, site: nn.Module) -> bool:
        """Whether the library itself keeps ``site`` frozen."""
        return False

    def release(self) -> None:
        """Undo every ``keep_frozen``."""
