"""``adafreeze cache``: the states that are kept for later runs."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..cache.kept import DAY, StoreInfo, default_folder, delete, stores_in
from ..errors import ConfigError
from ..sizes import parse_size, readable
from ._table import number_table

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Parse and run one of the commands."""
    if list(argv[:1]) == ["fill"] and not {"-h", "--help"} & set(argv):
        _fill(list(argv[1:]))
        return
    options = _parser().parse_args(argv)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adafreeze cache", description="The states that are kept for later runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--cache_dir", type=Path, help="the folder; default: $ADAFREEZE_CACHE, or ~/.cache/adafreeze")
        made.set_defaults(run=run)
        return made

    listed = command("list", _list, "every prefix with kept states: model, depth, samples, size, last use")
    listed.add_argument("--json", action="store_true", help="print JSON")
    shown = command("info", _show, "all that is known about one of them")
    shown.add_argument("id", help="the first characters of its ID")
    text = "compute the states of a run's samples ahead of it; the flags are those of `adafreeze train`"
    commands.add_parser("fill", help=text, description=f"{text}, and --prefix_cache_dir is the folder.")
    pruned = command("prune", _prune, "delete what was not used lately, least recently used first")
    pruned.add_argument("--unused_days", type=float, help="delete what was not used for so many days")
    pruned.add_argument("--max_size", help="delete until the folder takes at most this, such as 10GiB")
    deleted = command("delete", _delete, "delete some or all of them")
    deleted.add_argument("id", nargs="*", help="the first characters of an ID")
    deleted.add_argument("--all", action="store_true", help="every one")
    return parser


def _home(options: argparse.Namespace) -> Path:
    return options.cache_dir.expanduser() if options.cache_dir is not None else default_folder()


def _list(options: argparse.Namespace) -> None:
    stores = stores_in(_home(options))
    if options.json:
        print(json.dumps([_described(store) for store in stores], indent=2))
        return
    if not stores:
        print(f"No states are kept in {_home(options)}.")
        return
    table = number_table("Kept states", "ID", "model", "blocks", "samples", "size", "last used")
    for store in reversed(stores):
        samples = "damaged" if store.samples is None else f"{store.samples:,}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.used))
        blocks = " + ".join(str(depth) for depth in store.depths.values() if depth)
        model = Path(store.model).name if Path(store.model).is_absolute() else store.model
        table.add_row(store.digest[:8], model, blocks, samples, readable(store.nbytes), used)
    Console().print(table)
    print(f"{readable(sum(store.nbytes for store in stores))} in all, in {_home(options)}.")


def _described(store: StoreInfo) -> dict[str, object]:
    return {
        "id": store.digest,
        "folder": str(store.folder),
        **store.details,
        "samples": store.samples,
        "nbytes": store.nbytes,
        "last_used": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(store.used)),
        "in_use": store.in_use,
    }


def _show(options: argparse.Namespace) -> None:
    (store,) = _chosen(_home(options), [options.id])
    print(json.dumps(_described(store), indent=2))


def _prune(options: argparse.Namespace) -> None:
    if options.unused_days is None and options.max_size is None:
        raise ConfigError("prune has no limit.", fix="--unused_days 30, or --max_size 10GiB")
    stores = stores_in(_home(options))
    most = parse_size("--max_size", options.max_size) if options.max_size is not None else None
    left = sum(store.nbytes for store in stores)
    for store in stores:
        is_old = options.unused_days is not None and time.time() - store.used > options.unused_days * DAY
        if (is_old or (most is not None and left > most)) and _deleted(store):
            left -= store.nbytes
    print(f"{readable(left)} are kept in {_home(options)}.")


def _delete(options: argparse.Namespace) -> None:
    home = _home(options)
    if options.all == bool(options.id):
        raise ConfigError("delete needs an ID, or --all.", fix="`adafreeze cache list` shows the IDs.")
    for store in stores_in(home) if options.all else _chosen(home, options.id):
        _deleted(store)


def _deleted(store: StoreInfo) -> bool:
    done = delete(store)
    what = f"{store.digest[:8]} ({store.model}, {readable(store.nbytes)})"
    print(f"Deleted {what}." if done else f"Left {what}: a run has it open.")
    return done


def _chosen(home: Path, ids: Sequence[str]) -> list[StoreInfo]:
    stores = stores_in(home)
    found = []
    for one in ids:
        matching = [store for store in stores if store.digest.startswith(one)]
        if len(matching) != 1:
            fact = "There is no" if not matching else f"{len(matching)} IDs begin with {one!r}, not one"
            fact = f"{fact} ID that begins with {one!r} in {home}." if not matching else f"{fact}."
            raise ConfigError(fact, fix="`adafreeze cache list` shows the IDs.")
        found += matching
    return found


def _fill(words: list[str]) -> None:
    from ..train.arguments import parse
    from ..train.fill import fill

    with tempfile.TemporaryDirectory() as folder:
        fill(parse([*words, "--output_dir", folder]))
