"""The backend for AdapterHub's ``adapters``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import ModelError
from .base import Backend

__all__ = ["AdapterHubBackend"]

# Virtual tokens before the text, or one pool of parameters for all blocks: nothing to freeze by block.
_NOT_PER_BLOCK = {"PrefixTuningConfig", "PromptTuningConfig"}


class AdapterHubBackend(Backend):
    """The adapters from ``adapters.init(model); model.add_adapter(...); model.train_adapter(...)``.

    An adapted layer is a module with an active adapter: the attention and the feed-forward output of a Houlsby block,
    the one output of a Pfeiffer block, a linear layer with LoRA, the point behind a block where ReFT edits its output.

    Raises:
        ModelError: no adapter is active, or its weights are not in the blocks (prefix tuning, prompt tuning).
    """

    merge_method = "merge_adapter"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for name in self._active_names():
            config = self._library.get(name)
            found = _NOT_PER_BLOCK & {type(part).__name__ for part in getattr(config, "configs", None) or [config]}
            if found:
                raise ModelError(
                    f"The adapter {name!r} has a {min(found)}, which trains virtual tokens and no weights per block.",
                    fix='Use model.add_adapter(name, config="double_seq_bn") or another method with weights in each '
                    "block, or train without adafreeze.",
                )
        if next(self.sites(model), None) is None:
            raise ModelError(
                f"{type(model).__name__} has no active adapter of the library `adapters` in its blocks.",
                fix='model.add_adapter("task", config="double_seq_bn"); model.train_adapter("task")',
            )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether ``adapters.init`` was called on ``model``."""
        return hasattr(model, "adapters_config")

    def is_layer(self, module: nn.Module) -> bool:
        """Whether ``module`` is an ``AdapterLayerBase``."""
        return any(kind.__name__ == "AdapterLayerBase" for kind in type(module).__mro__)

    def is_site(self, module: nn.Module) -> bool:
        """Whether ``module`` has an active adapter."""
        return self.is_layer(module) and bool(self.active(module))

    def active(self, site: nn.Module) -> tuple[str, ...]:
        """Names of the active adapters of an adapted layer."""
        return tuple(name for name in self._active_names() if _adapter(site, name) is not None)

    def configs(self) -> Mapping[str, Any]:
        """The configuration of each adapter."""
        return {name: self._library.get(name) for name in self._library.adapters}

    def described(self) -> list[str]:
        """The settings of all adapters, and which are active."""
        library = self._library
        return [*super().described(), f"active {library.active_setup}, but for layers {library.skip_layers}"]

    def settings(self, site: nn.Module) -> tuple[Any, ...]:
        """The active setup, and which layers are merged."""
        merged = tuple(getattr(module, "merged", None) for module in site.modules() if self.is_layer(module))
        return str(site.get_active_setup()), merged  # type: ignore[operator]

    @contextmanager
    def adapters_off(self, within: nn.Module | None = None) -> Iterator[None]:
        """Run the model as pre-trained, heads included: an empty setup, on this thread only."""
        from adapters import AdapterSetup

        with AdapterSetup(None):
            yield

    def dropouts(self, site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The dropouts inside the adapters of ``site``."""
        for layer in filter(self.is_layer, site.modules()):
            for adapter in (_adapter(layer, name) for name in self._active_names()):
                for parent in adapter.modules() if adapter is not None else ():
                    yield from (
                        (parent, key) for key, child in parent.named_children() if isinstance(child, nn.Dropout)
                    )

    def why_frozen(self) -> tuple[str, str]:
        """``train_adapter`` was not called."""
        names = ", ".join(map(repr, self._active_names()))
        return "all parameters of the active adapters are frozen", f"model.train_adapter({names})"

    def remedy(self, name: str) -> str:
        """What to change so that the parameter ``name``, which belongs to no unit, does not train."""
        if ".invertible_adapters." in name:
            return 'an adapter without invertible layers (inv_adapter=None, "seq_bn" in place of "seq_bn_inv")'
        if "embeddings." in name:
            return "model.train_adapter(..., train_embeddings=False)"
        return super().remedy(name)

    @property
    def _library(self) -> Any:
        return self.model.adapters_config

    def _active_names(self) -> list[str]:
        setup = self._library.active_setup if self._library is not None else None
        return sorted(setup.flatten()) if setup is not None else []


def _adapter(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_adapter(name)  # type: ignore[operator, no-any-return]
    except (AttributeError, KeyError, TypeError):
        return None
