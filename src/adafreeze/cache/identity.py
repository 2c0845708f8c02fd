"""Identity: a digest of all that a prefix's output depends on, but for the sample."""

from __future__ import annotations

import importlib.metadata
import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from .._version import __version__
from ..model.backends import Backend
from ..model.blocks import Stack, modules_outside

__all__ = ["FORMAT_VERSION", "HOSTS_SET", "Identity"]

FORMAT_VERSION = 2

# Elements of each weight that are read before each pass. What writes to ``.data`` in place (a moving average, noise on
# weights, a merge) leaves no trace in version counters, and nearly always writes to all elements.
SAMPLED = 16

# What a configuration says of heads and outputs; models and hosts set some of it in mid-run.
_NOT_OF_THE_PREFIX = {
    *("problem_type", "id2label", "label2id", "architectures", "_name_or_path", "use_cache", "return_dict"),
    *("output_hidden_states", "output_attentions", "pad_token_id", "bos_token_id", "eos_token_id"),
}


# Attributes of modules that hosts and we ourselves set in mid-run.
HOSTS_SET = {"training", "gradient_checkpointing"}


class Identity:
    """Tells one prefix from any other by 128 bits.

    A chain: the digest of depth k is the digest of depth k − 1 together with the weights of block k − 1 and its
    adapters, so that growth hashes the new blocks alone. At its root stand the frozen weights outside the blocks
    (embeddings among them), the model's class and configuration, its attention implementation, the adapters'
    settings, the versions of the libraries, and the format of the store.

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
        self._places: list[tuple[dict[str, Any], str]] = []
        self._children: list[dict[str, Any]] = []
        self._plain: list[tuple[dict[str, Any], str]] = []
        self._samples: list[list[Tensor]] = []  # views, of one device and dtype each
        self._seen: tuple[int, int] = (0, 0)
        self._values: list[Tensor] = []
        self._changed = False

    def of(self, depths: Sequence[int]) -> bytes:
        """The digest of prefixes of these depths, one for each stack; hashes what it has not hashed yet."""
        digest = xxhash.xxh3_128()
        for stack, chain, depth in zip(self._stacks, self._chains, depths, strict=True):
            if not chain:
                chain.append(self._chains[0][0] if self._chains[0] else self._root())
            for block in stack.blocks[len(chain) - 1 : depth]:
                link = xxhash.xxh3_128(chain[-1])
                link.update(repr([_settings(module) for module in block.modules()]).encode())
                _add_tensors(link, _named_tensors(block))
                for name, site in self._backend.sites(block):
                    link.update(f"{name}:{self._backend.settings(site)}".encode())
                chain.append(link.digest())
            digest.update(chain[depth])
        return digest.digest()

    def of_calls(self, depths: Sequence[int], stacks: Sequence[int]) -> bytes:
        """The same, of the depths of calls, with the position of the stack that each is of."""
        by_stack = dict(zip(stacks, depths, strict=True))
        return self.of([by_stack.get(position, 0) for position in range(len(self._stacks))])

    def watch(self, depths: Sequence[int]) -> None:
        """Take the weights and settings of these prefixes, as they are now, for what ``changed`` compares with."""
        self.before_pass()
        if self._changed:  # since the last pass, and nothing has asked
            self.forget()
        for chain, depth in zip(self._chains, depths, strict=True):
            del chain[depth + 1 :]  # a block that leaves the prefix may train before it comes back
        blocks = [block for stack, depth in zip(self._stacks, depths, strict=True) for block in stack.blocks[:depth]]
        # Places, not tensors: what stands there may be replaced by another Parameter.
        inside = [(module, True) for block in blocks for module in block.modules()]
        self._places, self._children = [], []
        for module, whole in [*inside, *((module, False) for module in self._outside_modules())]:
            own = {name: p for name, p in module._parameters.items() if p is not None}
            frozen = [name for name, p in own.items() if whole or not p.requires_grad]
            self._places += [(module._parameters, name) for name in frozen]
            if whole:
                self._children.append(module._modules)
            if len(frozen) == len(own):
                self._places += [(module._buffers, name) for name in module._buffers]
        self._plain = [(module.__dict__, name) for module, whole in inside for name in _settings(module)]
        self._sample()
        self._seen, self._values, self._changed = self._now(), self._now_sampled(), False

    def before_pass(self) -> None:
        """Of the model, whatever for: see whether a weight was written to since the last one."""
        self._changed = self._changed or self._now() != self._seen or not self._same_values()

    def after_pass(self) -> None:
        """What a pass itself does to its weights is no change: PEFT parametrizes experts' weights in each of them."""
        self._seen, self._values = self._now(), self._now_sampled()

    def changed(self) -> bool:
        """Whether a watched weight was written to or replaced between two passes; a few of its values are looked at."""
        return self._changed

    def _now(self) -> tuple[int, int]:
        writes, objects = 0, [id(child) for table in self._children for child in table.values()]
        for table, name in self._places:
            tensor = table.get(name)
            if tensor is not None:
                # ``.data = other`` keeps the object.
                objects += [id(tensor), tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0]
                writes += 0 if tensor.is_inference() else tensor._version
        settings = tuple(content.get(name) for content, name in self._plain)
        return writes, hash((*objects, *settings))

    def _sample(self) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for table, name in self._places:
            tensor: Any = table.get(name)
            # Shards and quantized weights are subclasses with storages of their own: version counters have to do there.
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
                continue
            tensor = tensor.detach()
            tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))  # as it lies in memory
            if tensor.numel() and tensor.is_contiguous():
                step = max(1, tensor.numel() // SAMPLED)
                while tensor.ndim and math.gcd(step, tensor.shape[-1]) > 1:  # or it would see one column alone
                    step -= 1
                group = groups.setdefault((tensor.device, tensor.dtype), [])
                group.append(tensor.view(-1)[::step][:SAMPLED])
        self._samples = list(groups.values())

    def _now_sampled(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._samples]

    def _same_values(self) -> bool:
        # By bits, so that NaN is equal to itself.
        pairs = zip(self._values, self._now_sampled(), strict=True)
        return all(torch.equal(old.view(torch.uint8), new.view(torch.uint8)) for old, new in pairs)

    def forget(self) -> None:
        """Hash anew at the next ``of``."""
        for chain in self._chains:
            chain.clear()

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
        _add_tensors(digest, self._outside())
        return digest.digest()

    def _outside_modules(self) -> list[nn.Module]:
        return modules_outside(self._model.modules(), self._stacks)

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        """Frozen parameters outside the blocks, and buffers of modules in which nothing trains."""
        outside = {id(module) for module in self._outside_modules()}
        for name, module in self._model.named_modules():
            if id(module) not in outside:
                continue
            own = dict(module.named_parameters(recurse=False))
            yield from ((f"{name}.{key}", p) for key, p in own.items() if not p.requires_grad)
            if not any(p.requires_grad for p in own.values()):
                yield from ((f"{name}.{key}", buffer) for key, buffer in module.named_buffers(recurse=False))


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and words among the attributes of a module: a scale, a probability, the name of an implementation.

    Not private ones, such as PEFT's switch for passes without adapters, which turns twice in each step of DPO.
    """
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, (bool, int, float, str)) and name not in HOSTS_SET and not name.startswith("_")
    }


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _add_tensors(digest: xxhash.xxh3_128, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(_bytes_of(tensor.detach()))


def _bytes_of(tensor: Tensor) -> memoryview | bytes:
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes keeps its scales beside the weight
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and state is None:
        return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    buffer = io.BytesIO()  # a subclass: whatever it is made of
    torch.save([tensor, state.as_dict() if hasattr(state, "as_dict") else None], buffer)
    return buffer.getvalue()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
