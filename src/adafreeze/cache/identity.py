"""A digest of everything that a prefix's output depends on, except the sample."""

from __future__ import annotations

import importlib.metadata
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from .._version import __version__
from ..model.backends import Backend
from ..model.blocks import Stack, modules_outside

__all__ = ["FORMAT_VERSION", "HOSTS_SET", "Identity"]

FORMAT_VERSION = 2

# Elements read of each weight before each pass. In-place writes to ``.data`` (a moving average, noise on weights, a
# merge) leave no trace in version counters, and nearly always write to all elements.
SAMPLED = 16

# Settings for heads and outputs; models and hosts change some of them during training.
_NOT_OF_THE_PREFIX = {
    *("problem_type", "id2label", "label2id", "architectures", "_name_or_path", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "pad_token_id", "bos_token_id", "eos_token_id"),
}

# Attributes of modules that hosts and adafreeze set during training.
HOSTS_SET = {"training", "gradient_checkpointing"}


class Identity:
    """A 128-bit digest of a prefix, and a check before each pass that its weights are unchanged.

    The digest is a chain: that of depth k covers that of depth k − 1, the weights of block k − 1 and its adapters, so
    that growth hashes only the new blocks. The first link covers the frozen weights outside the blocks, the model's
    class and configuration, the adapters' settings, library versions, and the format of the store.

    Args:
        model: the module that the host calls.
        stacks: in data-flow order.
        backend: knows the adapters' settings.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack], backend: Backend) -> None:
        self._model = model
        self._stacks = stacks
        self._backend = backend
        self._chains: list[list[bytes]] = [[] for _ in stacks]
        # Places of weights and settings, not the values: another Parameter may take the place of one.
        self._weights: list[tuple[dict[str, Any], str]] = []
        self._children: list[dict[str, Any]] = []
        self._settings: list[tuple[dict[str, Any], str]] = []
        self._sampled: list[list[Tensor]] = []  # views of a few elements of each weight, by device and dtype
        self._samples: list[Tensor] = []  # their values after the last pass
        self._seen = self._state()
        self._changed = False

    def of(self, depths: Sequence[int]) -> bytes:
        """The digest of prefixes of these depths, one for each stack; hashes what it has not hashed yet."""
        digest = xxhash.xxh3_128()
        for stack, links, depth in zip(self._stacks, self._chains, depths, strict=True):
            if not links:
                links.append(self._chains[0][0] if self._chains[0] else self._root())
            for block in stack.blocks[len(links) - 1 : depth]:
                link = xxhash.xxh3_128(links[-1])
                link.update(repr([_settings(module) for module in block.modules()]).encode())
                _add_tensors(link, chain(block.named_parameters(), block.named_buffers()))
                for name, site in self._backend.sites(block):
                    link.update(f"{name}:{self._backend.settings(site)}".encode())
                links.append(link.digest())
            digest.update(links[depth])
        return digest.digest()

    def of_stacks(self, depths: Mapping[str, int]) -> bytes:
        """The same for depths by stack path; stacks that are not mentioned have none."""
        return self.of([depths.get(stack.path, 0) for stack in self._stacks])

    def watch(self, depths: Sequence[int]) -> None:
        """Watch the weights and settings of these prefixes for changes."""
        self.before_pass()
        if self._changed:  # since the last pass, and nothing has asked
            self.forget()
        for links, depth in zip(self._chains, depths, strict=True):
            del links[depth + 1 :]  # a block that leaves the prefix may train before it comes back
        blocks = [block for stack, depth in zip(self._stacks, depths, strict=True) for block in stack.blocks[:depth]]
        inside = [module for block in blocks for module in block.modules()]
        self._weights = [(table, name) for m in inside for table in (m._parameters, m._buffers) for name in table]
        self._weights += [place for module in self._outside_modules() for place in _frozen(module)]
        self._children = [module._modules for module in inside]
        self._settings = [(module.__dict__, name) for module in inside for name in _settings(module)]
        self._sample()
        self.after_pass()
        self._changed = False

    def before_pass(self) -> None:
        """Notice whether a weight was written to since the last pass of the model, of any kind."""
        # By bits, so that NaN is equal to itself.
        pairs = zip(self._samples, self._read_samples(), strict=True)
        same = all(torch.equal(old.view(torch.uint8), new.view(torch.uint8)) for old, new in pairs)
        self._changed = self._changed or not same or self._state() != self._seen

    def after_pass(self) -> None:
        """Ignore what a pass itself does to its weights: PEFT parametrizes experts' weights in each of them."""
        self._seen, self._samples = self._state(), self._read_samples()

    def changed(self) -> bool:
        """Whether a watched weight was written to or replaced between two passes."""
        return self._changed

    def _state(self) -> tuple[int, int]:
        """Sum of the version counters, and a hash of which objects and settings are in place."""
        versions, objects = 0, [id(child) for table in self._children for child in table.values()]
        for table, name in self._weights:
            tensor = table.get(name)
            if tensor is not None:
                # ``.data = other`` keeps the object.
                objects += [id(tensor), tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0]
                versions += 0 if tensor.is_inference() else tensor._version
        return versions, hash((*objects, *(content.get(name) for content, name in self._settings)))

    def _sample(self) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for table, name in self._weights:
            tensor: Any = table.get(name)
            # Shards and quantized weights are subclasses with other storages; for them there are version counters.
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
                continue
            tensor = tensor.detach()
            tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))  # in memory order
            if tensor.numel() and tensor.is_contiguous():
                step = max(1, tensor.numel() // SAMPLED)
                while tensor.ndim and math.gcd(step, tensor.shape[-1]) > 1:  # or all samples would be of one column
                    step -= 1
                groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.view(-1)[::step][:SAMPLED])
        self._sampled = list(groups.values())

    def _read_samples(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._sampled]

    def forget(self) -> None:
        """Hash anew at the next ``of``."""
        for links in self._chains:
            links.clear()

    def _root(self) -> bytes:
        digest = xxhash.xxh3_128()
        config: Any = getattr(self._model, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {"config": config}
        described = [
            str(FORMAT_VERSION),
            f"adafreeze {__version__}",
            *(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft")),
            type(self._model).__qualname__,
            sys.byteorder,
            str(getattr(config, "_attn_implementation", None)),
            *sorted(f"{name}={value}" for name, value in settings.items() if name not in _NOT_OF_THE_PREFIX),
            *self._backend.described(),
        ]
        digest.update("\n".join(described).encode())
        names = {id(module): name for name, module in self._model.named_modules()}
        for module in self._outside_modules():
            found = ((f"{names[id(module)]}.{key}", table.get(key)) for table, key in _frozen(module))
            _add_tensors(digest, ((name, tensor) for name, tensor in found if tensor is not None))
        return digest.digest()

    def _outside_modules(self) -> list[nn.Module]:
        return modules_outside(self._model.modules(), self._stacks)


def _frozen(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Frozen parameters of a module itself, and its buffers if nothing in it trains."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    places: list[tuple[dict[str, Any], str]] = [(module._parameters, n) for n, p in own.items() if not p.requires_grad]
    if len(places) == len(own):
        places += [(module._buffers, name) for name in module._buffers]
    return places


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and words among the attributes of a module: a scale, a probability, the name of an implementation.

    Not private ones, such as PEFT's switch for passes without adapters, which changes twice in each step of DPO.
    """
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, (bool, int, float, str)) and name not in HOSTS_SET and not name.startswith("_")
    }


def _add_tensors(digest: xxhash.xxh3_128, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes_of(tensor.detach()))


def _bytes_of(tensor: Tensor) -> memoryview | bytes:
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes keeps its scales beside the weight
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and state is None:
        return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    buffer = io.BytesIO()  # a subclass, with all its parts
    torch.save([tensor, state.as_dict() if hasattr(state, "as_dict") else None], buffer)
    return buffer.getvalue()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
