"""A digest of everything that a prefix's output depends on, except the sample."""

from __future__ import annotations

import importlib.metadata
import io
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..model.backends import Backend
from ..model.blocks import Stack, base_model, configs_of, device_of, modules_outside, user_name
from ..model.offloaded import data_of
from ..model.traces import changed_code

__all__ = ["FORMAT_VERSION", "HOSTS_SET", "Identity"]

FORMAT_VERSION = 3

# Elements read of each weight before each pass. In-place writes to ``.data`` (a moving average, noise on weights, a
# merge) leave no trace in version counters, and nearly always write to all elements.
SAMPLED = 16

# Settings for heads and outputs, and what the weights show themselves; models and hosts change some during training.
_NOT_OF_THE_PREFIX = {
    *("problem_type", "id2label", "label2id", "num_labels", "architectures", "_name_or_path", "use_cache"),
    *("return_dict", "output_hidden_states", "output_attentions", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("finetuning_task", "task_specific_params", "transformers_version", "dtype", "torch_dtype"),
    *("num_hidden_layers", "gradient_checkpointing"),
}
# Dropout is off in the prefix, and heads are above it.
_NOR_OF_THE_PREFIX = ("dropout", "classifier_", "summary_")

# The name under which PEFT keeps the layer that it has adapted.
BASE_LAYER = "base_layer"

# Attributes of modules that hosts and adafreeze set during training.
HOSTS_SET = {"training", "gradient_checkpointing"}


class _Link(NamedTuple):
    """The digest of a prefix of one stack, and whether no adapter in it does anything yet."""

    digest: bytes
    at_rest: bool


class Identity:
    """A 128-bit digest of a prefix, and a check before each pass that its weights are unchanged.

    The digest is a chain: that of depth k covers that of depth k − 1 and block k − 1, so that growth hashes only the
    new blocks. The first link covers the frozen weights outside the blocks, the configuration that matters to the
    prefix, library versions, device, and the format of the store.

    A block whose adapters are at rest (``Backend.is_at_rest``) computes what the pre-trained block computes. Its link
    covers the pre-trained weights only, so that runs with another seed, rank or kind of adapter have the same digest.

    Args:
        model: the module that the host calls.
        stacks: in data-flow order.
        backend: knows the adapters' settings.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack], backend: Backend) -> None:
        self._model = model
        self._stacks = stacks
        self._backend = backend
        self._chains: list[list[_Link]] = [[] for _ in stacks]
        self._entering: set[int] | None = None
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
        for links, depth in zip(self._linked(depths), depths, strict=True):
            digest.update(links[depth].digest)
        return digest.digest()

    def _linked(self, depths: Sequence[int]) -> list[list[_Link]]:
        """The chain of each stack, complete up to these depths."""
        for stack, links, depth in zip(self._stacks, self._chains, depths, strict=True):
            if not links:
                links.append(self._chains[0][0] if self._chains[0] else _Link(self._root(), True))
            for block in stack.blocks[len(links) - 1 : depth]:
                links.append(self._link(links[-1], block))
        return self._chains

    def _link(self, below: _Link, block: nn.Module) -> _Link:
        digest = xxhash.xxh3_128(below.digest)
        sites = list(self._backend.sites(block))
        at_rest = all(self._backend.is_at_rest(site) for _, site in sites)
        modules = _without_adapters(block, self._backend) if at_rest else dict(block.named_modules())
        settings = [
            (name, type(module).__name__, _of_the_prefix(_settings(module))) for name, module in modules.items()
        ]
        digest.update(repr(settings).encode())
        _add_tensors(digest, _tensors(modules))
        if not at_rest:
            digest.update("\n".join([f"peft {_version('peft')}", *self._backend.described()]).encode())
            digest.update(repr([(name, self._backend.settings(site)) for name, site in sites]).encode())
        return _Link(digest.digest(), below.at_rest and at_rest)

    def cover_entering(self, read: Collection[int]) -> None:
        """Of the weights outside the blocks cover only those with these ids: what was read before block 0."""
        self.forget()
        self._entering = set(read)

    def why_private(self, depths: Sequence[int]) -> str | None:
        """Why no other run could use what these prefixes compute; None if it could."""
        blocks = [block for stack, depth in zip(self._stacks, depths, strict=True) for block in stack.blocks[:depth]]
        inside = [module for block in blocks for module in block.modules()]
        own = changed_code([*inside, *self._outside_modules()]) or self._own_attention()
        if own is not None:
            return f"{own} has code of your own, and nothing shows whether it is the same in the next run"
        if not all(links[depth].at_rest for links, depth in zip(self._linked(depths), depths, strict=True)):
            return "adapters of the frozen prefix have been trained, or do something from the start"
        return None

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

    def stop_watching(self) -> None:
        """Let go of the weights: views of them would keep their memory alive."""
        self._weights, self._children, self._settings, self._sampled, self._samples = [], [], [], [], []

    def before_pass(self) -> None:
        """Notice whether a weight was written to since the last pass of the model, of any kind."""
        # By bits, so that NaN is equal to itself.
        pairs = zip(self._samples, self._read_samples(), strict=True)
        same = all(torch.equal(old.view(torch.uint8), new.view(torch.uint8)) for old, new in pairs)
        self._changed = self._changed or not same or self._state() != self._seen

    def moved(self) -> None:
        """Weights have moved to another device, or back, since the last ``before_pass``."""
        self._sample()
        self.after_pass()

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

    def _own_attention(self) -> str | None:
        """The name of an attention function that no library registered."""
        configs = configs_of(self._model.modules())
        for name in sorted({str(getattr(config, "_attn_implementation", None)) for config in configs}):
            function = ALL_ATTENTION_FUNCTIONS.get(name)
            if function is not None and function.__module__.partition(".")[0] not in ("transformers", "torch"):
                return f"the attention {name!r}"
        return None

    def _root(self) -> bytes:
        digest = xxhash.xxh3_128()
        settings = [
            (getattr(config, "_attn_implementation", None), _of_the_prefix(config.to_dict()))
            if hasattr(config, "to_dict")
            else repr(config)
            for config in configs_of(self._model.modules())
        ]
        device = device_of(self._model).type
        described = [
            f"format {FORMAT_VERSION}",
            *(f"{name} {_version(name)}" for name in ("torch", "transformers")),
            *self._around_blocks(),
            sys.byteorder,
            f"{device} {torch.get_float32_matmul_precision()} {torch.backends.cudnn.allow_tf32 and device == 'cuda'}",
            repr(settings),
        ]
        digest.update("\n".join(described).encode())
        names = {id(module): user_name(name) for name, module in self._model.named_modules()}
        for module in self._outside_modules():
            for table, key in _frozen(module):
                tensor = table.get(key)
                if tensor is not None and (self._entering is None or id(tensor) in self._entering):
                    _add_tensors(digest, [(f"{names[id(module)]}.{key}", tensor)])
        return digest.digest()

    def _around_blocks(self) -> Iterator[str]:
        """Path of each stack, and the classes of the modules around it, without the outermost, which is a head."""
        modules = dict(base_model(self._model).named_modules())
        for stack in self._stacks:
            parts = stack.path.split(".")
            around = [".".join(parts[:end]) for end in range(1, len(parts))] or [""]
            yield f"{stack.path} in {[type(modules[name]).__name__ for name in around if name in modules]}"

    def _outside_modules(self) -> list[nn.Module]:
        return modules_outside(self._model.modules(), self._stacks)


def _of_the_prefix(settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    return {
        name: _of_the_prefix(value)
        for name, value in sorted(settings.items(), key=lambda item: str(item[0]))
        if name not in _NOT_OF_THE_PREFIX and not any(part in str(name) for part in _NOR_OF_THE_PREFIX)
    }


def _without_adapters(block: nn.Module, backend: Backend) -> dict[str, nn.Module]:
    """The modules of a block by their names before adapters were added."""
    sites = [f"{name}." for name, _ in backend.sites(block)]
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout):
            continue
        site = next((site for site in sites if f"{name}.".startswith(site)), None)
        if site is None or f".{BASE_LAYER}." in f".{name[len(site) :]}.":
            found[name.replace(f".{BASE_LAYER}", "")] = module
    return found


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules.items():
        for table in (module._parameters, module._buffers):
            yield from ((f"{name}.{key}", tensor) for key, tensor in table.items() if tensor is not None)


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
        digest.update(_bytes_of(data_of(tensor)))


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
