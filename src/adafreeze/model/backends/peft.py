"""The backend for PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import ModelError, warn
from ..batch import called_by_column
from ..blocks import user_name
from ..patches import patched
from ..restore import temporarily
from ..traces import without_users_hooks
from .base import Backend

__all__ = ["NOT_PER_BLOCK", "PeftBackend"]

# Virtual tokens, one trunk beside the model, or parameters outside the blocks: nothing to freeze by block.
NOT_PER_BLOCK = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}


class PeftBackend(Backend):
    """The adapters that PEFT injected into ``model`` (through ``get_peft_model`` or ``model.add_adapter``).

    Raises:
        ModelError: there are none, or their weights are not in the blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for name, config in self.configs().items():
            kind = getattr(config.peft_type, "value", str(config.peft_type))
            if getattr(config, "is_prompt_learning", False) or kind in NOT_PER_BLOCK:
                raise ModelError(
                    f"The adapter {name!r} is of type {kind}, which has no weights per block to score and freeze.",
                    fix="Use a method with weights in each block, such as LoraConfig(...), or train without adafreeze.",
                )
        if not self.matches(model):
            raise ModelError(
                f"{type(model).__name__} has no adapters.",
                fix='model.add_adapter(LoraConfig(target_modules="all-linear"))'
                if called_by_column(model)
                else 'model = get_peft_model(model, LoraConfig(target_modules="all-linear"))',
            )
        self._allocators = [m for m in model.modules() if callable(getattr(m, "update_and_allocate", None))]
        self.moves_ranks = bool(self._allocators)
        self._patches: dict[int, patched] = {}

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether PEFT adapted any layer of ``model``."""
        return any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def is_layer(self, module: nn.Module) -> bool:
        """Whether ``module`` is a ``BaseTunerLayer``."""
        return isinstance(module, BaseTunerLayer)

    def active(self, site: nn.Module) -> tuple[str, ...]:
        """Names of the active adapters of an adapted layer."""
        return tuple(site.active_adapters)  # type: ignore[arg-type]

    def configs(self) -> Mapping[str, Any]:
        """The configuration of each adapter."""
        configs = getattr(self.model, "peft_config", None)
        return configs if isinstance(configs, dict) else {}

    def settings(self, site: nn.Module) -> tuple[Any, ...]:
        """Active and merged adapters, their scaling, and whether they are on."""
        active = self.active(site)
        scaling = getattr(site, "scaling", None) or {}
        scales = tuple(scaling.get(name) for name in active) if isinstance(scaling, dict) else (scaling,)
        return active, scales, tuple(site.merged_adapters), bool(site.disable_adapters)  # type: ignore[arg-type]

    def is_at_rest(self, site: nn.Module) -> bool:
        """Whether each active adapter has a parameter that is all zero or all one, and on and off are equal to the bit.

        LoRA's B and its relatives start at zero, IA3's scales at one. PiSSA and OLoRA move the base weight, and their
        adapters do something from the start.
        """
        layer = site.get_base_layer() if isinstance(site, BaseTunerLayer) else None
        width = getattr(layer, "in_features", None) or getattr(layer, "nx", None)
        if layer is None or site.merged or site.disable_adapters or not isinstance(width, int):
            return False
        for adapter in self.active(site):
            names: Any = site.adapter_layer_names
            own = [p for name in names for p in _parameters_of(getattr(site, name, None), adapter)]
            if own and not any(bool((p.detach() == constant).all()) for p in own for constant in (0, 1)):
                return False
        weight = next(layer.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        generator = torch.Generator().manual_seed(width)
        sample = torch.randn(4, width, generator=generator).to(weight.device, dtype)
        evaluation = temporarily((module, "training", False) for module in site.modules())
        try:
            with evaluation, torch.no_grad(), without_users_hooks(site.modules()):
                on = site(sample)
                with self.adapters_off(site):
                    return torch.equal(on, site(sample))
        except Exception:  # a layer of another kind takes something else
            return False

    def adapters_off(self, within: nn.Module | None = None) -> AbstractContextManager[None]:
        """Run ``within`` (default: the model) as pre-trained.

        PEFT's own ``disable_adapter()`` makes all adapters trainable again on exit, which would undo every freeze.
        """
        modules = (within or self.model).modules()
        layers = [m for m in modules if "_disable_adapters" in m.__dict__ or isinstance(m, BaseTunerLayer)]
        return temporarily((layer, "_disable_adapters", True) for layer in layers)

    def dropouts(self, site: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The adapter dropouts of ``site``."""
        for name, child in site.named_children():
            if name.endswith("dropout") and isinstance(child, nn.ModuleDict):
                yield from ((child, key) for key in child)

    def why_frozen(self) -> tuple[str, str]:
        """An adapter was loaded for inference, or frozen after it was added."""
        active = {name for _, site in self.sites(self.model) for name in self.active(site)}
        loaded = [repr(n) for n, config in sorted(self.configs().items()) if n in active and config.inference_mode]
        if loaded:
            return (
                f"the adapter {', '.join(loaded)} was loaded for inference (inference_mode=True)",
                "PeftModel.from_pretrained(model, path, is_trainable=True), or "
                "model.load_adapter(..., is_trainable=True)",
            )
        return (
            "prepare_model_for_kbit_training, or requires_grad_(False), froze them after they were added",
            "Call prepare_model_for_kbit_training before get_peft_model, or unfreeze the adapters with "
            f"model.set_adapter({min(active, default='default')!r})",
        )

    def remedy(self, name: str) -> str:
        """What to change so that the parameter ``name``, which belongs to no unit, does not train."""
        configs = list(self.configs().values())
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
            return super().remedy(name)
        targets = [getattr(config, "target_modules", None) for config in configs]
        for entry in (entry for names in targets if not isinstance(names, str) for entry in sorted(names or ())):
            if [site for site in sites if f".{site}".endswith(f".{entry}")] == [own]:
                return f"{kind}(target_modules=...) without {entry!r}"
        return f"{kind}(exclude_modules=[{user_name(own)!r}])"

    def keep_frozen(self, sites: Iterable[nn.Module], live: set[int]) -> None:
        """Keep the parameters of ``sites`` frozen through ``set_adapter``, ``disable_adapter`` and ``enable_adapters``.

        These re-apply ``frozen_peft_weight_names`` since PEFT 0.20. Parameters that never trained (LoRA-FA's A) are
        included. The first call also stops AdaLoRA's rank allocation, which would rewrite frozen adapters, and fails
        on missing gradients.
        """
        for module in self._allocators:
            if id(module) not in self._patches:
                self._patch(module, "update_and_allocate", lambda *_, **__: None)
                warn(
                    "AdaLoRA's rank allocation ends at the first freeze: all ranks stay as they are now.",
                    fix="Give AdaLoraConfig a tfinal that ends before freezing starts, or use LoRA.",
                )
        for site in sites:
            if not isinstance(site, BaseTunerLayer) or not hasattr(site, "_freeze_non_trainable_peft_weights"):
                continue  # in another version of PEFT the audit before each training pass keeps the freeze
            names_by_adapter = dict(site.frozen_peft_weight_names)
            for adapter in site.active_adapters:
                names = set(names_by_adapter.get(adapter, ()))
                for name in site.adapter_layer_names:
                    parameters = _parameters_of(getattr(site, name, None), adapter)
                    if parameters and live.isdisjoint(map(id, parameters)):
                        names.add(name)
                names_by_adapter[adapter] = tuple(sorted(names))
            if id(site) in self._patches:
                site.frozen_peft_weight_names = names_by_adapter
            else:
                self._patch(site, "frozen_peft_weight_names", names_by_adapter)
            site._freeze_non_trainable_peft_weights(site.active_adapters)

    def _patch(self, module: nn.Module, name: str, value: Any) -> None:
        self._patches[id(module)] = patched(module, name, value)
        self._patches[id(module)].__enter__()

    def keeps_frozen(self, site: nn.Module) -> bool:
        """Whether PEFT itself keeps ``site`` frozen."""
        return "frozen_peft_weight_names" in site.__dict__

    def release(self) -> None:
        """Undo every ``keep_frozen``."""
        while self._patches:
            self._patches.popitem()[1].__exit__()


def _parameters_of(holder: Any, adapter: str) -> list[nn.Parameter]:
    try:
        entry = holder[adapter]
    except (AttributeError, IndexError, KeyError, TypeError):
        return []
    if isinstance(entry, nn.Parameter):
        return [entry]
    return list(entry.parameters()) if isinstance(entry, nn.Module) else []
