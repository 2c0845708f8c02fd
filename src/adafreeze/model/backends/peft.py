"""PEFT: where its adapters are, how to switch them off for a look, and how to make a freeze stick."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import ModelError, warn
from ..blocks import user_name, users_class
from ..patches import before_call, patched

__all__ = ["NOT_PER_BLOCK", "PeftBackend"]

# These add virtual tokens, one trunk beside the model, or parameters outside the blocks: nothing to freeze by block.
NOT_PER_BLOCK = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}


class PeftBackend:
    """The adapters that PEFT injected into ``model`` (through ``get_peft_model`` or ``model.add_adapter``).

    Raises:
        ModelError: there are none, or the method is a prompt method.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        configs = getattr(model, "peft_config", None) or {}
        for name, config in configs.items() if isinstance(configs, dict) else ():
            kind = getattr(config.peft_type, "value", str(config.peft_type))
            if getattr(config, "is_prompt_learning", False) or kind in NOT_PER_BLOCK:
                raise ModelError(
                    f"The adapter {name!r} is of type {kind}.",
                    cause="It trains inputs or a part outside the transformer blocks, so there is no adapter per "
                    "block to score and freeze.",
                    fix="Use a method with weights in each block, such as LoraConfig(...), or leave adafreeze out.",
                )
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ModelError(
                f"{type(model).__name__} has no adapters.",
                cause="adafreeze freezes adapters that PEFT injected, and no layer of this model carries one.",
                fix='model = get_peft_model(model, LoraConfig(target_modules="all-linear"))',
            )
        self._allocators = [
            module for module in model.modules() if callable(getattr(module, "update_and_allocate", None))
        ]
        self._stopped: list[patched] = []
        self._held: dict[int, patched] = {}

    def sites(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The outermost adapted layers in ``block`` with their names in it."""
        found: list[str] = []
        for name, module in block.named_modules():
            adapted = isinstance(module, BaseTunerLayer)
            if adapted and not any(name.startswith(path + ".") for path in found):
                found.append(name)
                yield name, module

    @contextmanager
    def adapters_off(self, within: nn.Module | None = None) -> Iterator[None]:
        """Run ``within`` (default: the model) as pre-trained.

        PEFT's own ``disable_adapter()`` marks all adapters trainable again on exit, which would undo every
        freeze; the flag alone does not.
        """
        flags = [
            (module, module._disable_adapters)
            for module in (within or self.model).modules()
            if "_disable_adapters" in module.__dict__ or isinstance(module, BaseTunerLayer)
        ]
        try:
            for module, _ in flags:
                module._disable_adapters = True  # type: ignore[assignment]
            yield
        finally:
            for module, flag in flags:
                module._disable_adapters = flag

    def any_merged(self) -> bool:
        """Whether an adapter is merged into its base weight now (its forward would unmerge it: rounding)."""
        return any(isinstance(module, BaseTunerLayer) and module.merged for module in self.model.modules())

    def settings(self, site: nn.Module) -> tuple[Any, ...]:
        """What decides what ``site`` computes, but for its weights: adapters on, their scaling, merged or not."""
        active = self.active(site)
        scaling = getattr(site, "scaling", None) or {}
        scales = tuple(scaling.get(name) for name in active) if isinstance(scaling, dict) else (scaling,)
        return active, scales, tuple(site.merged_adapters), bool(site.disable_adapters)  # type: ignore[arg-type]

    def described(self) -> list[str]:
        """The settings of all adapters as text, the same in every process."""
        configs = getattr(self.model, "peft_config", None) or {}

        def plain(value: Any) -> Any:
            return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

        return [
            f"{name}: {json.dumps(config.to_dict(), sort_keys=True, default=plain)}"
            for name, config in sorted(configs.items())
        ]

    def why_frozen(self) -> ModelError:
        """What to raise where adapters stand in the blocks and none of them trains."""
        configs = getattr(self.model, "peft_config", None) or {}
        active = {name for _, site in self.sites(self.model) for name in self.active(site)}
        loaded = sorted(name for name, config in configs.items() if name in active and config.inference_mode)
        if loaded:
            return ModelError(
                f"No trainable adapter was found in the blocks of {users_class(self.model)}.",
                cause=f"The adapter {', '.join(map(repr, loaded))} was loaded for inference (inference_mode=True).",
                fix="PeftModel.from_pretrained(model, path, is_trainable=True); or model.load_adapter(..., "
                "is_trainable=True)",
            )
        return ModelError(
            f"No trainable adapter was found in the blocks of {users_class(self.model)}.",
            cause="All adapter parameters in the blocks are frozen: prepare_model_for_kbit_training, or "
            "requires_grad_(False), was called after the adapters were put in.",
            fix="Call prepare_model_for_kbit_training before get_peft_model, not after it. For adapters that are in "
            f"already: model.set_adapter({min(active, default='default')!r})",
        )

    def remedy(self, name: str) -> str:
        """What to change so that the parameter ``name``, which belongs to no unit, does not train."""
        configs = list((getattr(self.model, "peft_config", None) or {}).values())
        kind = type(configs[0]).__name__ if configs else "LoraConfig"
        if ".modules_to_save." in name:
            place = user_name(name.partition(".modules_to_save.")[0])
            saved = (entry for config in configs for entry in getattr(config, "modules_to_save", None) or ())
            return f"{kind}(modules_to_save=...) without {next(filter(place.endswith, saved), place)!r}"
        if ".token_adapter." in name or ".trainable_tokens_delta." in name:
            return f"{kind}() without trainable_token_indices"
        if name.endswith(".bias") and any(getattr(config, "bias", "none") != "none" for config in configs):
            return f'{kind}(bias="none")'
        sites = [site for site, _ in self.sites(self.model)]
        own = next((site for site in sites if name.startswith(f"{site}.")), None)
        if own is None:
            return f"requires_grad_(False) on {user_name(name)}"
        for entry in (entry for config in configs for entry in _entries(getattr(config, "target_modules", None))):
            if [site for site in sites if f".{site}".endswith(f".{entry}")] == [own]:
                return f"{kind}(target_modules=...) without {entry!r}"
        return f"{kind}(exclude_modules=[{user_name(own)!r}])"

    def merges(self, block: nn.Module, notice: Callable[[], None]) -> Iterator[AbstractContextManager[None]]:
        """Contexts in which ``notice`` is called before an adapter of ``block`` is merged into its base weight."""
        for _, site in self.sites(block):
            yield before_call(site, "merge", notice)

    def hold(self, site: nn.Module, live: set[int]) -> None:
        """Tell PEFT to keep the parameters of ``site`` frozen, but for those whose id is in ``live``.

        Those that never were to train (LoRA-FA's A) are among them. ``set_adapter``, ``disable_adapter`` and
        ``enable_adapters`` re-apply this list since PEFT 0.20.
        """
        if not isinstance(site, BaseTunerLayer) or not hasattr(site, "_freeze_non_trainable_peft_weights"):
            return  # an older or newer PEFT: the audit before each forward pass holds the freeze instead
        held = dict(site.frozen_peft_weight_names)
        for adapter in site.active_adapters:
            names = set(held.get(adapter, ()))
            for attribute in site.adapter_layer_names:
                parameters = _parameters_of(getattr(site, attribute, None), adapter)
                if parameters and not any(id(parameter) in live for parameter in parameters):
                    names.add(attribute)
            held[adapter] = tuple(sorted(names))
        if id(site) in self._held:
            site.frozen_peft_weight_names = held
        else:
            self._held[id(site)] = patched(site, "frozen_peft_weight_names", held)
            self._held[id(site)].__enter__()
        site._freeze_non_trainable_peft_weights(site.active_adapters)

    def holds(self, site: nn.Module) -> bool:
        """Whether PEFT itself keeps what ``hold`` told it to."""
        return "frozen_peft_weight_names" in site.__dict__

    def active(self, site: nn.Module) -> tuple[str, ...]:
        """Names of the adapters that are active at ``site``."""
        return tuple(site.active_adapters)  # type: ignore[arg-type]

    def release(self, sites: Iterable[nn.Module]) -> None:
        """Undo ``hold``."""
        for site in sites:
            if (held := self._held.pop(id(site), None)) is not None:
                held.__exit__()

    def dropouts(self, site: nn.Module) -> Iterator[tuple[nn.ModuleDict, str]]:
        """The adapter dropouts of ``site``: (container, key), each a module that may become Identity."""
        for name, child in site.named_children():
            if name.endswith("dropout") and isinstance(child, nn.ModuleDict):
                yield from ((child, key) for key in child)

    @property
    def moves_ranks(self) -> bool:
        """Whether ``stop_rank_allocation`` has something to stop."""
        return bool(self._allocators)

    def stop_rank_allocation(self) -> None:
        """AdaLoRA moves ranks between layers: that would rewrite frozen adapters, and it crashes on missing gradients.

        From the first freeze on its ``update_and_allocate`` does nothing.
        """
        for module in self._allocators:
            if "update_and_allocate" not in module.__dict__:
                stopped = patched(module, "update_and_allocate", lambda *_, **__: None)
                stopped.__enter__()
                self._stopped.append(stopped)
                warn(
                    "AdaLoRA's rank allocation ends at the first freeze.",
                    cause="It would rewrite the ranks of frozen adapters; the ranks stay as they are now.",
                    fix="Give AdaLoraConfig a tfinal that ends before the freezing starts, or use LoRA.",
                )

    def resume_rank_allocation(self) -> None:
        """Undo ``stop_rank_allocation``."""
        for stopped in self._stopped:
            stopped.__exit__()
        self._stopped.clear()


def _entries(targets: Any) -> list[str]:
    """What stands in ``target_modules``; nothing where that is a pattern."""
    return [] if targets is None or isinstance(targets, str) else sorted(targets)


def _parameters_of(holder: object, adapter: str) -> list[nn.Parameter]:
    if holder is None:
        return []
    try:
        entry = holder[adapter]  # type: ignore[index]
    except (AttributeError, IndexError, KeyError, TypeError):
        return []
    if isinstance(entry, nn.Parameter):
        return [entry]
    return list(entry.parameters()) if isinstance(entry, nn.Module) else []
