"""Offload: the weights of a frozen prefix leave the device while its states are all that training needs of it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..errors import RunError, note, warn
from ..freeze import Prefix
from ..journal import Journal
from ..model.blocks import Stack, base_model, device_of, lookup_tables, modules_outside, user_name
from ..model.offloaded import (
    FileSource,
    HostSource,
    Offloaded,
    Source,
    WeightsFile,
    bring_back,
    offload,
    resident,
    take_over,
)
from ..model.traces import users_code
from ..sizes import readable

__all__ = ["Offload", "block_weights", "input_tables", "leaving_blocks"]

# An embedding table smaller than this share of the model's weights stays: each look-up would wait for the host.
SMALL_TABLE = 0.01
# Once more than this share of the samples had to run the offloaded prefix, it comes back.
MOST_MISSES = 0.03
# Samples before that is judged.
FEW_SAMPLES = 64


class _Group(NamedTuple):
    """Weights that move together: of a block, or one embedding table."""

    name: str
    parameters: dict[str, nn.Parameter]  # by their names in the user's model


class Offload:
    """Moves the weights of the frozen prefix, and input embeddings, to the host or to disk.

    Adapters stay: they are small, and saved as always. So do weights that something else uses (a tied head), weights
    that train, the first block of a stack whose blocks share what it computes (T5), and quantized weights of a kind
    whose parts cannot be moved one by one. What still needs an offloaded weight gets it as long as it runs: a block of
    the prefix as a whole (``at_hand``), everything else through ``Offloaded``. So nothing that the model computes
    changes.

    On disk, weights that are equal to those in the safetensors file of the pre-trained model are read from there; the
    others are written to a folder first.

    Args:
        kind: ``"cpu"`` or ``"disk"``; None: only stream what was loaded without coming to the device.
        prefix: follows the freezing; its blocks ask for their weights.
        keeps: ids of parameters that stay: those of adapters.
        journal: of the run.
        folder: of what is written to disk.

    Attributes:
        ended: why everything came back for good; None while weights may leave.
        fills: what has not come to the device yet waits, since the cache is about to be filled.
        nbytes: bytes off the device.
        streamed: bytes brought to the device for passes through the prefix, so far.
    """

    def __init__(self, kind: str | None, prefix: Prefix, keeps: Iterable[int], journal: Journal, folder: Path) -> None:
        self.kind, self.prefix, self.journal, self.folder = kind, prefix, journal, folder
        self.model = prefix.model
        self.ended: str | None = None
        self.fills = False
        self.nbytes = self.streamed = self._said = 0
        self._keeps = frozenset(keeps)
        self._away: dict[nn.Module, list[Offloaded]] = {}
        self._tables: list[Offloaded] = []
        self._files: list[WeightsFile] = []
        self._ahead: dict[nn.Module, tuple[list[Tensor], Any]] = {}
        self._stream: Any = None
        self._before = (0, 0)
        self._left_at: tuple[Any, ...] = ()
        self._as_in_file: set[int] = set()
        self._lock = threading.RLock()
        if kind is not None:
            take_over(self.model)
        self._device = device_of(self.model)
        # What was loaded without coming to the device.
        self._given = [p for p in self.model.parameters() if isinstance(p, Offloaded)]
        for block in (block for stack in prefix.stacks for block in stack.blocks):
            self._away[block] = [p for p in block.parameters() if isinstance(p, Offloaded)]
        in_blocks = {id(p) for own in self._away.values() for p in own}
        self._tables = [p for p in self._given if id(p) not in in_blocks]
        self._count()
        prefix.weights = self

    @property
    def largest(self) -> int:
        """Bytes on the device while an offloaded block runs: its weights, and on CUDA those of the next one."""
        sizes = [sum(parameter.nbytes for parameter in own) for own in self._away.values()]
        return max(sizes, default=0) * (2 if self._device.type == "cuda" else 1)

    # What leaves.

    def leave(self, step: int) -> None:
        """Move everything that the run does not need any more and that is still there."""
        self._left_at, before = self._place, self._said
        if self.kind is not None:
            self._leave()
        if self.nbytes and self.nbytes != before:
            self._say(step)

    def _leave(self) -> None:
        groups, tables = self._groups()
        try:
            sources = self._sources([*groups.values(), *tables])
        except (OSError, SafetensorError) as error:  # the second where the disk is full
            self._stay(f"the folder {self.folder} cannot take them ({getattr(error, 'strerror', None) or error})")
            return
        if sources is None:
            return
        # Of weights that are those of a file: others may have been changed in a private copy of its pages.
        every = [p for group in [*groups.values(), *tables] for p in _values(group)]
        mapped = [(p.data_ptr(), p.nbytes) for p in every if id(p) in self._as_in_file]
        before = self.nbytes
        for block, group in groups.items():
            self._away.setdefault(block, []).extend(_move(group, sources))
        for group in tables:
            self._tables.extend(_move(group, sources))
        self._count()
        if self.nbytes > before:
            _return_to_system(mapped, [file.path for file in self._files])

    def _say(self, step: int) -> None:
        self._said = self.nbytes
        everything = sum(parameter.nbytes for parameter in self.model.parameters())
        stays = self._what_stays()
        to = "cpu" if all(isinstance(p.away.source, HostSource) for p in self._every) else "disk"
        self.journal.write(
            "offload",
            step=step,
            to=to,
            blocks=len(self._away),
            nbytes=self.nbytes,
            weights=everything,
            stays=stays,
        )
        tables = " and the input embeddings" if self._tables else ""
        note(
            f"Step {step}: the weights of {len(self._away)} blocks{tables} are off the device, on the "
            f"{'host' if to == 'cpu' else 'disk'}: {readable(self.nbytes)} of {readable(everything)}. "
            + "".join(f"{reason}. " for reason in stays)
            + "Passes through these blocks bring them back one by one."
        )

    def _what_stays(self) -> list[str]:
        found = []
        if not self._tables and input_tables(self.model, self.prefix.stacks, tied=True):
            found.append("The input embeddings stay, because something else uses their weights (a tied head)")
        for stack in self.prefix.stacks:
            if self.prefix.depths[stack.path] and self.prefix.runs_first(stack.path):
                found.append(f"The first block of {stack.path} stays, because all others use what it computes")
        weights = [p for _, block in leaving_blocks(self.prefix) for p in block.parameters()]
        kinds = {type(p).__name__ for p in weights if not (isinstance(p, Offloaded) or _can_move(p))}
        found += [f"{kind} weights stay, because their parts cannot be moved one by one" for kind in sorted(kinds)]
        return found

    def _groups(self) -> tuple[dict[nn.Module, _Group], list[_Group]]:
        """What may leave and has not: by block, and tables."""
        names = {id(p): name for name, p in self.model.named_parameters()}

        def group(name: str, parameters: Iterable[nn.Parameter]) -> _Group:
            return _Group(name, {names[id(p)]: p for p in parameters if _can_move(p)})

        titles = {block: name for name, block in leaving_blocks(self.prefix)}
        weights = block_weights(self.model, list(titles), self._keeps)
        blocks = {block: group(titles[block], own) for block, own in weights.items()}
        tables = input_tables(self.model, self.prefix.stacks) if any(self.prefix.depths.values()) else []
        found = [group(names[id(table)], [table]) for table in tables]
        return {b: one for b, one in blocks.items() if one.parameters}, [one for one in found if one.parameters]

    # Where to.

    def _sources(self, groups: list[_Group]) -> dict[int, Source] | None:
        """A source for each parameter; None, with a warning, if there is no room."""
        if self.kind == "cpu":
            return {id(p): HostSource(p.data) for group in groups for p in _values(group)}
        sources: dict[int, Source] = {}
        pretrained = _Pretrained(self.model)
        for group in groups:
            for name, parameter in group.parameters.items():
                if (found := pretrained.find(user_name(name), parameter)) is not None:
                    sources[id(parameter)] = found
        self._as_in_file = set(sources)
        rest = [
            _Group(group.name, {n: p for n, p in group.parameters.items() if id(p) not in sources}) for group in groups
        ]
        self._files += pretrained.files
        need = sum(parameter.nbytes for group in rest for parameter in _values(group))
        if need:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if need > free:
                self._stay(f"they take {readable(need)} on disk, and {self.folder} has {readable(free)}")
                return None
        for group in rest:
            if group.parameters:
                data = {name: parameter.data for name, parameter in group.parameters.items()}
                file_name = f"offload-{os.getpid()}-{id(self):x}-{group.name}.safetensors"
                file = WeightsFile.write(self.folder / file_name, data)
                self._files.append(file)
                sources |= {id(p): FileSource(file, name) for name, p in group.parameters.items()}
        return sources

    def _stay(self, reason: str) -> None:
        self.ended = reason
        self.journal.write("offload_off", reason=reason)
        warn(
            f"The weights of the frozen prefix stay on the device: {reason}.",
            fix='SafeConfig(offload="cpu"), or cache_dir=... on a disk with room.',
        )

    # What needs them still.

    @contextmanager
    def at_hand(self, block: nn.Module) -> Iterator[None]:
        """The weights of ``block`` are on the device within the block."""
        away = self._away.get(block, [])
        if away and torch.is_grad_enabled():  # autograd keeps weights, so each operation gets its own
            self.end("a pass in evaluation mode with gradients runs through them")
            away = []
        if not away or _may_write(block):
            yield
            return
        with self._lock:  # threads may evaluate at the same time
            away = [*filter(_is_away, away)]
            self.streamed += sum(parameter.nbytes for parameter in away)
            with resident(away, self._loaded(block)):
                yield

    def _loaded(self, block: nn.Module) -> list[Tensor] | None:
        """The weights of ``block``, and begin to load the next block's; None where they are loaded at their use."""
        if self._device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        here, event = self._ahead.pop(block) if block in self._ahead else self._load(block)
        now = torch.cuda.current_stream(self._device)
        now.wait_event(event)
        for tensor in here:
            tensor.record_stream(now)
        self._ahead.clear()
        blocks = list(self._away)
        after = blocks.index(block) + 1
        if after < len(blocks):
            self._ahead[blocks[after]] = self._load(blocks[after])
        return here

    def _load(self, block: nn.Module) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self._stream):
            tensors = [p.away.load() for p in self._away[block] if isinstance(p, Offloaded)]
            return tensors, self._stream.record_event()

    # What comes back.

    def follow(self) -> None:
        """Bring back blocks that left the prefix, and forget what others brought back by writing to it."""
        leaving = {block for _, block in leaving_blocks(self.prefix)}
        for block in [block for block in self._away if block not in leaving and not self.fills]:
            for parameter in self._away.pop(block):
                self._return(parameter)
        if not leaving and not self.fills:
            while self._tables:
                self._return(self._tables.pop())
        self._count()

    @property
    def has_left(self) -> bool:
        """Whether anything has ever left, or a reason was given why not."""
        return self._said > 0 or self.ended is not None

    @property
    def has_more(self) -> bool:
        """Whether anything may still leave: the prefix has changed since the last time, or something has come back."""
        return self._left_at != self._place or self.has_returned

    @property
    def has_returned(self) -> bool:
        """Whether others brought weights back by writing to them."""
        return not all(type(one) is Offloaded for one in self._every)

    @property
    def _place(self) -> tuple[Any, ...]:
        return tuple((path, depth, self.prefix.runs_first(path)) for path, depth in self.prefix.depths.items())

    def misses_too_often(self, misses: int, looked_up: int) -> bool:
        """Whether more than a few of the samples since the weights left were not stored."""
        if not self.nbytes or not self._left_at:  # those that never came wait for the first epoch
            self._before = misses, looked_up
        missed, samples = misses - self._before[0], looked_up - self._before[1]
        return samples >= FEW_SAMPLES and missed > MOST_MISSES * samples

    def end(self, reason: str, step: int | None = None) -> None:
        """Bring everything back, for good, except what never was on the device: that may be too small for it."""
        if self.ended is not None:
            return
        self.ended = reason
        if not self.nbytes:
            return
        self._return_all()
        self.journal.write("offload_off", step=step, reason=reason, still_away=self.nbytes)
        if not self.nbytes:
            note(f"The offloaded weights are back on the device: {reason}.")
        else:
            warn(
                f"Passes bring {readable(self.nbytes)} of weights to the device, block by block: {reason}.",
                fix="Training is right, and slow. Load the model with from_pretrained of transformers if it fits.",
            )

    def close(self) -> None:
        """Bring everything back, except what never was on the device, and delete what was written."""
        self._return_all()
        self.prefix.weights = None
        if not self.nbytes:  # else what is still away is read from them
            for file in self._files:
                file.close()
        self._files = []

    def _return_all(self) -> None:
        self._ahead.clear()
        given = {id(p) for p in self._given}
        for parameter in self._every:
            if id(parameter) not in given:
                self._return(parameter)
        self._count()

    def _count(self) -> None:
        self._away = {block: left for block, own in self._away.items() if (left := [*filter(_is_away, own)])}
        self._tables = [*filter(_is_away, self._tables)]
        self.nbytes = sum(parameter.nbytes for parameter in self._every)

    @property
    def _every(self) -> list[Offloaded]:
        """All that left, by the last count."""
        return [parameter for own in (*self._away.values(), self._tables) for parameter in own]

    @staticmethod
    def _return(parameter: nn.Parameter) -> None:
        try:
            if isinstance(parameter, Offloaded):
                bring_back(parameter)
        except RunError as error:  # adapters are not lost for that; what reads this weight raises it again
            warn(error.fact, fix=error.fix)


def leaving_blocks(prefix: Prefix) -> Iterator[tuple[str, nn.Module]]:
    """Blocks of the prefix, by name, whose weights passes above it do not need."""
    for stack in prefix.stacks:
        for index in range(prefix.runs_first(stack.path), prefix.depths[stack.path]):
            yield stack.block_name(index), stack.blocks[index]


def _may_write(block: nn.Module) -> bool:
    """Whether code of the user's runs within ``block``: it may write to a weight, which each operation notices."""
    modules = [*block.modules()]
    return users_code(modules) is not None or any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def block_weights(
    model: nn.Module, blocks: Sequence[nn.Module], keeps: Collection[int]
) -> dict[nn.Module, list[nn.Parameter]]:
    """The frozen weights of each block that nothing else uses, without adapters and those whose ids are in ``keeps``.

    An adapter of PEFT may be none of the run's: another one, such as the reference of TRL's DPO, or one added later.
    """
    users = Counter(id(p) for module in model.modules() for p in set(module._parameters.values()))
    stay = {key for key, count in users.items() if count > 1} | set(keeps)
    for layer in (module for block in blocks for module in block.modules() if isinstance(module, BaseTunerLayer)):
        stay |= {id(p) for p in layer.parameters()} - {id(p) for p in layer.get_base_layer().parameters()}
    return {block: [p for p in block.parameters() if not p.requires_grad and id(p) not in stay] for block in blocks}


def input_tables(model: nn.Module, stacks: Sequence[Stack], *, tied: bool = False) -> list[nn.Parameter]:
    """Frozen embedding tables outside the blocks that are large enough, and used by nothing else unless ``tied``."""
    least = SMALL_TABLE * sum(parameter.nbytes for parameter in model.parameters())
    found: dict[int, Any] = {
        id(module.weight): module.weight
        for module in modules_outside(lookup_tables(model, tied=tied).values(), stacks)
        if module.max_norm is None and not module.weight.requires_grad
    }
    return [table for table in found.values() if table.nbytes >= least]


class _Pretrained:
    """The safetensors files that a model was loaded from."""

    def __init__(self, model: nn.Module) -> None:
        self.files: list[WeightsFile] = []
        self._places: dict[str, WeightsFile] = {}
        for path in _weight_files(model):
            try:
                file = WeightsFile(path)
                self._places |= dict.fromkeys(file.names(), file)
                self.files.append(file)
            except RunError:
                continue

    def find(self, name: str, parameter: nn.Parameter) -> Source | None:
        """Where the file has exactly these data; its names may have a prefix more or less."""
        name = name.replace(".base_layer.", ".")
        tails = [name, *(name.split(".", count)[-1] for count in (1, 2) if name.count(".") >= count)]
        known = next((tail for tail in tails if tail in self._places), None)
        known = known or next((one for one in self._places if one.endswith(f".{name}")), None)
        if known is None:
            return None
        stored, own = self._places[known].load(known), parameter.data
        if (stored.shape, stored.dtype) != (own.shape, own.dtype):
            return None
        if not torch.equal(_bits(stored), _bits(own.to("cpu"))):  # −0 is equal to 0, and NaN to nothing
            return None
        return FileSource(self._places[known], known)


def _weight_files(model: nn.Module) -> list[Path]:
    """Of the pre-trained model, if they are here; nothing is fetched."""
    config: Any = getattr(base_model(model), "config", None)
    name = getattr(config, "_name_or_path", "")
    if not name:
        return []
    options: dict[str, Any] = {"local_files_only": True, "revision": getattr(config, "_commit_hash", None)}
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            found = cached_file(name, file, **options)
        except OSError:  # not there, or not a name
            continue
        if found is not None and file == SAFE_WEIGHTS_NAME:
            return [Path(found)]
        if found is not None:
            return sorted(Path(found).parent.glob("model-*.safetensors"))
    return []


def _return_to_system(left: list[tuple[int, int]], files: list[Path]) -> None:
    """On the CPU, memory that was freed may stay with the process.

    glibc keeps smaller pieces for later. And transformers maps a file as a whole, so the pages of weights that left
    would stay as long as any other weight of the file. Their content is that of the file, so dropping them changes
    nothing for anyone who still refers to them.

    Args:
        left: address and bytes of what left.
        files: whose contents were found to be equal.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    system, page, inodes = ctypes.CDLL(None), mmap.PAGESIZE, {path.stat().st_ino for path in files if path.exists()}
    if hasattr(system, "malloc_trim"):  # not in musl
        system.malloc_trim(0)
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, _, _, _, inode, *_ = line.split()
        if int(inode) in inodes:
            maps.append(tuple(int(address, 16) for address in area.split("-")))
    for address, size in left:
        start, end = -(-address // page) * page, (address + size) // page * page
        if start < end and any(low <= start and end <= high for low, high in maps):
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def _move(group: _Group, sources: Mapping[int, Source]) -> list[Any]:
    """Let its weights leave; returns those that could."""
    return [parameter for parameter in _values(group) if offload(parameter, sources[id(parameter)])]


def _values(group: _Group) -> list[nn.Parameter]:
    return list(group.parameters.values())


def _is_away(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, Offloaded)


def _can_move(parameter: nn.Parameter) -> bool:
    """Whether its bytes are one plain tensor. Those of bitsandbytes' 4 bits are; its small scales stay."""
    named = type(parameter) is nn.Parameter or type(parameter).__name__ == "Params4bit"
    return named and not parameter.is_meta and parameter.layout == torch.strided
