"""The probe: a fixed sample of training tokens, and the outputs of every unit on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..costs.memory import bytes_of
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
from ..model.flow import tensors_in
from ..model.patches import patched_forward
from ..model.restore import keep_random_state
from ..model.units import Unit
from .draw import collect, split

__all__ = ["Outputs", "Probe"]

# More sets of input names are not traced; the prefix checks those in training.
MOST_KINDS = 8

Outputs = dict[str, list[Tensor]]
"""Unit name -> one tensor of shape (chosen tokens, features), or two: without and with the unit's own adapter."""


class Probe:
    """A fixed set of samples, in chunks, and the tokens in them on which scores are measured.

    Args:
        chunks: model inputs by name. A chunk is cut by sample if the first dimension of every tensor is the samples;
            otherwise (images of all samples in one tensor) it stays whole.
        tokens: real (unpadded) tokens to choose, spread evenly over the samples.
        seed: for choosing tokens.

    Raises:
        ProbeError: there are no samples, or a chunk has no model input.
    """

    def __init__(self, chunks: Sequence[Mapping[str, Any]], tokens: int = 2048, seed: int = 0) -> None:
        self.chunks: list[Chunk] = [piece for chunk in chunks for piece in split(chunk)]
        if not self.samples:
            raise ProbeError(
                "The probe is empty: scores are measured on training samples.",
                fix="Pass a non-empty dataloader, batch or list of batches as probe=.",
            )
        self.tokens = tokens
        self.seed = seed
        self._depths: dict[str, int] = {}
        self._boundaries: list[dict[int, Any]] = [{} for _ in self.chunks]

    @classmethod
    def draw(cls, source: Any, tokens: int = 2048, seed: int = 0, pad_token_id: int | None = None) -> Probe:
        """Draw a probe from a dataloader, one batch, or an iterable of batches.

        Samples of a dataloader are chosen by the probe's own generator and collated as the dataloader does. The sampler
        and all random states of the run do not advance, and changes to dataset and collator are undone.
        ``pad_token_id`` identifies padding if there is no attention mask.

        Raises:
            ProbeError: ``source`` has no usable samples, or drawing would use them up.
        """
        if isinstance(source, Probe):
            return source
        with keep_random_state():
            return cls(collect(source, tokens, seed, pad_token_id), tokens, seed)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(rows_of(chunk) for chunk in self.chunks)

    @property
    def padded_tokens(self) -> int:
        """Positions that one pass computes."""
        return sum(map(padded_tokens, self.chunks))

    @property
    def real_tokens(self) -> int:
        """Positions without padding."""
        return sum(map(real_tokens, self.chunks))

    @property
    def nbytes(self) -> int:
        """Host memory of the recorded boundary states."""
        return bytes_of(tensors_in(self._boundaries))

    def digest(self) -> str:
        """Hash of the samples, to detect a changed probe on resume."""
        found = hashlib.blake2b(digest_size=8)
        for chunk in self.chunks:
            for path, value in sorted(leaves(chunk), key=lambda leaf: leaf[0]):
                kind = getattr(value, "dtype", ""), getattr(value, "shape", value)
                found.update(f"{'.'.join(path)} {kind[0]} {kind[1]}".encode())
                if isinstance(value, Tensor):
                    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def kinds(self, device: torch.device) -> list[Chunk]:
        """Model inputs of the shortest sample for each set of input names and of flags, of at most MOST_KINDS.

        In mixed data (with and without images), different parameters feed a stack. A flag or a word may choose the
        stack (``task`` of a Router of sentence-transformers).
        """
        smallest: dict[frozenset[Any], Chunk] = {}
        for chunk in self.chunks:
            one = _first_of(chunk)
            values = [(path, value) for path, value in leaves(one) if value is not None]
            kind = frozenset((path, value if isinstance(value, (bool, str)) else None) for path, value in values)
            if kind not in smallest or padded_tokens(one) < padded_tokens(smallest[kind]):
                smallest[kind] = one
        return [_model_inputs(one, device) for one in list(smallest.values())[:MOST_KINDS]]

    def micro_batch(self, rows: int, device: torch.device) -> Chunk:
        """The shapes of at least ``rows`` samples of the longest length, without data: repeats the longest sample."""
        return repeated(_model_inputs(_first_of(self._longest), device), rows)

    def longest(self, rows: int, device: torch.device) -> Chunk:
        """Model inputs of the first ``rows`` samples of the chunk with the longest ones; of all if it cannot be cut."""
        chunk = self._longest
        return _model_inputs(cut(chunk, slice(0, rows)) if by_sample(chunk) else chunk, device)

    @property
    def _longest(self) -> Chunk:
        return max(self.chunks, key=lambda chunk: padded_tokens(chunk) / rows_of(chunk))

    def _pieces(self) -> list[tuple[int, int | None]]:
        """(chunk, row) of every sample; (chunk, None) for a chunk that cannot be cut."""
        return [
            (number, row)
            for number, chunk in enumerate(self.chunks)
            for row in (range(rows_of(chunk)) if by_sample(chunk) else [None])
        ]

    def shrunk(self, samples: int) -> Probe:
        """A probe of at most ``samples`` samples, but at least one piece, evenly spaced in this probe.

        ``shrunk(n)`` and ``shrunk(shrunk(n).samples)`` are the same.
        """
        pieces = self._pieces()
        sizes = [1 if row is not None else rows_of(self.chunks[number]) for number, row in pieces]
        for count in range(min(len(pieces), max(1, samples)), 0, -1):
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
        """One batch of at most ``samples`` samples from the middle chunk; all of it if it cannot be cut."""
        chunk = self.chunks[len(self.chunks) // 2]
        if by_sample(chunk):
            chunk = cut(chunk, slice(0, max(1, samples)))
        return Probe([chunk], self.tokens, self.seed)

    def one_by_one(self) -> Probe:
        """The same samples and tokens, one sample per chunk if possible, to measure rounding errors."""
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
        """Run the model on each chunk and yield the outputs of ``units`` on the chosen tokens, on the host.

        The model is called as it is (in the autocast that a host wraps around it), in evaluation mode and without
        gradients. The pass ends after the last block, without the head, unless ``to_the_end``.

        Args:
            model: takes a chunk as keyword arguments.
            stacks: of the model.
            units: whose outputs are wanted.
            backend: switches adapters off.
            adapters: False for the outputs of the pre-trained model.
            without: context in which a unit has no effect. If given, yields pairs on the same input: the unit's output
                in that context, and outside of it.
            prefix: depth of the frozen prefix of each stack. Its output is recorded by the first call, and later calls
                start from it, so frozen blocks are computed once.
            to_the_end: run the whole model, for wrappers that wait for the end of a pass (FSDP2, ZeRO-3).
        """
        reached = self._depths if adapters else {}
        wanted = {path: depth for path, depth in (prefix or {}).items() if depth} if adapters else {}
        device = device_of(model)

        def run(chunk: Chunk, first: int, boundaries: dict[int, Any]) -> Outputs:
            taken: Outputs = {}
            recorded: dict[int, Any] = {}
            finished: set[str] = set()
            # A stack that does not run on these inputs has no recorded boundary.
            recorded_paths = {stack.path for position, stack in enumerate(stacks) if position in boundaries}
            known = {path: depth for path, depth in reached.items() if path in recorded_paths}
            chosen = cache(partial(self._chosen, chunk, first))

            def keep(name: str, position: int, outputs: list[Any]) -> None:
                tensors = [hidden_states(output).detach() for output in outputs]
                batch, total = rows_of(chunk), tensors[0].numel() // tensors[0].shape[-1]
                # Patches of all samples in one row, without a batch dimension: choose among all of them.
                shape = (1, total) if total % batch or not total else (batch, total // batch)
                rows = chosen(position, shape).to(tensors[0].device)
                taken[name] = [tensor.reshape(-1, tensor.shape[-1])[rows].cpu() for tensor in tensors]

            def watched(unit: Unit, position: int, original: Callable[..., Any]) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    outputs = []
                    if without is not None:
                        with without(unit):
                            outputs.append(original(*args, **kwargs))
                    outputs.append(original(*args, **kwargs))
                    keep(unit.name, position, outputs)
                    return outputs[-1]

                return forward

            def record(position: int, output: Any) -> None:
                recorded[position] = _moved(output, torch.device("cpu"))

            def stop(path: str, _: Any) -> None:
                finished.add(path)
                if len(finished) == len(stacks):
                    raise StopForward

            with ExitStack() as undo:
                undo.enter_context(torch.no_grad())
                undo.enter_context(quiet(model))
                if not adapters:
                    undo.enter_context(backend.adapters_off())
                start = {key: _moved(value, device) for key, value in boundaries.items()}
                undo.enter_context(starting_at(start, stacks, known))
                for position, stack in enumerate(stacks):
                    for unit in units.values():
                        if unit.stack == stack.path and unit.block >= known.get(stack.path, 0):
                            module = _called(unit.module)
                            undo.enter_context(patched_forward(module, watched(unit, position, module.forward)))
                    depth = wanted.get(stack.path, 0)
                    if depth > known.get(stack.path, 0):
                        undo.enter_context(_after(stack.blocks[depth - 1], partial(record, position)))
                    if not to_the_end:
                        undo.enter_context(_after(_called(stack.blocks[-1]), partial(stop, stack.path)))
                with suppress(StopForward):
                    model(**_model_inputs(chunk, device))
            boundaries.update(recorded)
            return taken

        first = 0
        for chunk, boundaries in zip(self.chunks, self._boundaries, strict=True):
            yield run(chunk, first, boundaries)
            first += rows_of(chunk)
        if adapters:
            self._depths = {**reached, **wanted}

    def _chosen(self, chunk: Chunk, first: int, position: int, shape: tuple[int, int]) -> Tensor:
        """Indices of the chosen tokens among the flattened (sample, token) rows of one chunk.

        Seeded by each sample's index in the probe, so that cutting the samples into other chunks chooses the same
        tokens.
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


def _called(module: nn.Module) -> nn.Module:
    """The module whose forward runs: the last layer of a ModuleList, which has no forward itself."""
    while isinstance(module, nn.ModuleList) and len(module):
        module = module[-1]
    return module


def _after(module: nn.Module, do: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Call ``do(output)`` after each forward of ``module``, before the hooks of other code."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        do(output)
        return output

    return patched_forward(module, forward)


def _real_tokens(chunk: Chunk, shape: tuple[int, int], decoder: bool) -> Tensor:
    """(samples, tokens) bool: positions without padding. All are real if no mask fits the shape."""
    labels = chunk.get("labels")
    candidates = [chunk.get("decoder_attention_mask"), None if labels is None else labels != -100] if decoder else []
    for mask in (*candidates, *masks(chunk)):
        # A sample with several rows, such as choices of one question, has them one after the other.
        if isinstance(mask, Tensor) and mask.ndim >= 2 and tuple(mask.flatten(1).shape) == shape:
            return mask.flatten(1).bool().cpu()
    return torch.ones(shape, dtype=torch.bool)


def _first_of(chunk: Chunk) -> Chunk:
    return cut(chunk, [0]) if by_sample(chunk) else chunk


def _model_inputs(chunk: Chunk, device: torch.device) -> Chunk:
    inputs = {key: value for key, value in chunk.items() if key != REAL_TOKENS}
    # A copy, since a model may change its inputs in place.
    return tree_map_only(Tensor, torch.clone, _moved(inputs, device))  # type: ignore[no-any-return]


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
