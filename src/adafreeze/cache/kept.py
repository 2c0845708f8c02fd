"""Boundary states that outlive a run: one folder for each prefix at rest, shared by all runs of a machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import note
from .identity import Identity
from .tiers import DiskTier, Entry

try:  # not on Windows, where a store counts as used for a day after its last opening
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["DAY", "KeptFolder", "KeptStore", "StoreInfo", "default_folder", "delete", "stores_in"]

# Of info.json. The format of entries is part of each store's digest.
FORMAT = 1
PREFIX, IN_USE = "states-", "in_use"
DAY = 86400
# LMDB's locks are those of one machine.
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "afs", "ceph", "glusterfs", "fuse.sshfs"}


def default_folder() -> Path:
    """``$ADAFREEZE_CACHE``, or ``adafreeze`` in the user's cache folder."""
    if given := os.environ.get("ADAFREEZE_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adafreeze"


@dataclass(frozen=True)
class StoreInfo:
    """One store of kept states.

    Attributes:
        folder: of the store.
        digest: of the prefix, as in the folder's name.
        model: name or path of the model that filled it, and its class.
        depths: blocks of the prefix by stack.
        samples: stored; None where the file cannot be read.
        nbytes: on disk.
        used: seconds since the epoch of its last opening.
        details: everything in info.json.
    """

    folder: Path
    digest: str
    model: str
    depths: Mapping[str, int]
    samples: int | None
    nbytes: int
    used: float
    details: Mapping[str, Any]

    @property
    def in_use(self) -> bool:
        """Whether a run has it open."""
        with _locked(self.folder) as free:
            return not free


def stores_in(home: Path) -> list[StoreInfo]:
    """All stores in a folder, the least recently used first."""
    found = [_info(folder) for folder in home.glob(f"{PREFIX}*") if folder.is_dir()] if home.is_dir() else []
    return sorted((one for one in found if one is not None), key=lambda one: one.used)


def _info(folder: Path) -> StoreInfo | None:
    try:
        details = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if not isinstance(details, dict):
            details = {}
    except (OSError, ValueError):
        details = {}
    try:
        files = [path.stat() for path in folder.iterdir() if path.is_file()]
        used = max((stat.st_mtime for stat in files), default=folder.stat().st_mtime)
    except OSError:  # deleted meanwhile, or of another user
        return None
    return StoreInfo(
        folder=folder,
        digest=folder.name.removeprefix(PREFIX),
        model=str(details.get("model", "unknown")),
        depths=depths if isinstance(depths := details.get("depths"), dict) else {},
        samples=DiskTier.samples_in(folder),
        nbytes=sum(stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size for stat in files),
        used=used,
        details=details,
    )


def delete(store: StoreInfo) -> bool:
    """Delete a store that no run has open; False if one has."""
    with _locked(store.folder) as free:
        if free:
            shutil.rmtree(store.folder, ignore_errors=True)
        return free


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether no run has the store open; none can open it within the block."""
    if fcntl is None:
        yield time.time() - folder.stat().st_mtime > DAY
        return
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context((folder / IN_USE).open("ab")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except FileNotFoundError:
            free = True
        except OSError:
            free = False
        yield free


def _use(folder: Path) -> Any:
    """Make the folder if it is missing, and keep others from deleting it until the returned file is closed."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / IN_USE).open("ab")
        if fcntl is None:
            return lock
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), (folder / IN_USE).stat()):
                return lock
        lock.close()  # deleted between the two lines


# LMDB can open a file once in a process.
_OPEN: dict[Path, KeptStore] = {}


class KeptStore:
    """The states of one prefix at rest.

    Args:
        folder: of the store, in that of all stores.
        budget: bytes of all stores together.
        details: for info.json.

    Raises:
        OSError: it cannot be opened.
        ConfigError: LMDB is not installed.
    """

    def __init__(self, folder: Path, budget: int, details: Mapping[str, Any]) -> None:
        self.home, self.folder, self.budget = folder.parent, folder, budget
        self.depths: Mapping[str, int] = details["depths"]
        self._lock = _use(self.folder)
        self.users = 1  # objects of this process that have it open
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.close)
            self.tier = DiskTier(self.folder, budget, keep=True)
            undo.callback(self.tier.close)
            self.samples = self.tier.samples
            self._share_budget()
            if not self._read("info.json"):
                created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                self._write("info.json", {"format": FORMAT, **details, "created": created})
            os.utime(self.folder / "info.json")
            self.kinds: dict[str, Any] = self._read("verified.json")
            undo.pop_all()

    def _share_budget(self) -> None:
        others = sum(one.nbytes for one in stores_in(self.home) if one.folder != self.folder)
        self.tier.budget = max(0, min(self.tier.largest, self.budget - others))

    def put(self, items: Sequence[tuple[bytes, Entry]]) -> list[tuple[bytes, Entry]]:
        """Store these; where the folder is full, in the place of the least recently used other store."""
        left = self.tier.put(items)
        while left and not self.tier.has_failed and self._free_one():
            left = self.tier.put(left)
        return left

    def _free_one(self) -> bool:
        if self.tier.budget >= self.tier.largest:
            return False  # what limits it is the disk
        for store in stores_in(self.home):
            if store.folder != self.folder and delete(store):
                note(f"Kept states of {store.model} ({store.digest[:8]}) were deleted: {self.home} is full.")
                self._share_budget()
                self.tier.full = False
                return True
        return False

    def save_kinds(self, kinds: Mapping[str, Any]) -> None:
        """Add to what was verified of passes that start from these states."""
        known = {**self._read("verified.json"), **kinds}
        if known != self.kinds:
            with contextlib.suppress(OSError):  # then the next run verifies it again
                self._write("verified.json", known)
            self.kinds = known

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        part = self.folder / f"{name}.{os.getpid()}"
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(part, self.folder / name)

    def close(self) -> None:
        """Close its file, which stays, if no other object of this process has it open."""
        self.users -= 1
        if self.users:
            return
        _OPEN.pop(self.folder, None)
        with contextlib.suppress(OSError):
            os.utime(self.folder / "info.json")
        self.tier.close()
        self._lock.close()


class KeptFolder:
    """The stores of one run: that of its prefix, and of a shallower one whose states can be advanced.

    Args:
        home: folder of all stores.
        budget: bytes of the whole folder.
        model: name of the model, for ``adafreeze cache list``.

    Attributes:
        exact: the store of the current prefix; None if no other run could use its states.
        below: the deepest store of a shallower prefix; None if there is none.
    """

    def __init__(self, home: Path, budget: int, model: str) -> None:
        self.home, self.budget, self.model = home, budget, model
        self.exact: KeptStore | None = None
        self.below: KeptStore | None = None
        self._open: dict[bytes, KeptStore] = {}
        if (kind := _network(home)) is not None:
            raise OSError(f"it is on a network file system ({kind}), and LMDB's locks hold on one machine only")

    @property
    def stores(self) -> list[KeptStore]:
        """In the order in which they are asked."""
        return [store for store in (self.exact, self.below) if store is not None]

    def open(self, identity: Identity, stacks: Sequence[str], depths: tuple[int, ...]) -> None:
        """Follow a changed prefix."""
        digest = identity.of(depths)
        self.exact = self._opened(digest, dict(zip(stacks, depths, strict=True)))
        moving = [place for place, depth in enumerate(depths) if depth]
        if len(moving) != 1 or self.below is not None:
            return
        for depth in range(depths[moving[0]] - 1, 0, -1):
            smaller = tuple(depth if place in moving else 0 for place in range(len(depths)))
            digest = identity.of(smaller)
            if self._folder(digest).is_dir():
                self.below = self._opened(digest, dict(zip(stacks, smaller, strict=True)))
                return

    def leave(self) -> None:
        """The prefix has other states than another run could use; those of the smaller one can be advanced."""
        self.below, self.exact = self.exact or self.below, None

    @property
    def lower(self) -> Mapping[str, int]:
        """Depths of the smaller prefix that this run has left; states are stored there, too, on their way up."""
        return self.below.depths if self.below is not None and self.exact is None else {}

    def _folder(self, digest: bytes) -> Path:
        return (self.home / f"{PREFIX}{digest.hex()}").resolve()

    def _opened(self, digest: bytes, depths: Mapping[str, int]) -> KeptStore:
        if digest not in self._open:
            folder = self._folder(digest)
            if folder in _OPEN:
                _OPEN[folder].users += 1
            else:
                details = {"model": self.model, "depths": depths}
                _OPEN[folder] = KeptStore(folder, self.budget, details)
            self._open[digest] = _OPEN[folder]
        return self._open[digest]

    def close(self) -> None:
        """Close all stores."""
        for store in self._open.values():
            store.close()
        self._open.clear()
        self.exact = self.below = None


def _network(home: Path) -> str | None:
    """The type of the network file system that a folder is on; None if it is local."""
    place = home.expanduser().resolve()
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    nearest = next((mounts[folder] for folder in (place, *place.parents) if folder in mounts), "")
    return nearest if nearest.lower() in NETWORK else None
