"""The probe: a fixed draw of training tokens, and what every unit makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import ProbeError
from ..model.backends import Backend
from ..model.batch import (
    REAL_TOKENS,
    Chunk,
    by_sample,
    cut,
    leaves,
    masks,
    padded_tokens,
    real_tokens,
    repeated,
    rows_of,
)
from ..model.blocks import Stack, StopForward, device_of, hidden_states, quiet, starting_at
from ..model.patches import patched_forward
from ..model.random_state import keep_random_state
from ..model.units import Unit
from .draw import collect, split

__all__ = ["Outputs", "Probe"]

Outputs = dict[str, list[Tensor]]
"""Unit name -> one tensor of shape (chosen tokens, features), or two: without and with its own adapter."""


class Probe:
    """A fixed set of samples, in chunks, and the tokens in them on which scores are measured.

    Args:
        chunks: model inputs by the names of its forward. Where every tensor has the sample as first dimension, a chunk
            is cut freely; another one (images of all samples in one tensor) stays whole.
        tokens: how many real (unpadded) tokens to look at, spread evenly over the samples.
        seed: of the choice of tokens.
        pad_token_id: tells padding where there is no attention mask.

    Raises:
        ProbeError: there is no chunk, or a chunk holds no model input.
    """

    def __init__(
        self,
        chunks: Sequence[Mapping[str, Any]],
        tokens: int = 2048,
        seed: int = 0,
        pad_token_id: int | None = None,
    ) -> None:
        self.chunks: list[Chunk] = [piece for chunk in chunks for piece in split(chunk, pad_token_id)]
        if not self.samples:
            raise ProbeError(
                "The probe is empty.",
                cause="Scores are measured on training samples, and none was given.",
                fix="Pass a non-empty dataloader, batch or list of batches as probe=.",
            )
        self.tokens = tokens
        self.seed = seed
        self._depths: dict[str, int] = {}
        self._boundaries: list[dict[int, Any]] = [{} for _ in self.chunks]

    @classmethod
    def draw(cls, source: Any, tokens: int = 2048, seed: int = 0, pad_token_id: int | None = None) -> Probe:
        """Draw a probe from a dataloader, one batch, or an iterable of batches.

        From a dataloader, samples are taken from its dataset with a generator of the probe's own and collated
        as the dataloader does: neither its sampler nor any random state of the run advances, and what dataset and
        collator own is put back (``untouched``).

        Raises:
            ProbeError: ``source`` yields nothing usable, or is a dataloader that can only be gone through.
        """
        if isinstance(source, Probe):
            return source
        with keep_random_state():
            return cls(collect(source, tokens, seed, pad_token_id), tokens, seed, pad_token_id)

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return sum(rows_of(chunk) for chunk in self.chunks)

    @property
    def padded_tokens(self) -> int:
        """Positions that one pass computes."""
        return sum(map(padded_tokens, self.chunks))

    @property
    def real_tokens(self) -> int:
        """Those that are no padding."""
        return sum(map(real_tokens, self.chunks))

    @property
    def nbytes(self) -> int:
        """Host memory of the recorded boundary states."""
        found: list[Tensor] = []
        tree_map_only(Tensor, found.append, self._boundaries)
        return sum(tensor.untyped_storage().nbytes() for tensor in found)

    def digest(self) -> str:
        """Hash of its samples, to know it again."""
        found = hashlib.blake2b(digest_size=8)
        for chunk in self.chunks:
            for path, value in sorted(leaves(chunk), key=lambda leaf: leaf[0]):
                kind = getattr(value, "dtype", ""), getattr(value, "shape", value)
                found.update(f"{'.'.join(path)} {kind[0]} {kind[1]}".encode())
                if isinstance(value, Tensor):
                    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def first_sample(self, device: torch.device) -> Chunk:
        """One sample as the model takes it; the first chunk where that cannot be cut."""
        return _model_inputs(_first_of(self.chunks[0]), device)

    def kinds(self, device: torch.device) -> list[Chunk]:
        """One sample for each set of input names, the smallest with it, as the model takes it.

        In mixed data some samples have images and some are text alone: what feeds a stack differs.
        """
        smallest: dict[frozenset[tuple[str, ...]], Chunk] = {}
        for chunk in self.chunks:
            one = _first_of(chunk)
            kind = frozenset(path for path, value in leaves(one) if value is not None)
            if kind not in smallest or padded_tokens(one) < padded_tokens(smallest[kind]):
                smallest[kind] = one
        return [_model_inputs(one, device) for one in smallest.values()]

    def micro_batch(self, rows: int, device: torch.device) -> Chunk:
        """``rows`` times its longest sample, as views without data: the shapes of a batch.

        Of a chunk that cannot be cut, as many times the chunk as hold that many samples.
        """
        longest = max(self.chunks, key=lambda chunk: padded_tokens(chunk) / rows_of(chunk))
        return repeated(_model_inputs(_first_of(longest), device), rows)

    def _pieces(self) -> list[tuple[int, int | None]]:
        """(chunk, row) of every sample; (chunk, None) where that cannot be cut."""
        return [
            (number, row)
            for number, chunk in enumerate(self.chunks)
            for row in (range(rows_of(chunk)) if by_sample(chunk) else [None])
        ]

    def shrunk(self, samples: int) -> Probe:
        """A probe of at most ``samples`` samples, but one piece at least, evenly spaced in this one.

        ``shrunk(n)`` and ``shrunk(shrunk(n).samples)`` are the same.
        """
        pieces = self._pieces()
        sizes = [1 if row is not None else rows_of(self.chunks[number]) for number, row in pieces]
        wanted = range(min(len(pieces), max(1, samples)), 0, -1)
        for count in wanted:
            chosen = [index * len(pieces) // count for index in range(count)]
            if sum(sizes[index] for index in chosen) <= samples:
                break
        rows: dict[int, list[int]] = {}
        for index in chosen:
            number, row = pieces[index]
            rows.setdefault(number, []).extend([] if row is None else [row])
        kept = [cut(self.chunks[number], some) if some else self.chunks[number] for number, some in rows.items()]
        return Probe(kept, self.tokens, self.seed)

    def head(self, samples: int) -> Probe:
        """Up to ``samples`` samples of the middle chunk, of middling length, in one batch; all if it cannot be cut."""
        chunk = self.chunks[len(self.chunks) // 2]
        if by_sample(chunk):
            chunk = cut(chunk, slice(0, max(1, samples)))
        return Probe([chunk], self.tokens, self.seed)

    def one_by_one(self) -> Probe:
        """The same samples and tokens in chunks of one where they can be cut, to see what rounding alone does."""
        pieces = self._pieces()
        singles = [self.chunks[n] if row is None else cut(self.chunks[n], [row]) for n, row in pieces]
        return Probe(singles, self.tokens, self.seed)

    def outputs(
        self,
        model: nn.Module,
        stacks: list[Stack],
        units: Mapping[str, Unit],
        backend: Backend,
        *,
        adapters: bool,
        without: Callable[[Unit], AbstractContextManager[None]] | None = None,
        prefix: Mapping[str, int] | None = None,
        to_the_end: bool = False,
    ) -> Iterator[Outputs]:
        """Run the model chunk by chunk, and yield for each the outputs of ``units`` on the chosen tokens, on the host.

        The model is called as it is (with the autocast that a host wrapped around it), in evaluation mode and
        without gradients, and left at its last block: the head does not run, unless ``to_the_end``.

        Args:
            model: takes a chunk as keyword arguments.
            stacks: whose blocks run.
            units: whose outputs are wanted.
            backend: switches adapters off.
            adapters: False for the pre-trained representation.
            without: a context in which a unit has no effect yet. Yield pairs then: its output in that context and
                outside, on the same input.
            prefix: depth of the frozen prefix of each stack. Its output is recorded the first time and started
                from after that: frozen blocks are computed once.
            to_the_end: do not leave the pass early, since what wraps the model (FSDP2, ZeRO-3) waits for its end.
        """
        first = 0
        reached = self._depths if adapters else {}
        wanted = {path: depth for path, depth in (prefix or {}).items() if depth} if adapters else {}
        for number, chunk in enumerate(self.chunks):
            taken: Outputs = {}
            recorded: dict[int, Any] = {}
            # A stack that does not run for these inputs has left no boundary.
            paths = {stack.path for position, stack in enumerate(stacks) if position in self._boundaries[number]}
            known = {path: depth for path, depth in reached.items() if path in paths}
            with ExitStack() as undo:
                undo.enter_context(torch.no_grad())
                undo.enter_context(quiet(model))
                if not adapters:
                    undo.enter_context(backend.adapters_off())
                device = device_of(model)
                start = {key: _moved(value, device) for key, value in self._boundaries[number].items()}
                undo.enter_context(starting_at(start, stacks, known))
                finished: set[str] = set()
                for position, stack in enumerate(stacks):
                    keep = _Keeper(self, chunk, first, position, taken)
                    for unit in units.values():
                        if unit.stack == stack.path and unit.block >= known.get(stack.path, 0):
                            module = _called(unit.module)
                            watched = _watching(module.forward, keep, unit, without)
                            undo.enter_context(patched_forward(module, watched))
                    depth = wanted.get(stack.path, 0)
                    if depth > known.get(stack.path, 0):
                        boundary = stack.blocks[depth - 1]
                        undo.enter_context(patched_forward(boundary, _recording(boundary, position, recorded)))
                    top = _called(stack.blocks[-1])
                    if not to_the_end:
                        undo.enter_context(patched_forward(top, _stopping(top, stack.path, finished, len(stacks))))
                with suppress(StopForward):
                    model(**_model_inputs(chunk, device))
            self._boundaries[number].update(recorded)
            first += rows_of(chunk)
            yield taken
        if adapters:
            self._depths = {**reached, **wanted}

    def chosen(self, chunk: Chunk, first: int, position: int, shape: tuple[int, int]) -> Tensor:
        """Which of the flattened (sample, token) rows of one chunk are looked at.

        Chosen sample by sample, seeded by the sample's place in the probe, so that other chunks of the same
        samples choose the same tokens.
        """
        real = _real_tokens(chunk, shape, decoder=position > 0)
        quota = -(-self.tokens // self.samples) * max(1, rows_of(chunk) // shape[0])
        picks = []
        for row, positions in enumerate(real):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + row)
            index = positions.nonzero().flatten()
            if len(index) > quota:
                index = index[torch.randperm(len(index), generator=generator)[:quota].sort().values]
            picks.append(index + row * real.shape[1])
        return torch.cat(picks)


class _Keeper:
    """Takes the chosen rows of what the units of one stack return for one chunk; stages differ in their tokens."""

    def __init__(self, probe: Probe, chunk: Chunk, first: int, position: int, taken: Outputs) -> None:
        self.probe, self.chunk, self.first, self.position, self.taken = probe, chunk, first, position, taken
        self.rows: dict[tuple[int, int], Tensor] = {}

    def __call__(self, name: str, outputs: list[Any]) -> None:
        tensors = [hidden_states(output).detach() for output in outputs]
        batch, total = rows_of(self.chunk), tensors[0].numel() // tensors[0].shape[-1]
        # Patches of all samples in one row, without a batch: tokens are chosen among all of them.
        shape = (1, total) if total % batch or not total else (batch, total // batch)
        if shape not in self.rows:
            self.rows[shape] = self.probe.chosen(self.chunk, self.first, self.position, shape)
        rows = self.rows[shape].to(tensors[0].device)
        self.taken[name] = [tensor.reshape(-1, tensor.shape[-1])[rows].cpu() for tensor in tensors]


def _called(module: nn.Module) -> nn.Module:
    """The module that runs: a list of layers does not, and its last layer returns what the list makes."""
    while isinstance(module, nn.ModuleList) and len(module):
        module = module[-1]
    return module


def _watching(
    original: Callable[..., Any],
    keep: _Keeper,
    unit: Unit,
    without: Callable[[Unit], AbstractContextManager[None]] | None,
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        if without is not None:
            with without(unit):
                outputs.append(original(*args, **kwargs))
        outputs.append(original(*args, **kwargs))
        keep(unit.name, outputs)
        return outputs[-1]

    return forward


def _recording(block: nn.Module, position: int, recorded: dict[int, Any]) -> Callable[..., Any]:
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        recorded[position] = _moved(output, torch.device("cpu"))
        return output

    return forward


def _stopping(block: nn.Module, path: str, finished: set[str], stacks: int) -> Callable[..., Any]:
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        finished.add(path)
        if len(finished) == stacks:
            raise StopForward
        return output

    return forward


def _real_tokens(chunk: Chunk, shape: tuple[int, int], decoder: bool) -> Tensor:
    """(samples, tokens) bool: which positions are no padding. Where no mask fits the shape, all are real."""
    labels = chunk.get("labels")
    candidates = [chunk.get("decoder_attention_mask"), None if labels is None else labels != -100] if decoder else []
    for mask in (*candidates, *masks(chunk)):
        # Several rows a sample, as choices of one question, stand one after the other.
        if isinstance(mask, Tensor) and mask.ndim >= 2 and tuple(mask.flatten(1).shape) == shape:
            return mask.flatten(1).bool().cpu()
    return torch.ones(shape, dtype=torch.bool)


def _first_of(chunk: Chunk) -> Chunk:
    return cut(chunk, [0]) if by_sample(chunk) else chunk


def _model_inputs(chunk: Chunk, device: torch.device) -> Chunk:
    inputs = {key: value for key, value in chunk.items() if key != REAL_TOKENS}
    # A copy: a model may write into what it is called with, and the probe is measured on again.
    return tree_map_only(Tensor, torch.clone, _moved(inputs, device))  # type: ignore[no-any-return]


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
