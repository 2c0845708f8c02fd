"""States that outlive a run: the next one finds them, computes none of them again, and trains the same to the bit."""

import functools
import json
import shutil
import signal
import subprocess
import types

import psutil
import pytest
import torch
from peft import get_peft_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adafreeze import AdafreezeWarning, Safe, SafeConfig
from adafreeze.cache.kept import delete, stores_in
from adafreeze.cli.main import main
from adafreeze.model import find_stacks
from cached_run import BLOCKS, COUNT, ROWS, assert_same, by_step, command, counts, epochs, train
from cases import adapter, base_model, collate, loader, lora_model

HALF = BLOCKS // 2


def settings(tmp_path=None, **more):
    kept = {"cache": "off"} if tmp_path is None else {"cache_dir": tmp_path, "keep_cache": True}
    at_start = {"freeze_at_start": 0.5, "policy": lambda _: [], "warmup": 1.0, "ramp_end": 1.0, "score": "random"}
    return SafeConfig(**at_start | kept | more)


class Calls:
    """Counts the calls of the blocks of the prefix themselves, below all that adafreeze puts around them."""

    def __init__(self, model, monkeypatch):
        self.count = self.before = 0
        inside = {id(block) for stack in find_stacks(model) for block in stack.blocks[:HALF]}
        kind = type(find_stacks(model)[0].blocks[0])
        original = kind.forward

        @functools.wraps(original)  # else it would be code of the user's
        def forward(block, *args, **kwargs):
            self.count += id(block) in inside
            return original(block, *args, **kwargs)

        def made(safe, _model):
            self.before = self.count  # what Safe looks at before step 0

        monkeypatch.setattr(Safe, "on_made", [made])

        monkeypatch.setattr(kind, "forward", forward)


def evaluated(model, batches):
    model.eval()
    with torch.no_grad():
        return [model(**one).logits for one in batches]


@pytest.mark.parametrize("family", ["bert", "llama", "qwen3", pytest.param("t5", marks=pytest.mark.slow), "vit"])
def test_the_second_run_computes_nothing_below_the_boundary(family, tmp_path, monkeypatch):
    batches = list(epochs(family, epochs=2))
    train(family, settings(tmp_path), batches, model=lora_model(family, BLOCKS))
    model, other = lora_model(family, BLOCKS), lora_model(family, BLOCKS)
    control = train(family, settings(), batches, model=other)
    calls = Calls(model, monkeypatch)
    seen = []
    again = train(family, settings(tmp_path), batches, model=model, after=lambda *_: seen.append(calls.count))
    assert_same(again, control)
    assert counts(again[2])[1:] == (0, 0)
    assert again[2].cache.off_because is None
    # T5's block 0 makes the position bias of all others, in every pass.
    assert family == "t5" or seen[-1] == calls.before


@pytest.mark.parametrize("family", ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_another_seed_rank_head_and_kind_of_adapter_find_the_same_states(family, tmp_path):
    batches = list(epochs(family, epochs=2))
    train(family, settings(tmp_path), batches, model=lora_model(family, BLOCKS))
    (store,) = stores_in(tmp_path)
    assert store.samples == COUNT
    shuffled = list(epochs(family, epochs=2, seed=11))
    torch.manual_seed(99)
    for kind in ("lora", "ia3", "dora"):
        model, control = (
            get_peft_model(base_model(family, BLOCKS), adapter(family, kind, dropout=0.1)) for _ in range(2)
        )
        control.load_state_dict(model.state_dict())
        runs = [
            train(family, settings(folder), shuffled, model=one.train())
            for one, folder in ((model, tmp_path), (control, None))
        ]
        assert_same(*runs)
        assert counts(runs[0][2])[2] <= ROWS, kind  # the first batch shows what padding does
        assert len(stores_in(tmp_path)) == 1


@pytest.mark.parametrize("how", [False, "pissa"])
def test_adapters_that_do_something_from_the_start_are_not_kept(how, tmp_path):
    batches = list(epochs("bert", epochs=2))
    runs = [
        train("bert", settings(folder), batches, model=lora_model("bert", BLOCKS, init_lora_weights=how))
        for folder in (tmp_path, None)
    ]
    assert_same(*runs)
    (event,) = [event for event in runs[0][2].journal.events if event["event"] == "cache_not_kept"]
    assert "do something from the start" in event["reason"] and not stores_in(tmp_path)
    assert counts(runs[0][2])[0] == COUNT  # cached for this run


@pytest.mark.parametrize("collator", [None, collate])
@pytest.mark.parametrize("first_grows", [True, False])
def test_a_prefix_that_grows_computes_nothing_below_the_kept_states(first_grows, collator, tmp_path, monkeypatch):
    def once(seed, folder, model, *, grows=True, **more):
        batches = list(epochs("bert", count=40, epochs=1, seed=seed, collator=collator))
        made = settings(folder, **({"policy": by_step({4: HALF + 1})} if grows else {}))
        return train("bert", made, batches, count=40, model=model, **more)

    once(1, tmp_path, lora_model("bert", BLOCKS), grows=first_grows)
    (store,) = stores_in(tmp_path)
    assert store.samples == 40  # those that came after the deeper freeze were kept on their way up
    model, seen = lora_model("bert", BLOCKS), []
    control = once(2, None, lora_model("bert", BLOCKS))
    calls = Calls(model, monkeypatch)
    again = once(2, tmp_path, model, after=lambda *_: seen.append(calls.count))
    assert again[0] == pytest.approx(control[0], rel=1e-5)
    hits, advanced, misses = counts(again[2])
    assert (hits + advanced, misses) == (40, 0) and advanced == 40 - 4 * ROWS
    assert again[2].prefixes == {"bert.encoder.layer": HALF + 1}
    # A batch without padding is another kind of pass, which the first run may not have met.
    assert seen[-1] - calls.before <= (HALF if collator is collate else 0)


def test_one_changed_weight_is_another_model(tmp_path):
    batches = list(epochs("bert", epochs=2))
    train("bert", settings(tmp_path), batches, model=lora_model("bert", BLOCKS))
    model = lora_model("bert", BLOCKS)
    find_stacks(model)[0].blocks[0].output.dense.weight.data[0, 0] += 1e-6
    safe = train("bert", settings(tmp_path), batches, model=model)[2]
    assert counts(safe)[2] == COUNT and len(stores_in(tmp_path)) == 2


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_evaluation_is_served_and_equals_the_model_s_own(family, tmp_path, monkeypatch):
    batches, others = list(epochs(family, epochs=2)), list(epochs(family, epochs=1, seed=8, count=10))
    seen, calls = {}, {}

    def evaluates(name):
        def after(safe, model):
            if safe.steps % 2 == 0:
                before = calls[name].count if name in calls else 0
                seen.setdefault(name, []).append(evaluated(model, others))
                if name in calls:
                    calls.setdefault("made", []).append(calls[name].count - before)
                model.train()

        return after

    model = lora_model(family, BLOCKS)
    calls["cached"] = Calls(model, monkeypatch)
    safe = train(family, settings(tmp_path), batches, model=model, after=evaluates("cached"))
    control = train(family, settings(), batches, model=lora_model(family, BLOCKS), after=evaluates("own"))
    assert_same(safe, control)
    for mine, own in zip(seen["cached"], seen["own"], strict=True):
        assert all(map(torch.equal, mine, own))
    assert family == "t5" or (calls["made"][-1] == 0 and calls["made"][0] > 0)
    del calls["cached"]
    again = train(family, settings(tmp_path), batches, model=lora_model(family, BLOCKS), after=evaluates("again"))
    assert all(
        torch.equal(a, b) for x, y in zip(seen["again"], seen["own"], strict=True) for a, b in zip(x, y, strict=True)
    )
    (event,) = [event for event in again[2].journal.events if event["event"] == "cache"]
    assert event["evaluation_misses"] == 0 and event["evaluation_hits"] == 4 * 10


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_filling_ahead_computes_every_sample_once(family, keeps, tmp_path, monkeypatch):
    data = loader(family, count=COUNT, rows=ROWS)
    made = settings(tmp_path if keeps else None, **({} if keeps else {"cache": "ram"}), fill="before")
    model, control = lora_model(family, BLOCKS), lora_model(family, BLOCKS)
    model.eval()  # filling leaves the mode as it was
    calls, steps = Calls(model, monkeypatch), 2 * len(data)
    safe = Safe(model, made, probe=data, total_steps=steps)
    filled = calls.count
    assert filled > 0 and not model.training
    losses, own = [], []
    for one, found in ((model, losses), (control.train(), own)):
        one.train()
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        plain = safe if one is model else Safe(one, settings(), probe=data, total_steps=steps)
        for batch in [*data, *data]:
            loss = one(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            plain.step()
            found.append(loss.item())
        plain.close()
    assert losses == pytest.approx(own, rel=1e-5)
    assert counts(safe) == (2 * COUNT, 0, 0)


def test_filling_names_what_it_cannot_do(tmp_path, caplog):
    batches = list(epochs("bert"))
    train("bert", settings(tmp_path, fill="before"), batches, model=lora_model("bert", BLOCKS))
    assert "known only from the first step on" in caplog.text
    Safe(lora_model("bert"), settings(tmp_path, fill="before", freeze_at_start=0), probe=batches, total_steps=9).close()
    assert "no block is frozen from step 0" in caplog.text


def test_the_budget_is_that_of_the_folder_and_old_stores_make_room(tmp_path, caplog):
    small, batches = settings(tmp_path, cache_budget="400KiB"), list(epochs("bert", count=60, epochs=2))
    train("bert", small, list(epochs("bert", epochs=2)), model=lora_model("bert", BLOCKS))
    (first,) = stores_in(tmp_path)
    model = lora_model("bert", BLOCKS)
    model.get_input_embeddings().weight.data += 1
    train("bert", small, batches, count=60, model=model)
    (left,) = stores_in(tmp_path)
    assert left.digest != first.digest and "were deleted" in caplog.text and left.nbytes <= 400 * 1024


def test_a_budget_that_is_too_small_is_named_at_the_first_batch(tmp_path):
    with pytest.warns(AdafreezeWarning, match=r"The states of 14 samples take about .*; cache_budget is 8.00 KiB"):
        run = train(
            "bert", settings(tmp_path, cache_budget="8KiB"), list(epochs("bert")), model=lora_model("bert", BLOCKS)
        )
    assert run[2].cache.off_because is None


def test_a_damaged_file_is_filled_again(tmp_path):
    batches = list(epochs("bert", epochs=2))
    train("bert", settings(tmp_path), batches, model=lora_model("bert", BLOCKS))
    (store,) = stores_in(tmp_path)
    with (store.folder / "data.mdb").open("r+b") as file:
        file.truncate(9000)
    runs = [train("bert", settings(where), batches, model=lora_model("bert", BLOCKS)) for where in (tmp_path, None)]
    assert_same(*runs)
    assert stores_in(tmp_path)[0].samples == COUNT


@pytest.mark.parametrize("name", ["info.json", pytest.param("verified.json", marks=pytest.mark.slow)])
def test_damaged_notes_beside_the_states_do_not_matter(name, tmp_path):
    batches = list(epochs("bert", epochs=2))
    train("bert", settings(tmp_path), batches, model=lora_model("bert", BLOCKS))
    (store,) = stores_in(tmp_path)
    right = json.loads((store.folder / "verified.json").read_text())
    wrong = [{key: of for key in right} for of in ({}, 3, None, {"verified": 3})]
    wrong += [{key: {**of, "widths": [1]} for key, of in right.items()}, {"depths": [2]}, {"depths": 3}]
    for content in ("", "[1", '{"a": 1}', *map(json.dumps, wrong)):
        (store.folder / name).write_text(content)
        assert main(["cache", "list", "--cache_dir", str(tmp_path)]) == 0
        runs = [train("bert", settings(where), batches, model=lora_model("bert", BLOCKS)) for where in (tmp_path, None)]
        assert_same(*runs)
        assert counts(runs[0][2])[2] <= ROWS
    assert stores_in(tmp_path)[0].samples == COUNT


def given_forward(model):
    output = find_stacks(model)[0].blocks[0].output
    original = type(output).forward
    output.forward = types.MethodType(lambda self, *args: 1.5 * original(self, *args), output)


def given_class(model):
    kind = type(find_stacks(model)[0].blocks[0].intermediate)
    original = kind.forward
    kind.forward = lambda self, *args: 1.5 * original(self, *args)
    return lambda: setattr(kind, "forward", original)


def given_attention(model):
    def attention(module, query, key, value, mask, **options):
        return sdpa_attention_forward(module, query, key, 1.5 * value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("mine", attention)
    model.config._attn_implementation = "mine"


@pytest.mark.parametrize("change", [given_forward, given_class, given_attention])
def test_code_of_the_user_s_own_is_not_shared(change, tmp_path):
    batches = list(epochs("bert", epochs=2))
    train("bert", settings(tmp_path), batches, model=lora_model("bert", BLOCKS))
    runs = []
    for folder in (tmp_path, None):
        model = lora_model("bert", BLOCKS)
        undo = change(model) or (lambda: None)
        try:
            runs.append(train("bert", settings(folder), batches, model=model))
        finally:
            undo()
    assert_same(*runs)
    (event,) = [event for event in runs[0][2].journal.events if event["event"] == "cache_not_kept"]
    assert "code of your own" in event["reason"]


def test_weights_that_are_edited_in_mid_run_get_a_store_of_their_own(tmp_path):
    def after(safe, model):
        if safe.steps == 5:
            model.get_input_embeddings().weight.data += 1

    batches = list(epochs("bert"))
    edited = [
        train("bert", settings(folder), batches, model=lora_model("bert", BLOCKS), after=after)
        for folder in (tmp_path, None)
    ]
    assert_same(*edited)
    assert len(stores_in(tmp_path)) == 2
    safe = train("bert", settings(tmp_path), list(epochs("bert", epochs=1)), model=lora_model("bert", BLOCKS))[2]
    assert counts(safe)[2] <= COUNT - 5 * ROWS + ROWS + 10  # of the five batches before the edit all are found


def test_a_disk_that_is_full_does_not_cost_other_stores(tmp_path, monkeypatch):
    train("bert", settings(tmp_path), list(epochs("bert", epochs=1)), model=lora_model("bert", BLOCKS))
    (first,) = stores_in(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 400 * 1024}))
    model = lora_model("bert", BLOCKS)
    model.get_input_embeddings().weight.data += 1
    train("bert", settings(tmp_path), list(epochs("bert", count=120, epochs=1)), count=120, model=model)
    assert first.digest in {store.digest for store in stores_in(tmp_path)}


def test_two_models_of_one_process_share_a_store(tmp_path):
    data, made = loader("bert", count=8, rows=4, length=10), settings(tmp_path)
    models = [lora_model("bert", BLOCKS) for _ in range(2)]
    safes = [Safe(model, made, probe=data, total_steps=50) for model in models]
    for model in models:
        for one in data:
            model(**one).loss.backward()
    assert [safe.cache.prefix_cache.store.keeps for safe in safes] == [True, True]
    safes[0].close()
    models[1](**next(iter(data))).loss.backward()
    safes[1].close()
    (store,) = stores_in(tmp_path)
    assert store.samples == 8 and not store.in_use


def test_only_the_user_can_read_the_states(tmp_path):
    train("bert", settings(tmp_path), list(epochs("bert", epochs=2)), model=lora_model("bert", BLOCKS))
    (store,) = stores_in(tmp_path)
    assert store.folder.stat().st_mode & 0o077 == 0
    assert (store.folder / "data.mdb").stat().st_mode & 0o077 == 0


def test_a_store_that_is_open_is_not_deleted(tmp_path, monkeypatch):
    seen = []

    def after(safe, _model):
        if safe.steps == 3:
            (store,) = stores_in(tmp_path)
            seen.append((store.in_use, delete(store)))

    train("bert", settings(tmp_path), list(epochs("bert", epochs=2)), model=lora_model("bert", BLOCKS), after=after)
    (store,) = stores_in(tmp_path)
    assert seen == [(True, False)] and not store.in_use and delete(store) and not stores_in(tmp_path)


def test_a_folder_that_cannot_be_written_is_named_and_training_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(AdafreezeWarning, match="States cannot be kept"):
        safe = train("bert", settings(tmp_path / "file"), list(epochs("bert")), model=lora_model("bert", BLOCKS))[2]
    assert counts(safe)[0] >= COUNT


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    class Mount:
        mountpoint, fstype = str(tmp_path), "nfs4"

    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [Mount()])
    with pytest.warns(AdafreezeWarning, match="network file system"):
        safe = train("bert", settings(tmp_path), list(epochs("bert")), model=lora_model("bert", BLOCKS))[2]
    assert counts(safe)[0] >= COUNT and not stores_in(tmp_path)


def test_two_runs_fill_one_store_and_one_is_killed(tmp_path):
    program = """
        import os, signal
        from test_kept import *

        def after(safe, _model):
            if int(sys.argv[2]) == safe.steps:
                os.kill(os.getpid(), signal.SIGKILL)

        batches = list(epochs("bert", count=60, epochs=2, seed=int(sys.argv[3])))
        made = settings(sys.argv[1])
        print(train("bert", made, batches, count=60, model=lora_model("bert", BLOCKS), after=after)[0])
    """
    runs = [
        subprocess.Popen(command(program, tmp_path, at, seed), stdout=subprocess.PIPE, text=True)
        for at, seed in ((9, 1), (0, 2))
    ]
    (_, killed), (printed, ended) = ((run.communicate()[0], run.returncode) for run in runs)
    assert (killed, ended) == (-signal.SIGKILL, 0)
    batches = list(epochs("bert", count=60, epochs=2, seed=2))
    control = train("bert", settings(), batches, count=60, model=lora_model("bert", BLOCKS))
    assert json.loads(printed) == control[0]
    third = train("bert", settings(tmp_path), batches, count=60, model=lora_model("bert", BLOCKS))
    assert counts(third[2]) == (120, 0, 0) and third[0] == control[0]
    (store,) = stores_in(tmp_path)
    assert store.samples == 60 and not store.in_use


def test_a_run_that_is_resumed_finds_the_kept_states(tmp_path):
    batches, model, saved = list(epochs("bert", epochs=3)), lora_model("bert", BLOCKS), {}

    def after(safe, model):
        if safe.steps == 6:
            saved.update(safe=safe.state_dict(), model={k: v.clone() for k, v in model.state_dict().items()})

    train("bert", settings(tmp_path), batches, model=model, after=after)
    model.load_state_dict(saved["model"])
    made = settings(tmp_path)
    safe = Safe(model, made, probe=batches[:2], total_steps=len(batches), samples_per_epoch=COUNT)
    safe.load_state_dict(saved["safe"])
    for one in batches[6:]:
        model(**one).loss.backward()
        safe.step()
    safe.close()
    assert counts(safe)[1:] == (0, 0)
