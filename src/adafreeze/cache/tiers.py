"""Tiers: where prefix outputs are held. Memory first, then disk; each takes until its budget is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from ..errors import ConfigError, warn

__all__ = ["DiskTier", "Entry", "RamTier", "Tier"]

# Arenas double from the first size to the second, so that a small cache takes little.
LEAST_ARENA, ARENA = 2**20, 64 * 2**20
ALIGNMENT = 64
# LMDB needs some pages of its own, and writes a value that is replaced to a new place first.
LEAST_PAGES = 64
RESERVE = 0.1
READERS = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """What is held of one sample.

    Attributes:
        identity: of the prefix that gave it.
        depths: blocks that it has passed, for each stack.
        states: hidden states of the unpadded positions after those blocks; None where the depth is 0.
        marks: two numbers of what entered block 0, for each state, NaN where nothing is known of it; then the batch in
            which it was held, as a number, and how wide that was.
    """

    identity: bytes
    depths: tuple[int, ...]
    states: tuple[Tensor | None, ...]
    marks: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return sum(state.nbytes for state in self.states if state is not None)


class Tier(Protocol):
    """A store of entries by 128-bit key, within a budget of bytes.

    It is filled until it is full, and nothing is put out to make room: under shuffling, whatever was put out would
    have been needed as soon as what took its place. A key that is held takes a new value at any time.
    """

    name: str
    budget: int
    full: bool
    damaged: int

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What is held under each key."""
        ...

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Hold these, as far as there is room; returns those that found none."""
        ...

    def held(self) -> Iterable[bytes]:
        """All keys held."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class RamTier:
    """In memory, in arenas that are pinned where there is CUDA; a sample that grows deeper is written in place.

    Args:
        budget: bytes.
        only: take no other keys than those with these first eight bytes (a resumed run holds what it held).
    """

    name = "memory"

    def __init__(self, budget: int, only: frozenset[bytes] | None = None) -> None:
        self.budget = budget
        self.full = False
        self.damaged = 0
        self.only = only
        self._entries: dict[bytes, Entry] = {}
        self._arena: Tensor = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._taken = 0
        self._held = 0

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What is held under each key; the tensors are the held ones, to be read only."""
        return [self._entries.get(key) for key in keys]

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Copy these in, as far as there is room; returns those that found none."""
        refused = []
        for key, entry in items:
            held = self._entries.get(key)
            if held is None and self.only is not None and key[:8] not in self.only:
                refused.append((key, entry))
                continue
            places = self._places(entry, held)
            if places is None:
                self.full = True
                refused.append((key, entry))
                continue
            for place, state in zip(places, entry.states, strict=True):
                if place is not None and state is not None:
                    place.copy_(state)
            self._entries[key] = Entry(entry.identity, entry.depths, tuple(places), entry.marks)
            self._held += entry.nbytes - (held.nbytes if held is not None else 0)
        return refused

    def _places(self, entry: Entry, held: Entry | None) -> list[Tensor | None] | None:
        """Memory of the right size for each state: that of the value held before, where it fits."""
        places: list[Tensor | None] = []
        used, arena, taken = self._used, self._arena, self._taken
        for position, state in enumerate(entry.states):
            before = held.states[position] if held is not None else None
            if state is None:
                places.append(None)
            elif before is not None and before.shape == state.shape and before.dtype == state.dtype:
                places.append(before)
            else:
                size = -(-state.nbytes // ALIGNMENT) * ALIGNMENT
                if used + size > len(arena):
                    room = self.budget - taken
                    if size > room:
                        return None
                    arena = _memory(max(size, min(max(LEAST_ARENA, taken), ARENA, room)))
                    used, taken = 0, taken + len(arena)
                places.append(arena[used : used + state.nbytes].view(state.dtype).view(state.shape))
                used += size
        self._used, self._arena, self._taken = used, arena, taken
        return places

    def held(self) -> Iterable[bytes]:
        """All keys held."""
        return self._entries.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states held."""
        return self._held

    def close(self) -> None:
        """Give the memory back."""
        self._entries.clear()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._used = self._taken = self._held = 0


def _memory(size: int) -> Tensor:
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # the system may not let so much be pinned
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)


class DiskTier:
    """On disk, in an LMDB environment: transactions survive a kill, and all processes of a machine share it.

    Each value carries a checksum over its key and content; one that does not fit is as if it were not there. A
    disk that fills up ends the filling with one warning.

    Args:
        folder: made if missing.
        budget: bytes that its file may have, 64 pages (256 KiB) at least; a tenth of them is kept for replacing.

    Raises:
        ConfigError: LMDB is not installed.
        OSError: the folder cannot be written, its disk is full, or LMDB cannot open it.
    """

    name = "disk"

    def __init__(self, folder: Path, budget: int) -> None:
        self._lmdb = _lmdb()
        self.folder = folder
        self.full = False
        self.damaged = 0
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
        self.budget = max(LEAST_PAGES * page, min(budget, int(0.9 * free)) // page * page)
        try:
            if is_new and free < LEAST_PAGES * page:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            environment = self._opened()
            if environment is None:
                shutil.rmtree(folder)
                environment = self._opened()
            self._environment = environment
            self._environment.reader_check()
        except (self._lmdb.Error, OSError) as error:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, self._lmdb.DiskError):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    def _opened(self) -> Any:
        """The environment; None where its file was cut off: reading a page that is missing is the process's end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # LMDB maps the file of its lock, in which a disk without room for a page would end the process by SIGBUS.
        if hasattr(os, "posix_fallocate"):
            with (self.folder / "lock.mdb").open("ab") as lock:
                os.posix_fallocate(lock.fileno(), 0, 64 * (READERS + 2))
        # Without metasync a power cut may lose the last transaction, and never the file's integrity.
        how = {"map_size": self.budget, "metasync": False, "readahead": False, "meminit": False}
        try:
            environment = self._lmdb.open(str(self.folder), max_readers=READERS, **how)
        except (self._lmdb.InvalidError, self._lmdb.CorruptedError):
            return None
        if (self.folder / "data.mdb").stat().st_size >= _bytes_in_use(environment):
            return environment
        environment.close()
        return None

    @staticmethod
    def check_installed() -> None:
        """Raise the ConfigError that opening a tier would."""
        _lmdb()

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What is held under each key, copied out of the file's pages."""
        with self._environment.begin(buffers=True) as transaction:
            return [self._decoded(key, transaction.get(key)) for key in keys]

    def _decoded(self, key: bytes, value: Any) -> Entry | None:
        if value is None:
            return None
        try:
            return decode(key, bytes(value))
        except ValueError:
            self.damaged += 1
            return None

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Write these in one transaction; returns them all if there was no room for it."""
        known = items
        if self.full or self.nbytes + sum(entry.nbytes for _, entry in items) > (1 - RESERVE) * self.budget:
            self.full = True  # what is held already may still be replaced
            with self._environment.begin(buffers=True) as transaction:
                known = [(key, entry) for key, entry in items if transaction.get(key) is not None]
        values = [(key, encode(key, entry)) for key, entry in known]
        try:
            with self._environment.begin(write=True) as transaction:
                for key, value in values:
                    transaction.put(key, value)
        except self._lmdb.MapFullError:
            self.full = True
            return list(items)
        except (self._lmdb.Error, OSError) as error:
            if not self.full:
                self.full = True
                warn(
                    f"The prefix cache in {self.folder} takes no more samples ({error}).",
                    cause="The disk is full, or the folder is gone.",
                    fix="Free some space, or set a smaller cache_budget. Training goes on; what is held is used.",
                )
            return list(items)
        held = {key for key, _ in known}
        return [(key, entry) for key, entry in items if key not in held]

    def held(self) -> Iterable[bytes]:
        """All keys held, of whichever run."""
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            yield from cursor.iternext(values=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return _bytes_in_use(self._environment)

    def close(self) -> None:
        """Close the file and delete it. Only a run that was killed leaves one behind, for its resumption."""
        self._environment.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _bytes_in_use(environment: Any) -> int:
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError(
            "The disk tier of the prefix cache needs LMDB, which is not installed.",
            cause="It is an optional dependency.",
            fix='pip install "adafreeze[disk]"',
        ) from error
    return lmdb


def encode(key: bytes, entry: Entry) -> bytes:
    """Checksum (16 bytes), identity (16 bytes), and the states in the safetensors format, named by position:depth."""
    states = {
        f"{position}:{depth}": state
        for position, (depth, state) in enumerate(zip(entry.depths, entry.states, strict=True))
        if state is not None
    }
    if entry.marks:
        states["marks"] = torch.tensor(entry.marks, dtype=torch.float64)
    content = entry.identity + bytes(entry_depths(entry.depths)) + safetensors.torch.save(states)
    return xxhash.xxh3_128_digest(key + content) + content


def entry_depths(depths: Sequence[int]) -> bytes:
    """Number of stacks, then each depth in two bytes."""
    return np.array([len(depths), *depths], dtype="<u2").tobytes()


def decode(key: bytes, value: bytes) -> Entry:
    """The reverse of ``encode``.

    Raises:
        ValueError: the checksum is another: a byte has changed, or the value belongs to another key; or it is the right
            one, of something else.
    """
    checksum, content = value[:16], value[16:]
    if len(value) < 34 or xxhash.xxh3_128_digest(key + content) != checksum:
        raise ValueError("checksum")
    identity = content[:16]
    count = int(np.frombuffer(content, "<u2", 1, 16)[0])
    depths = tuple(int(depth) for depth in np.frombuffer(content, "<u2", count, 18))
    try:
        loaded = safetensors.torch.load(content[18 + 2 * count :])
    except safetensors.SafetensorError as error:
        raise ValueError("states") from error
    marks = tuple(loaded["marks"].tolist()) if "marks" in loaded else ()
    return Entry(identity, depths, tuple(loaded.get(f"{n}:{depth}") for n, depth in enumerate(depths)), marks)
