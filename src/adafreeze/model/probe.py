"""The probe: a fixed draw of training tokens, and what every unit makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProbeError
from .backends import Backend
from .blocks import Stack, StopForward, device_of, hidden_states, quiet, starting_at
from .draw import REAL_TOKENS, Chunk, collect, keep_random_state, padded_tokens, real_tokens, rows_of, split
from .patches import patched_forward
from .units import Unit

__all__ = ["Outputs", "Probe"]

Outputs = dict[str, list[Tensor]]
"""Unit name -> one tensor of shape (chosen tokens, features), or two: without and with its own adapter."""


class Probe:
    """A fixed set of samples, in chunks, and the tokens in them on which scores are measured.

    Args:
        chunks: model inputs; each maps names to tensors with the sample as first dimension.
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
        as the dataloader does: neither its sampler nor any random state of the run advances.

        Raises:
            ProbeError: ``source`` yields nothing usable.
        """
        if isinstance(source, Probe):
            return source
        with keep_random_state():
            return cls(list(collect(source, tokens, seed, pad_token_id)), tokens, seed, pad_token_id)

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
        tensors = [t for states in self._boundaries for value in states.values() for t in _tensors(value)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def digest(self) -> str:
        """Hash of its samples, to know it again."""
        found = hashlib.blake2b(digest_size=8)
        for chunk in self.chunks:
            for name, value in sorted(chunk.items()):
                found.update(f"{name} {getattr(value, 'dtype', '')} {getattr(value, 'shape', value)}".encode())
                if isinstance(value, Tensor):
                    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def first_sample(self, device: torch.device) -> Chunk:
        """One sample as the model takes it."""
        chunk = self.chunks[0]
        return _model_inputs(_slice(chunk, [0], rows_of(chunk)), device)

    def micro_batch(self, rows: int, device: torch.device) -> Chunk:
        """``rows`` times its longest sample, as views without data: the shapes of a batch."""
        chunk = max(self.chunks, key=lambda chunk: padded_tokens(chunk) / rows_of(chunk))
        one = _model_inputs(_slice(chunk, [0], rows_of(chunk)), device)
        return {
            name: value.expand(rows, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in one.items()
        }

    def shrunk(self, samples: int) -> Probe:
        """A probe of ``samples`` samples, at least one, evenly spaced in this one."""
        total = self.samples
        count = min(max(1, samples), total)
        wanted = {index * total // count for index in range(count)}
        kept, first = [], 0
        for chunk in self.chunks:
            rows = [row for row in range(rows_of(chunk)) if first + row in wanted]
            if rows:
                kept.append(_slice(chunk, rows, rows_of(chunk)))
            first += rows_of(chunk)
        return Probe(kept, self.tokens, self.seed)

    def head(self, samples: int) -> Probe:
        """Up to ``samples`` samples of the middle chunk, of middling length, in one batch."""
        chunk = self.chunks[len(self.chunks) // 2]
        rows = list(range(min(max(1, samples), rows_of(chunk))))
        return Probe([_slice(chunk, rows, rows_of(chunk))], self.tokens, self.seed)

    def one_by_one(self) -> Probe:
        """The same samples and tokens in chunks of one, to see what rounding alone does."""
        singles = [_slice(chunk, [row], rows_of(chunk)) for chunk in self.chunks for row in range(rows_of(chunk))]
        return Probe(singles, self.tokens, self.seed)

    def outputs(
        self,
        model: nn.Module,
        stacks: list[Stack],
        units: Mapping[str, Unit],
        backend: Backend,
        *,
        adapters: bool,
        local: bool = False,
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
            local: yield pairs: the module without its own adapter and with it, on the same input.
            prefix: depth of the frozen prefix of each stack. Its output is recorded the first time and started
                from after that: frozen blocks are computed once.
            to_the_end: do not leave the pass early, since what wraps the model (FSDP2, ZeRO-3) waits for its end.
        """
        first = 0
        known = self._depths if adapters else {}
        wanted = {path: depth for path, depth in (prefix or {}).items() if depth} if adapters else {}
        for number, chunk in enumerate(self.chunks):
            taken: Outputs = {}
            recorded: dict[int, Any] = {}
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
                            watched = _watching(unit, keep, backend if local else None)
                            undo.enter_context(patched_forward(unit.module, watched))
                    depth = wanted.get(stack.path, 0)
                    if depth > known.get(stack.path, 0):
                        boundary = stack.blocks[depth - 1]
                        undo.enter_context(patched_forward(boundary, _recording(boundary, position, recorded)))
                    top = stack.blocks[-1]
                    if not to_the_end:
                        undo.enter_context(patched_forward(top, _stopping(top, stack.path, finished, len(stacks))))
                with suppress(StopForward):
                    model(**_model_inputs(chunk, device))
            self._boundaries[number].update(recorded)
            first += rows_of(chunk)
            yield taken
        if adapters:
            self._depths = {**known, **wanted}

    def chosen(self, chunk: Chunk, first: int, position: int, shape: tuple[int, ...]) -> Tensor:
        """Which of the flattened (sample, token) rows of one chunk are looked at.

        Chosen sample by sample, seeded by the sample's place in the probe, so that other chunks of the same
        samples choose the same tokens.
        """
        real = _real_tokens(chunk, shape, decoder=position > 0)
        quota = -(-self.tokens // self.samples)
        picks = []
        for row, positions in enumerate(real):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + row)
            index = positions.nonzero().flatten()
            if len(index) > quota:
                index = index[torch.randperm(len(index), generator=generator)[:quota].sort().values]
            picks.append(index + row * real.shape[1])
        return torch.cat(picks)


class _Keeper:
    """Takes the chosen rows of what the units of one stack return for one chunk."""

    def __init__(self, probe: Probe, chunk: Chunk, first: int, position: int, taken: Outputs) -> None:
        self.probe, self.chunk, self.first, self.position, self.taken = probe, chunk, first, position, taken
        self.rows: Tensor | None = None

    def __call__(self, name: str, outputs: list[Any]) -> None:
        tensors = [hidden_states(output).detach() for output in outputs]
        if self.rows is None:
            batch = rows_of(self.chunk)
            tokens = tensors[0].numel() // tensors[0].shape[-1] // batch
            self.rows = self.probe.chosen(self.chunk, self.first, self.position, (batch, tokens))
        rows = self.rows.to(tensors[0].device)
        self.taken[name] = [tensor.reshape(-1, tensor.shape[-1])[rows].cpu() for tensor in tensors]


def _watching(unit: Unit, keep: _Keeper, backend: Backend | None) -> Callable[..., Any]:
    original = unit.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        if backend is not None:
            with backend.adapters_off(unit.module):
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


def _real_tokens(chunk: Chunk, shape: tuple[int, ...], decoder: bool) -> Tensor:
    """(samples, tokens) bool: which positions are no padding. Where no mask fits the shape, all are real."""
    labels = chunk.get("labels")
    candidates = [chunk.get("decoder_attention_mask"), None if labels is None else labels != -100] if decoder else []
    for mask in (*candidates, chunk.get(REAL_TOKENS), chunk.get("attention_mask")):
        if isinstance(mask, Tensor) and tuple(mask.shape) == shape:
            return mask.bool().cpu()
    return torch.ones(shape, dtype=torch.bool)


def _slice(chunk: Chunk, rows: list[int], count: int) -> Chunk:
    return {
        key: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for key, value in chunk.items()
    }


def _model_inputs(chunk: Chunk, device: torch.device) -> Chunk:
    return {key: _moved(value, device) for key, value in chunk.items() if key != REAL_TOKENS}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
