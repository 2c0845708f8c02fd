"""AdapterHub's ``adapters``: where its modules are, and how to switch them off for a look."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ...errors import ModelError
from ..blocks import user_name, users_class
from ..patches import before_call

__all__ = ["AdapterHubBackend"]

# These put virtual tokens before the text, or parameters into one pool for all blocks: nothing to freeze by block.
_NOT_PER_BLOCK = {"PrefixTuningConfig", "PromptTuningConfig"}


class AdapterHubBackend:
    """The adapters that ``adapters.init(model); model.add_adapter(...); model.train_adapter(...)`` put into ``model``.

    A site is a module with an active adapter: the attention and the feed-forward output of a Houlsby block, the one
    output of a Pfeiffer block, a linear layer with LoRA, the point behind a block where ReFT edits its output.
    ``train_adapter`` makes frozen adapters trainable again, and the library has no switch against it: the audit before
    each training pass holds them.

    Raises:
        ModelError: no adapter is active, or it has no part in each block (prefix tuning, prompt tuning).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        names = self._active_names()
        for name in names:
            config = self._configs.get(name)
            found = _NOT_PER_BLOCK & {type(part).__name__ for part in getattr(config, "configs", None) or [config]}
            if found:
                raise ModelError(
                    f"The adapter {name!r} has a {min(found)}.",
                    cause="It trains virtual tokens from one pool, so there is no adapter per block to score and "
                    "freeze.",
                    fix='model.add_adapter(name, config="double_seq_bn"), or another method with weights in each '
                    "block; or leave adafreeze out.",
                )
        if next(self.sites(model), None) is None:
            raise ModelError(
                f"{type(model).__name__} has no active adapter.",
                cause="adafreeze freezes adapters that the library `adapters` put into the blocks, and none is active.",
                fix='model.add_adapter("task", config="double_seq_bn"); model.train_adapter("task")',
            )

    def sites(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules in ``block`` that hold an active adapter, with their names in it."""
        found: list[str] = []
        names = self._active_names()
        for name, module in block.named_modules():
            holds = _is_layer(module) and any(_adapter(module, adapter) is not None for adapter in names)
            if holds and not any(name.startswith(path + ".") for path in found):
                found.append(name)
                yield name, module

    @contextmanager
    def adapters_off(self, within: nn.Module | None = None) -> Iterator[None]:
        """Run ``within`` (default: the model) as pre-trained, heads included: an empty setup, on this thread alone."""
        from adapters import AdapterSetup

        with AdapterSetup(None):
            yield

    def any_merged(self) -> bool:
        """Whether a LoRA is merged into its base weight now."""
        return any(getattr(module, "merged", None) for module in self.model.modules() if _is_layer(module))

    def settings(self, site: nn.Module) -> tuple[Any, ...]:
        """What decides what ``site`` computes, but for its weights."""
        merged = tuple(getattr(module, "merged", None) for module in site.modules() if _is_layer(module))
        return str(site.get_active_setup()), merged  # type: ignore[operator]

    def described(self) -> list[str]:
        """The configuration of every adapter, and which are active, as text."""
        configs = self._configs
        return [
            *(
                f"{name}: {json.dumps(configs.get(name).to_dict(), sort_keys=True, default=str)}"
                for name in sorted(configs.adapters)
            ),
            f"active {configs.active_setup}, but for layers {configs.skip_layers}",
        ]

    def why_frozen(self) -> ModelError:
        """What to raise where adapters stand in the blocks and none of them trains."""
        names = ", ".join(map(repr, self._active_names()))
        return ModelError(
            f"No trainable adapter was found in the blocks of {users_class(self.model)}.",
            cause="All parameters of the active adapters are frozen.",
            fix=f"model.train_adapter({names})",
        )

    def remedy(self, name: str) -> str:
        """What to change so that the parameter ``name``, which belongs to no unit, does not train."""
        if ".invertible_adapters." in name:
            return 'an adapter without invertible layers (inv_adapter=None, "seq_bn" in place of "seq_bn_inv")'
        if "embeddings." in name:
            return "model.train_adapter(..., train_embeddings=False)"
        return f"requires_grad_(False) on {user_name(name)}"

    def merges(self, block: nn.Module, notice: Callable[[], None]) -> Iterator[AbstractContextManager[None]]:
        """Contexts in which ``notice`` is called before a LoRA of ``block`` is merged into its base weight."""
        for module in block.modules():
            if _is_layer(module) and hasattr(module, "merge_adapter"):
                yield before_call(module, "merge_adapter", notice)

    def hold(self, site: nn.Module, live: set[int]) -> None:
        """Nothing: the library has no such switch."""

    def holds(self, site: nn.Module) -> bool:
        """False: see ``hold``."""
        return False

    def release(self, sites: Iterable[nn.Module]) -> None:
        """Nothing to undo."""

    def active(self, site: nn.Module) -> tuple[str, ...]:
        """Names of the adapters that are active at ``site``."""
        return tuple(name for name in self._active_names() if _adapter(site, name) is not None)

    def dropouts(self, site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The dropouts inside the adapters of ``site``."""
        for layer in site.modules():
            for name in self._active_names() if _is_layer(layer) else ():
                adapter = _adapter(layer, name)
                for parent in adapter.modules() if adapter is not None else ():
                    yield from (
                        (parent, key) for key, child in parent.named_children() if isinstance(child, nn.Dropout)
                    )

    @property
    def moves_ranks(self) -> bool:
        """No."""
        return False

    def stop_rank_allocation(self) -> None:
        """Nothing does that here."""

    def resume_rank_allocation(self) -> None:
        """Nothing does that here."""

    @property
    def _configs(self) -> Any:
        return self.model.adapters_config

    def _active_names(self) -> list[str]:
        setup = self._configs.active_setup if self._configs is not None else None
        return sorted(setup.flatten()) if setup is not None else []


def _is_layer(module: nn.Module) -> bool:
    return any(kind.__name__ == "AdapterLayerBase" for kind in type(module).__mro__)


def _adapter(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_adapter(name)  # type: ignore[operator, no-any-return]
    except (AttributeError, KeyError, TypeError):
        return None
