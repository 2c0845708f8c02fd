"""Tiers and identity: entries survive kills, are never read by another prefix, and damaged ones are never used."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adafreeze import AdafreezeWarning, ConfigError, Safe, SafeConfig
from adafreeze.cache import DiskTier, Identity, RamTier
from adafreeze.cache import identity as identity_module
from adafreeze.cache.tiers import Entry, decode, encode
from adafreeze.loop.state import sealed
from adafreeze.model import find_stacks
from adafreeze.model.backends import PeftBackend
from cached_run import COUNT, command, config, counts, epochs, same_without, train
from cases import lora_model

MIB = 2**20


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def entry(number: int, length: int = 8, depths=(2,), identity=b"i" * 16) -> Entry:
    generator = torch.Generator().manual_seed(number)
    states = tuple(torch.randn(length, 32, generator=generator) if depth else None for depth in depths)
    return Entry(identity, tuple(depths), states)


def same(one: Entry | None, other: Entry) -> bool:
    return (
        one is not None
        and (one.identity, one.depths) == (other.identity, other.depths)
        and all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))
    )


def run_apart(program, *arguments, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(command(program, *arguments), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(params=["memory", "disk"])
def tier(request, tmp_path):
    made = RamTier(MIB) if request.param == "memory" else DiskTier(tmp_path / "store", MIB)
    yield made
    made.close()


def test_a_tier_returns_its_entries(tier):
    items = [(key(n), entry(n, length=3 + n, depths=(4, n % 3))) for n in range(20)]
    assert tier.put(items) == []
    found = tier.get([key(n) for n in (*range(20), 99)])
    assert all(same(one, item) for one, (_, item) in zip(found, items, strict=False)) and found[-1] is None
    assert sorted(tier.stored_keys()) == [k for k, _ in items]


def test_a_key_takes_a_new_value(tier):
    tier.put([(key(1), entry(1, depths=(2,)))])
    before = tier.nbytes
    tier.put([(key(1), entry(2, depths=(3,), identity=b"j" * 16))])
    assert same(tier.get([key(1)])[0], entry(2, depths=(3,), identity=b"j" * 16))
    assert tier.name == "disk" or tier.nbytes == before


def test_a_full_tier_keeps_and_replaces_entries_but_takes_no_new_ones(tier):
    size, refused, n = 32 * 32 * 4, [], 0
    while not refused:
        refused = tier.put([(key(n), entry(n, length=32))])
        n += 1
    assert tier.full and tier.nbytes <= MIB and n * size > 0.4 * MIB
    found = tier.get([key(i) for i in range(n - 1)])
    assert all(same(one, entry(i, length=32)) for i, one in enumerate(found))
    assert tier.put([(key(0), entry(500, length=32))]) == [] and same(tier.get([key(0)])[0], entry(500, length=32))
    assert len(tier.put([(key(999), entry(999, length=32))])) == 1


def test_memory_is_taken_as_it_fills():
    tier = RamTier(256 * MIB)
    for n in range(100):
        tier.put([(key(n), entry(n, length=256))])
        assert tier.nbytes <= tier._taken <= max(MIB, 2 * tier.nbytes)


def test_memory_counts_its_bytes_and_can_be_restricted_to_keys():
    tier = RamTier(MIB)
    tier.put([(key(n), entry(n)) for n in range(5)])
    assert tier.nbytes == 5 * 8 * 32 * 4
    again = RamTier(MIB, only=frozenset(k[:8] for k in (b"a" * 16, b"b" * 16)))
    assert again.put([(b"a" * 16, entry(1)), (b"c" * 16, entry(2))])[0][0] == b"c" * 16
    assert list(again.stored_keys()) == [b"a" * 16]


@given(st.integers(0, 10_000), st.integers(1, 30), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.randoms())
def test_any_changed_byte_is_detected(number, length, depths, chance: random.Random):
    if not any(depths):
        depths = [*depths, 1]
    held = entry(number, length, depths)
    value = encode(key(number), held)
    assert same(decode(key(number), value), held)
    place = chance.randrange(len(value))
    damaged = bytearray(value)
    damaged[place] ^= 1 << chance.randrange(8)
    for wrong, at in ((bytes(damaged), number), (value[:place], number), (value, number + 1)):
        with pytest.raises(ValueError, match="checksum"):
            decode(key(at), wrong)


def flip_a_byte_of_each_value(folder):
    """In the file itself, behind LMDB's back; 'needle' is in every stored state's header."""
    path = folder / "data.mdb"
    data = bytearray(path.read_bytes())
    at, flipped = data.find(b'"dtype"'), 0
    while at >= 0:
        data[at + 2] ^= 1
        flipped, at = flipped + 1, data.find(b'"dtype"', at + 1)
    path.write_bytes(data)
    return flipped


def test_entries_with_a_flipped_byte_are_computed_again(tmp_path):
    def flips(safe, _model):
        if safe.steps == 8 and safe.cache.prefix_cache is not None:
            (folder,) = tmp_path.glob("prefix-*")
            assert flip_a_byte_of_each_value(folder) >= COUNT

    safe = same_without("bert", depths={2: 2}, cache="disk", folder=tmp_path, after=flips)
    (event,) = [e for e in safe.journal.events if e["event"] == "cache"]
    assert event["damaged"] == COUNT and event["misses"] == 2 * COUNT


# Whose it is.


def identities(model, depths=(2,)):
    return Identity(model, find_stacks(model), PeftBackend(model)).of(depths)


@pytest.mark.slow
def test_the_identity_is_the_same_in_another_process():
    program = """
        from cases import lora_model
        from test_store import identities
        print(identities(lora_model("bert")).hex())
    """
    found = {run_apart(program, PYTHONHASHSEED=str(seed)).strip() for seed in (1, 2)}
    assert found == {identities(lora_model("bert")).hex()}


def change_embeddings(model):
    model.get_input_embeddings().weight.data[5, 5] += 1e-6


def change_block(model):
    find_stacks(model)[0].blocks[1].output.dense.weight.data[0, 0] += 1e-6


def change_adapter(model):
    next(p for n, p in model.named_parameters() if "layer.0" in n and "lora_B" in n).data[0, 0] += 1e-6


def change_scaling(model):
    change_adapter(model)
    before = identities(model)
    next(PeftBackend(model).sites(find_stacks(model)[0].blocks[0]))[1].scaling["default"] *= 2
    assert identities(model) != before


def change_dtype(model):
    model.to(torch.bfloat16)


def change_attention(model):
    model.config._attn_implementation = "eager"


def change_epsilon(model):
    model.config.layer_norm_eps = 1e-5


@pytest.mark.parametrize(
    "change",
    [change_embeddings, change_block, change_adapter, change_scaling, change_dtype, change_attention, change_epsilon],
)
def test_the_identity_differs_for_another_prefix(change):
    model = lora_model("bert")
    before = identities(model)
    change(model)
    assert identities(model) != before


def test_blocks_above_the_prefix_do_not_change_its_identity():
    model = lora_model("bert")
    before, deeper = identities(model), identities(model, (3,))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".layer.3." in name:
            parameter.data += 1
    assert identities(model) == before and identities(model, (3,)) == deeper != before


def on_disk(tmp_path, model, depth=2, folder=None, **more):
    """A Safe with a frozen prefix and its cache in ``tmp_path``, or in the folder of an earlier run there."""
    settings = config({1: depth}, cache="disk", cache_dir=tmp_path, **more)
    safe = Safe(model, settings, probe=list(epochs("bert"))[:2], total_steps=100, samples_per_epoch=COUNT)
    if folder is not None:
        safe.cache.load_state_dict({"announced": True, "folder": folder.name.removeprefix("prefix-"), "cache": None})
    safe.freeze(list(safe.units)[:depth])
    return safe


def leave_behind(safe):
    """End the cache as a kill would: the store stays."""
    safe.cache.prefix_cache.store.tiers[0]._environment.close()
    safe.cache.prefix_cache.store.tiers = []


def left_behind(tmp_path):
    """A store as a killed run leaves it: filled at depth 2 and not closed."""
    model, batches = lora_model("bert"), list(epochs("bert"))
    safe = on_disk(tmp_path, model)
    for one in batches[:4]:
        model(**one)
    (folder,) = tmp_path.glob("prefix-*")
    leave_behind(safe)
    safe.close()
    return folder, batches


def read_by(tmp_path, folder, batches, model, depth=2, **more):
    """Start another run on that folder; how many of its samples were hits, advanced and misses."""
    safe = on_disk(tmp_path, model, depth, folder, **more)
    safe.prefix.server, server = None, safe.prefix.server
    torch.manual_seed(9)
    expected = [model(**one).loss.item() for one in batches[:4]]
    safe.prefix.server = server
    torch.manual_seed(9)
    for one, loss in zip(batches, expected, strict=False):
        now = model(**one).loss
        assert now.item() == loss
        now.backward()  # whether padding is read is seen by its gradient
    worth = safe.cache.prefix_cache.stats
    safe.close()
    return worth.hits, worth.advanced, worth.misses


def test_a_store_is_read_by_the_same_prefix(tmp_path):
    folder, batches = left_behind(tmp_path)
    # The first padded batch is computed to see whether padding is read.
    assert read_by(tmp_path, folder, batches, lora_model("bert")) == (10, 0, 4)


def test_a_store_of_a_lower_prefix_is_advanced(tmp_path):
    folder, batches = left_behind(tmp_path)
    assert read_by(tmp_path, folder, batches, lora_model("bert"), depth=3) == (0, 10, 4)


def test_a_store_of_another_model_is_never_read(tmp_path):
    folder, batches = left_behind(tmp_path)
    other = lora_model("bert")
    change_block(other)
    assert read_by(tmp_path, folder, batches, other) == (0, 0, 14)


def test_a_store_of_another_depth_is_never_read(tmp_path):
    folder, batches = left_behind(tmp_path)
    assert read_by(tmp_path, folder, batches, lora_model("bert"), depth=1) == (0, 0, 14)


def test_a_store_of_another_dtype_is_never_read(tmp_path):
    folder, batches = left_behind(tmp_path)
    assert read_by(tmp_path, folder, batches, lora_model("bert").to(torch.bfloat16)) == (0, 0, 14)
    folder, batches = left_behind(tmp_path)
    assert read_by(tmp_path, folder, batches, lora_model("bert"), cache_dtype="bfloat16")[2] == 14


def test_a_store_of_another_version_is_never_read(tmp_path, monkeypatch):
    folder, batches = left_behind(tmp_path)
    monkeypatch.setattr(identity_module, "_version", lambda package: "0.0.0")
    assert read_by(tmp_path, folder, batches, lora_model("bert")) == (0, 0, 14)


# Processes, kills, disks.

WRITER = """
    from pathlib import Path
    from test_store import DiskTier, entry, key
    tier = DiskTier(Path(sys.argv[1]), 64 * 2**20)
    first, count = int(sys.argv[2]), int(sys.argv[3])
    print("open", flush=True)
    sys.stdin.readline()
    for n in range(first, first + count, 4):
        refused = tier.put([(key(i), entry(i)) for i in range(n, n + 4)])
        assert not refused
        print(n + 3, flush=True)
    tier._environment.close()
"""


def writer(folder, first, count):
    started = command(WRITER, folder, first, count)
    process = subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


def test_two_processes_share_one_store_without_loss(tmp_path):
    processes = [writer(tmp_path / "store", first, 400) for first in (0, 200)]  # half of the samples are both's
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    tier = DiskTier(tmp_path / "store", 64 * MIB)
    assert all(same(one, entry(n)) for n, one in enumerate(tier.get([key(n) for n in range(600)])))
    assert tier.damaged == 0
    tier.close()


def test_a_kill_mid_write_loses_nothing_committed(tmp_path):
    for attempt in range(3):
        process = writer(tmp_path / "store", 0, 100_000)
        process.stdin.write("go\n")
        process.stdin.flush()
        last = ""
        while int(last or 0) < 200 * (attempt + 1):
            last = process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        committed = int([line for line in [last, *rest] if line.strip()][-1])
        tier = DiskTier(tmp_path / "store", 64 * MIB)
        assert all(same(one, entry(n)) for n, one in enumerate(tier.get([key(n) for n in range(committed + 1)])))
        assert tier.put([(key(200_000), entry(1))]) == []  # and it takes more
        tier._environment.close()


def test_a_truncated_file_is_replaced(tmp_path):
    """Reading a page that is missing from a mapped file ends the process, so another one does it."""
    program = """
        import os
        from pathlib import Path
        from test_store import MIB, DiskTier, entry, key, same
        folder = Path(sys.argv[1])
        for pages in (0, 1, 2, 8):
            tier = DiskTier(folder, MIB)
            tier.put([(key(n), entry(n)) for n in range(20)])
            tier._environment.close()
            os.truncate(folder / "data.mdb", pages * os.sysconf("SC_PAGE_SIZE"))
            tier = DiskTier(folder, MIB)
            assert not any(tier.get([key(n) for n in range(20)])) and not list(tier.stored_keys())
            assert tier.put([(key(3), entry(3))]) == [] and same(tier.get([key(3)])[0], entry(3))
            tier._environment.close()
    """
    run_apart(program, tmp_path / "store")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB in memory."""
    if sys.platform != "linux":
        pytest.skip("tmpfs is Linux's")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting takes privileges that this process lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_leaves_only_memory(small_disk):
    """With no room for the lock, which is mapped, and with room for it alone."""
    program = """
        import os, shutil, warnings
        from cached_run import config, counts, epochs, train
        for left in (0, 70_000):
            with open(sys.argv[1] + "/fill", "wb") as fill:
                fill.write(bytes(shutil.disk_usage(sys.argv[1]).free - left))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _, _, safe = train("bert", config({1: 2}, cache="disk", cache_dir=sys.argv[1]), epochs("bert"))
            texts = [str(w.message) for w in caught if "cannot use the folder" in str(w.message)]
            assert len(texts) == 1 and "isk is full" in texts[0], texts
            assert counts(safe)[0] and os.listdir(sys.argv[1]) == ["fill"]
            os.remove(sys.argv[1] + "/fill")
    """
    run_apart(program, small_disk)


def test_a_disk_that_fills_up_gives_one_warning(tmp_path):
    """The kernel refuses to write on, as it does on a full disk (RLIMIT_FSIZE)."""
    program = """
        import resource, signal, warnings
        from cached_run import assert_same, config, counts, epochs, train
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        batches = list(epochs("bert", count=60))
        without = train("bert", config({1: 2}, cache="off"), batches, count=60)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cached = train("bert", config({1: 2}, cache="disk", cache_dir=sys.argv[1]), batches, count=60)
        assert_same(cached, without)
        hits, _, misses = counts(cached[2])
        texts = [str(w.message) for w in caught if "takes no more samples" in str(w.message)]
        print(len(texts), 0 < hits < 116, misses > 60)
    """
    assert run_apart(program, tmp_path).split() == ["1", "True", "True"]


@pytest.mark.parametrize("mode", ["auto", "disk"])
def test_a_folder_that_cannot_be_written_leaves_only_memory(mode, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(AdafreezeWarning, match="cannot use the folder"):
        _, _, safe = train("bert", config(cache=mode, cache_dir=tmp_path / "file" / "below"), epochs("bert"))
    (event,) = [e for e in safe.journal.events if e["event"] == "cache"]
    assert list(event["nbytes"]) == ["memory"] and counts(safe)[0] == 20


def test_a_second_run_of_this_process_in_the_same_store_uses_memory(tmp_path):
    first = on_disk(tmp_path, lora_model("bert"))
    with pytest.warns(AdafreezeWarning, match="open in this process already"):
        second = on_disk(tmp_path, lora_model("bert"))
    assert isinstance(second.cache.prefix_cache.store.tiers[0], RamTier)
    first.close()
    second.close()


def test_memory_first_and_then_disk(tmp_path):
    safe = same_without("bert", depths={2: 2}, cache="auto", folder=tmp_path, cache_budget="8KiB")
    (event,) = [e for e in safe.journal.events if e["event"] == "cache"]
    assert 0 < event["nbytes"]["memory"] <= 8 * 1024 and event["nbytes"]["disk"] > 0 and event["misses"] == COUNT
    full = [e for e in safe.journal.events if e["event"] == "cache_full"]
    assert full[0]["tier"] == "memory" and 0 < full[0]["samples"] < COUNT and len(full[0]["digest"]) == 32


def test_a_finished_run_leaves_no_store_and_old_ones_are_deleted(tmp_path):
    old = tmp_path / "prefix-old"
    old.mkdir()
    (old / "data.mdb").write_bytes(b"x")
    os.utime(old / "data.mdb", (time.time() - 8 * 86400,) * 2)
    train("bert", config(cache="disk", cache_dir=tmp_path), epochs("bert"))
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_finds_its_store_and_decisions(tmp_path):
    settings = config({1: 2}, cache="disk", cache_dir=tmp_path)
    batches = list(epochs("bert"))
    kept = {}

    def keep(safe, model):
        if safe.steps == 6:
            kept.update(state=safe.state_dict(), weights={n: t.clone() for n, t in model.state_dict().items()})
            leave_behind(safe)

    train("bert", settings, batches, after=keep)
    model = lora_model("bert")
    model.load_state_dict(kept["weights"])
    again = Safe(model, settings, probe=batches[:2], total_steps=12, samples_per_epoch=COUNT)
    again.load_state_dict(kept["state"])
    for one in batches[1:5]:
        model(**one).loss.backward()
    # The first pass shows anew what padding means: the loss may be another one now.
    assert again.cache.prefix_cache.stats.misses == 4 and again.cache.prefix_cache.stats.hits == 10
    again.close()
    decided = {**kept["state"]["cache"]["cache"], "off": "it was slow"}
    third = Safe(model, settings, probe=batches[:2], total_steps=12, samples_per_epoch=COUNT)
    third.load_state_dict(sealed({**kept["state"], "cache": {"announced": True, "folder": None, "cache": decided}}))
    assert third.cache.prefix_cache.off == "it was slow"
    third.close()


# Settings.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cache": "gpu"}, "'auto', 'ram', 'disk', 'off'"),
        ({"cache": None}, "SafeConfig.cache is None"),
        ({"cache_budget": "4 gigs"}, "KiB, MiB, GiB"),
        ({"cache_budget": 0}, "SafeConfig.cache_budget is 0"),
        ({"cache_budget": -5}, "SafeConfig.cache_budget is -5"),
        ({"cache_budget": 1.5}, "SafeConfig.cache_budget is 1.5"),
        ({"cache_dir": 7}, "must be the path of a folder"),
        ({"cache": "ram", "cache_dir": "x"}, "which writes nothing to it"),
        ({"cache_dtype": "int4"}, "'bfloat16'"),
        ({"prefix_dropout": "yes"}, "must be True or False"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ConfigError, match=said):
        SafeConfig(**settings)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("1.5 MiB", 3 * 2**19), ("2gb", 2 * 10**9), ("1000", 1000), (77, 77), ("3 KB", 3000)],
)
def test_budgets(text, size):
    assert SafeConfig(cache_budget=text).cache_bytes == size


def test_disk_without_lmdb_is_an_error_before_step_0_and_auto_uses_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    batches = list(epochs("bert"))
    with pytest.raises(ConfigError, match=r"adafreeze\[disk\]"):
        Safe(lora_model("bert"), SafeConfig(cache="disk"), probe=batches[0], total_steps=10)
    with pytest.warns(AdafreezeWarning, match=r"adafreeze\[disk\]"):
        _, _, safe = train("bert", config(cache="auto", cache_dir=tmp_path), batches)
    assert counts(safe)[0] == 20
