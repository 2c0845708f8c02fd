"""Ranks: agreement between the processes of a run. Nothing that another process sends is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import distributed as dist

from .. import errors
from ..errors import AdafreezeError, RunError
from ..model.batch import packed, unpacked

__all__ = ["Ranks"]


class Ranks:
    """All processes of the default process group; without one, a single rank.

    Attributes:
        rank: of this process.
        size: number of processes.

    >>> Ranks().of_main(lambda: [1, "two"]), Ranks().is_main
    ([1, 'two'], True)
    """

    def __init__(self) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if alone else dist.get_rank()
        self.size = 1 if alone else dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this rank decides and writes the journal."""
        return self.rank == 0

    def of_main(self, ask: Callable[[], Any]) -> Any:
        """The JSON value that ``ask`` returns on rank 0, on every rank; an exception there is raised on every rank.

        Raises:
            Exception: as ``ask`` does; other ranks raise a RunError unless it is an error of adafreeze.
        """
        if self.size == 1:
            return ask()
        text, failed = "", None
        if self.is_main:
            try:
                text = json.dumps({"value": ask(), "failed": None})
            except Exception as error:
                failed = error
                text = json.dumps({"value": None, "failed": _as_json(error)})
        received = json.loads(self._send(text.encode()))
        if failed is not None:
            raise failed
        if received["failed"] is not None:
            raise _as_raised(received["failed"])
        return received["value"]

    def tensors_of_main(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Rank 0's batches of tensors and JSON values, on every rank."""
        if self.size == 1:
            return [dict(batch) for batch in batches]
        return unpacked(self.of_main(lambda: packed(batches)))

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any rank has set it."""
        if self.size == 1:
            return list(flags)
        return [any(column) for column in zip(*self._gather([int(flag) for flag in flags]), strict=True)]

    def check_alike(self, what: str, names: Iterable[str], step: int) -> None:
        """Stop all ranks if ``names`` differ between them; 8 bytes are sent unless they do.

        Raises:
            RunError: on every rank, with the first name that differs, and the ranks.
        """
        if self.size == 1:
            return
        mine = sorted(names)
        digest = hashlib.blake2b(json.dumps([what, step, mine]).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little", signed=True)
        if len({tuple(row) for row in self._gather([number])}) == 1:
            return
        text = list(json.dumps([step, mine]).encode())
        longest = max(row[0] for row in self._gather([len(text)]))
        padded = self._gather([len(text), *text, *([0] * (longest - len(text)))])
        raise _disagreement(what, [json.loads(bytes(row[1 : row[0] + 1])) for row in padded])

    def _send(self, payload: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        device = _device()
        length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
        dist.broadcast(length, src=0)
        data = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if self.is_main:
            data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return data.cpu().numpy().tobytes()

    def _gather(self, numbers: list[int]) -> list[list[int]]:
        """The integers of each rank; all ranks must send the same number of them."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=_device())
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]


def _device() -> torch.device:
    """Where tensors must be for the process group to send them."""
    backend = str(dist.get_backend())
    if "gloo" in backend or "mpi" in backend:
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator() or "cpu")


def _as_json(error: Exception) -> dict[str, str | None]:
    if isinstance(error, AdafreezeError):
        return {"kind": type(error).__name__, **vars(error)}
    return {"kind": "", "fact": f"{type(error).__name__}: {error}"}


def _as_raised(error: Mapping[str, Any]) -> AdafreezeError:
    if error["kind"]:
        kind: type[AdafreezeError] = getattr(errors, error["kind"], RunError)
        return kind(error["fact"], fix=error["fix"])
    return RunError(f"Rank 0, which decides for all ranks, failed: {error['fact']}", fix="See the traceback of rank 0.")


def _disagreement(what: str, ranks: list[list[Any]]) -> RunError:
    """The error for ranks that differ; each rank has sent its step and its names."""
    steps = sorted({step for step, _ in ranks})
    everywhere = set.intersection(*(set(names) for _, names in ranks))
    differing = sorted(set().union(*(names for _, names in ranks)) - everywhere)
    if differing:
        having = [rank for rank, (_, names) in enumerate(ranks) if differing[0] in names]
        lacking = [rank for rank in range(len(ranks)) if rank not in having]
        fact = f"{differing[0]!r} is {what} on rank {_listed(having)}, not on {_listed(lacking)}."
    else:
        fact = f"they are at different optimizer steps: {', '.join(map(str, steps))}."
    return RunError(
        f"The ranks do not agree: {fact}",
        fix="Freeze through SafeConfig or Safe only, and call safe.step() on every rank after every optimizer step. "
        "Then resume from the last checkpoint.",
    )


def _listed(ranks: list[int]) -> str:
    return " and ".join(map(str, ranks))
