"""Where prefix outputs are stored: memory first, then disk, each until its budget is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from ..errors import ConfigError, note, warn

__all__ = ["DiskTier", "Entry", "Origin", "RamTier", "Tier"]

# Arenas double from the first size to the second, so that a small cache takes little.
LEAST_ARENA, ARENA = 2**20, 64 * 2**20
ALIGNMENT = 64
# LMDB needs some pages of its own, and writes a new value before it frees the old one.
LEAST_PAGES = 64
RESERVE = 0.1
READERS = 1024
FILES = ("data.mdb", "lock.mdb")


class Origin(NamedTuple):
    """How an entry was computed.

    Attributes:
        fingerprint: two numbers of what entered block 0, for each call of a stack; NaN where unknown.
        batch: 48 bits of the batch, in which order counts.
        width: of that batch.
    """

    fingerprint: tuple[float, ...] = ()
    batch: int = 0
    width: int = 0


UNKNOWN = Origin()


@dataclass(frozen=True, slots=True)
class Entry:
    """What is stored of one sample.

    Attributes:
        identity: of the prefix that computed it.
        depths: blocks that it has passed, for each call of a stack.
        states: unpadded hidden states after those blocks; None where the depth is 0.
        origin: how it was computed.
    """

    identity: bytes
    depths: tuple[int, ...]
    states: tuple[Tensor | None, ...]
    origin: Origin = UNKNOWN

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states."""
        return sum(state.nbytes for state in self.states if state is not None)


class Tier(Protocol):
    """A store of entries by 128-bit key, within a budget of bytes.

    Nothing is evicted when it is full: under shuffling, the evicted entry would be needed as soon as the one that
    replaced it. A key that is stored takes a new value at any time.
    """

    name: str
    budget: int
    full: bool
    damaged: int

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entry of each key."""

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Store these while there is room; returns those that found none."""

    def stored_keys(self) -> Iterable[bytes]:
        """All keys stored."""

    @property
    def nbytes(self) -> int:
        """Bytes stored."""

    def close(self) -> None:
        """Free everything."""


class RamTier:
    """In memory, in arenas that are pinned with CUDA. An entry of the same shape is replaced in place.

    Args:
        budget: bytes.
        only: take no keys but those with these first eight bytes (a resumed run stores what it stored before).
    """

    name = "memory"

    def __init__(self, budget: int, only: frozenset[bytes] | None = None) -> None:
        self.budget = budget
        self.full = False
        self.damaged = 0
        self.only = only
        self.nbytes = 0
        self._entries: dict[bytes, Entry] = {}
        self._arena: Tensor = torch.empty(0, dtype=torch.uint8)
        self._used = 0  # bytes of the current arena
        self._taken = 0  # bytes of all arenas

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """The entry of each key; its tensors are the stored ones and must not be written to."""
        return [self._entries.get(key) for key in keys]

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Copy these while there is room; returns those that found none."""
        refused = []
        for key, entry in items:
            before = self._entries.get(key)
            if before is None and self.only is not None and key[:8] not in self.only:
                refused.append((key, entry))
                continue
            places = self._places(entry, before)
            if places is None:
                self.full = True
                refused.append((key, entry))
                continue
            for place, state in zip(places, entry.states, strict=True):
                if place is not None and state is not None:
                    place.copy_(state)
            self._entries[key] = Entry(entry.identity, entry.depths, tuple(places), entry.origin)
            self.nbytes += entry.nbytes - (before.nbytes if before is not None else 0)
        return refused

    def _places(self, entry: Entry, replaced: Entry | None) -> list[Tensor | None] | None:
        """Memory for each state: that of the value before, where it fits. None if there is no room."""
        places: list[Tensor | None] = []
        used, arena, taken = self._used, self._arena, self._taken
        for position, state in enumerate(entry.states):
            before = replaced.states[position] if replaced is not None else None
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

    def stored_keys(self) -> Iterable[bytes]:
        """All keys stored."""
        return self._entries.keys()

    def close(self) -> None:
        """Free the memory."""
        self._entries.clear()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._used = self._taken = self.nbytes = 0


def _memory(size: int) -> Tensor:
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # the system may limit pinned memory
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)


class DiskTier:
    """On disk, in an LMDB environment: transactions survive a kill, and all processes of a machine share it.

    Each value has a checksum of its key and content. A value with a wrong checksum is ignored. When the disk is full,
    nothing more is stored, with one warning.

    Args:
        folder: made if missing.
        budget: bytes of its file, at least 64 pages (256 KiB); a tenth is reserved for replacing values.
        keep: it outlives the run.

    Attributes:
        largest: bytes that its file may ever take, as set when it was opened.
        has_failed: it takes nothing more, and a warning has said why.
        is_damaged: because pages of its file are.

    Raises:
        ConfigError: LMDB is not installed.
        OSError: the folder cannot be written, its disk is full, or LMDB cannot open it.
    """

    name = "disk"

    def __init__(self, folder: Path, budget: int, *, keep: bool = False) -> None:
        self._lmdb = _lmdb()
        self.folder, self.keep = folder, keep
        self.full = self.has_failed = self.is_damaged = False
        self.damaged = 0
        is_new = not (folder / "data.mdb").exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
        has = (folder / "data.mdb").stat().st_size if not is_new else 0
        self.budget = self.largest = max(LEAST_PAGES * page, min(budget, int(0.9 * free) + has) // page * page)
        try:
            if is_new and free < LEAST_PAGES * page:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            environment = self._open()
            if environment is None:
                for name in FILES:
                    (folder / name).unlink(missing_ok=True)
                if keep:
                    note(f"The file of kept states in {folder} was damaged: it is filled again.")
                environment = self._open()
            self._environment = environment
            self._environment.reader_check()
        except (self._lmdb.Error, OSError) as error:
            if is_new and not keep:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, self._lmdb.DiskError):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise error if isinstance(error, OSError) else OSError(str(error)) from error

    def _open(self) -> Any:
        """The environment; None if its file was truncated: reading a missing page would kill the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # LMDB maps its lock file. On a disk without room for a page, writing there would kill the process by SIGBUS.
        if hasattr(os, "posix_fallocate"):
            with (self.folder / "lock.mdb").open("ab") as lock:
                os.posix_fallocate(lock.fileno(), 0, 64 * (READERS + 2))
        # Without metasync a power cut may lose the last transaction, but never the file's integrity.
        how = {"map_size": self.budget, "metasync": False, "readahead": False, "meminit": False}
        try:
            environment = self._lmdb.open(str(self.folder), max_readers=READERS, mode=0o600, **how)
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
        """The entry of each key, copied out of the file's pages."""
        try:
            with self._begin() as transaction:
                return [self._decoded(key, transaction.get(key)) for key in keys]
        except self._lmdb.Error as error:
            self._has_failed(error)
            return [None] * len(keys)

    def _begin(self, *, write: bool = False) -> Any:
        try:
            return self._environment.begin(buffers=True, write=write)
        except self._lmdb.MapResizedError:  # by another process with a larger budget
            self._environment.set_mapsize(0)
            return self._environment.begin(buffers=True, write=write)

    def _decoded(self, key: bytes, value: Any) -> Entry | None:
        if value is None:
            return None
        try:
            return decode(key, bytes(value))
        except ValueError:
            self.damaged += 1
            return None

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Write these in one transaction; returns those for which there was no room."""
        accepted = dict(items)
        if self.full or self.nbytes + sum(entry.nbytes for _, entry in items) > (1 - RESERVE) * self.budget:
            self.full = True  # keys that are stored already may still be replaced
            with self._begin() as transaction:
                accepted = {key: entry for key, entry in items if transaction.get(key) is not None}
        values = [(key, encode(key, entry)) for key, entry in accepted.items()]  # before other processes have to wait
        try:
            with self._begin(write=True) as transaction:
                for key, value in values:
                    transaction.put(key, value)
        except self._lmdb.MapFullError:
            self.full = True
            return list(items)
        except (self._lmdb.Error, OSError) as error:
            self._has_failed(error)
            return list(items)
        return [(key, entry) for key, entry in items if key not in accepted]

    def _has_failed(self, error: Exception) -> None:
        """Take nothing more, with one warning; a file with damaged pages is deleted when it is closed."""
        self.full = True
        if self.has_failed:
            return
        self.has_failed = True
        self.is_damaged = isinstance(error, (self._lmdb.CorruptedError, self._lmdb.PageNotFoundError))
        what = "its file is damaged" if self.is_damaged else "the disk is full or the folder is gone"
        warn(
            f"The prefix cache in {self.folder} takes no more samples: {what} ({error}).",
            fix="Training continues without it, and the next run fills it again."
            if self.is_damaged
            else "Free some space, or set a smaller cache_budget. Training continues with what is stored.",
        )

    def stored_keys(self) -> Iterable[bytes]:
        """All keys stored, by any run."""
        with self._begin() as transaction, transaction.cursor() as cursor:
            yield from map(bytes, cursor.iternext(values=False))

    @property
    def samples(self) -> int:
        """Keys stored, by any run."""
        return int(self._environment.stat()["entries"])

    @staticmethod
    def samples_in(folder: Path) -> int | None:
        """Keys stored in a folder that some run may have open; None if its file cannot be read."""
        lmdb = _lmdb()
        try:
            with lmdb.open(str(folder), readonly=True, lock=False, create=False) as environment:
                return int(environment.stat()["entries"])
        except (lmdb.Error, OSError):
            return None

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return _bytes_in_use(self._environment)

    def close(self) -> None:
        """Close the file, and delete it unless it is kept; a run that was killed leaves it behind, to be resumed."""
        self._environment.close()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in FILES if self.keep and self.is_damaged else ():
            (self.folder / name).unlink(missing_ok=True)


def _bytes_in_use(environment: Any) -> int:
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ConfigError(
            "The disk tier of the prefix cache needs the optional package LMDB, which is not installed.",
            fix='pip install "adafreeze[disk]"',
        ) from error
    return lmdb


def encode(key: bytes, entry: Entry) -> bytes:
    """Checksum (16 bytes), identity (16 bytes), number of depths and the depths (2 bytes each), then safetensors.

    The states are named by position. ``origin`` has the numbers of the fingerprint, then batch and width.
    """
    tensors = {str(position): state for position, state in enumerate(entry.states) if state is not None}
    fingerprint, batch, width = entry.origin
    tensors["origin"] = torch.tensor([*fingerprint, batch, width], dtype=torch.float64)
    depths = np.array([len(entry.depths), *entry.depths], dtype="<u2").tobytes()
    content = entry.identity + depths + safetensors.torch.save(tensors)
    return xxhash.xxh3_128_digest(key + content) + content


def decode(key: bytes, value: bytes) -> Entry:
    """The reverse of ``encode``.

    Raises:
        ValueError: the checksum is wrong: a byte has changed, or the value belongs to another key; or it is right, but
            the content is not an entry's.
    """
    checksum, content = value[:16], value[16:]
    if len(value) < 34 or xxhash.xxh3_128_digest(key + content) != checksum:
        raise ValueError("checksum")
    count = int(np.frombuffer(content, "<u2", 1, 16)[0])
    depths = tuple(int(depth) for depth in np.frombuffer(content, "<u2", count, 18))
    try:
        tensors = safetensors.torch.load(content[18 + 2 * count :])
        *fingerprint, batch, width = tensors["origin"].tolist()
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError("states") from error
    states = tuple(tensors.get(str(position)) for position in range(count))
    return Entry(content[:16], depths, states, Origin(tuple(fingerprint), int(batch), int(width)))
