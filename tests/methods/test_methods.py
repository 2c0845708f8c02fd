"""The effect of each method on a run, in the real Trainer with a tiny BERT of four blocks."""

from __future__ import annotations

import itertools
import linecache
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from adafreeze.decide.policy import PolicyInput
from adafreeze.errors import ConfigError
from adafreeze.journal import read_journal
from adafreeze.methods import Method, Outcome, find_method, in_order, outcome_of
from adafreeze.methods.method import _source
from adafreeze.methods.rivals import _Converged, calmest_prefix
from adafreeze.methods.sparse_adapter import SparseAdapter
from adafreeze.train import train
from adafreeze.train.arguments import parse
from adafreeze.train.output import JOURNAL_FILE
from text_cases import reviews, save_bert, write

STEPS = 20


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    data = write(folder / "train.csv", reviews(16))
    return [
        *("--task", "text-classification", "--model_name_or_path", save_bert(folder / "bert", 4)),
        *("--train_file", data, "--validation_file", data, "--method", "none", "--adapter_r", "4"),
        *("--num_train_epochs", "5", "--per_device_train_batch_size", "4", "--learning_rate", "0.01"),
        *("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
        *("--logging_steps", "1", "--pad_to_max_length", "--max_seq_length", "8"),
    ]


@pytest.fixture
def trained(flags, tmp_path, monkeypatch):
    """``trained(method, *flags, found=..., callback=...)``: its outcome and adapter weights."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    def go(name: str, *more: str, found=None, callback=None):
        folder = tmp_path / name
        method = find_method(name)
        if callback is not None:
            method = Watched(method, callback)
        metrics = train(parse([*flags, *more, "--output_dir", str(folder)]), method=method, found=found)
        outcome = outcome_of(folder / JOURNAL_FILE, metrics, task="reviews", method=name, seed=42, settings={})
        return outcome, load_file(folder / "adapter_model.safetensors")

    return go


class Watched(Method):
    def __init__(self, inner: Method, callback: TrainerCallback) -> None:
        self.inner, self.callback, self.name = inner, callback, inner.name

    def configure(self, setup):
        self.inner.configure(setup)

    def prepare(self, model, setup):
        self.inner.prepare(model, setup)
        setup.callbacks.append(self.callback)


class Gradients(TrainerCallback):
    """Records the blocks whose adapters got a gradient in each step."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        blocks = {
            int(name.split("layer.")[1].split(".")[0]) for name, p in named if "lora" in name and p.grad is not None
        }
        self.seen.append(sorted(blocks))


FROZEN = Outcome(
    *("reviews", "safe", 42),
    flops=5.0,
    steps=STEPS,
    blocks=4,
    units=tuple(f"bert.encoder.layer.{n}" for n in range(4)),
    freezes=((8, 1, 1), (10, 2, 2)),
)


def test_plain_freezes_nothing_and_safe_a_prefix(trained):
    plain, _ = trained("plain")
    safe, _ = trained("safe")
    assert plain.steps == safe.steps == STEPS
    assert plain.freezes == ()
    assert safe.freezes
    assert safe.blocks == 4
    assert safe.mean_saved_bytes < safe.peak_saved_bytes < plain.peak_saved_bytes == plain.mean_saved_bytes
    assert plain.metrics.keys() >= {"accuracy", "loss"}


def test_adapterdrop_disables_the_lowest_blocks_in_each_step_and_none_at_the_end(trained):
    watch = Gradients()
    outcome, _ = trained("adapterdrop", callback=watch)
    assert all(blocks == list(range(blocks[0], 4)) for blocks in watch.seen)
    assert {blocks[0] for blocks in watch.seen} == {0, 1, 2, 3}
    assert outcome.freezes == ()
    assert outcome.mean_saved_bytes < 0.8 * outcome.peak_saved_bytes


def test_adapterdrop_draws_among_the_blocks_that_safe_leaves_live(trained):
    watch = Gradients()
    outcome, _ = trained("safe+adapterdrop", callback=watch)
    step, _, depth = outcome.freezes[-1]
    assert depth > 0
    assert all(blocks[0] >= depth for blocks in watch.seen[step:])
    assert all(blocks[-1] == 3 for blocks in watch.seen)


def test_safe_measures_with_dropped_adapters_enabled(trained, tmp_path):
    trained("safe+adapterdrop")
    events = read_journal(tmp_path / "safe+adapterdrop" / JOURNAL_FILE)
    measured = [event["scores"] for event in events if event["event"] == "measure"]
    assert len(measured) > 2
    for before, after in itertools.pairwise(measured):  # a unit that has changed never scores 0 again
        assert all(after[name] > 0 for name in after if before[name] > 0)


def test_half_of_each_matrix_stays_pruned(trained):
    _, weights = trained("sparse-adapter")
    lora = {name: weight for name, weight in weights.items() if "lora" in name}
    assert {float((weight == 0).float().mean()) for weight in lora.values()} == {0.5}


def test_sparsity_zero_is_bit_identical_to_plain(trained, monkeypatch):
    monkeypatch.setattr(SparseAdapter, "sparsity", 0.0)
    _, plain = trained("plain")
    _, dense = trained("sparse-adapter")
    assert all(torch.equal(weight, plain[name]) for name, weight in dense.items())


def test_lora_fa_never_changes_a(trained):
    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.weights = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if "lora" in n}

    start = Start()
    _, weights = trained("safe+lora-fa", callback=start)
    moved = {
        name: not torch.equal(weights[name.replace(".default", "")], before) for name, before in start.weights.items()
    }
    assert not any(moved[name] for name in moved if "lora_A" in name)
    assert any(moved[name] for name in moved if "lora_B" in name)


def test_lora_fa_rejects_dora(trained):
    with pytest.raises(ConfigError, match="cannot train DoRA"):
        trained("lora-fa+dora")


def test_dora_saves_magnitudes(trained):
    _, weights = trained("safe+dora")
    assert any("magnitude" in name for name in weights)


def test_top_blocks_adapts_the_blocks_that_safe_leaves_live(trained):
    _, weights = trained("top-blocks", found={"safe": FROZEN})
    assert {int(n.split("layer.")[1].split(".")[0]) for n in weights if "lora" in n} == {2, 3}


def test_top_blocks_counts_only_blocks_with_adapters(trained):
    _, weights = trained("top-blocks", "--adapter_kwargs", '{"layers_to_transform": [1, 3]}', found={"safe": FROZEN})
    assert {int(n.split("layer.")[1].split(".")[0]) for n in weights if "lora" in n} == {3}


@pytest.mark.parametrize(("name", "blocks"), [("static-third", 1), ("static-half", 2), ("static-two-thirds", 2)])
def test_a_static_prefix_never_trains(trained, name, blocks):
    outcome, weights = trained(name)
    assert outcome.freezes == ((0, blocks, blocks),) and outcome.cached
    learned = {int(n.split("layer.")[1].split(".")[0]) for n, w in weights.items() if "lora_B" in n and w.any()}
    assert learned == set(range(blocks, 4))


def test_equal_flops_trains_as_many_steps_as_safes_flops_pay_for(trained):
    plain = Outcome("reviews", "plain", 42, flops=10.0, steps=STEPS)
    outcome, _ = trained("equal-flops", found={"safe": FROZEN, "plain": plain})
    assert outcome.steps == STEPS // 2


def test_only_methods_based_on_safe_freeze_at_the_start(trained):
    words = ("--freeze_at_start", "0.5")
    safe, _ = trained("safe", *words)
    plain, _ = trained("plain", *words)
    assert safe.freezes[0] == (0, 2, 2)
    assert safe.peak_saved_bytes < 0.7 * plain.peak_saved_bytes
    for name in ("safe-paper", "grades"):
        other, _ = trained(name, *words, found={"safe": safe})
        assert all(step > 0 for step, _, _ in other.freezes), name
    by_chance, _ = trained("random", *words, found={"safe": safe})
    assert by_chance.freezes[0][:2] == (0, 2)
    by_place, _ = trained("bottom-up", *words, found={"safe": safe})
    assert by_place.freezes[0] == (0, 2, 2)


def test_bottom_up_freezes_as_many_blocks_as_safe(trained):
    outcome, _ = trained("bottom-up", found={"safe": FROZEN})
    assert outcome.frozen == 2
    assert outcome.freezes[-1][2] == 2
    first, then = outcome.freezes[:2]
    assert first == (0, 1, 1)
    assert then[0] > 0.5 * STEPS  # without scores the warm-up cannot end early


def test_random_freezing_follows_safes_steps(trained):
    outcome, _ = trained("random", found={"safe": FROZEN})
    assert [(step, frozen) for step, frozen, _ in outcome.freezes] == [(8, 1), (10, 2)]


@pytest.mark.parametrize("name", ["autofreeze", "grades", "safe-paper", "safe-no-cache"])
def test_other_methods_run_to_the_end(trained, name):
    outcome, _ = trained(name, "--threshold", "0.5")
    assert outcome.steps == STEPS
    assert outcome.freezes
    assert not outcome.cached or name in ("autofreeze", "grades")


def test_checkpointing_saves_fewer_bytes_and_learns_the_same(trained):
    plain, before = trained("plain")
    outcome, weights = trained("checkpointing")
    assert outcome.peak_saved_bytes < 0.5 * plain.peak_saved_bytes
    assert outcome.flops > plain.flops
    for name, weight in weights.items():
        torch.testing.assert_close(weight, before[name])


def test_safe_budget_saves_fewer_bytes_than_plain(trained):
    outcome, _ = trained("safe-budget", "--probe_tokens", "16", "--per_device_train_batch_size", "16")
    plain, _ = trained("plain", "--per_device_train_batch_size", "16")
    assert outcome.peak_saved_bytes < plain.peak_saved_bytes


@pytest.mark.parametrize("name", ["lora-fa", "dora"])
def test_lora_methods_reject_other_adapters(trained, name):
    with pytest.raises(ConfigError, match="kind of LoRA"):
        trained(name, "--adapter", "vera")


def chain(**scores: float) -> PolicyInput:
    return PolicyInput(9, 1.0, scores, (tuple((name,) for name in scores),))


def test_autofreeze_takes_the_lowest_blocks_with_small_changes():
    assert list(calmest_prefix(chain(a=0.1, b=0.2, c=0.9, d=0.8))) == ["a", "b"]
    assert list(calmest_prefix(chain(a=0.9, b=0.1, c=0.2, d=0.3))) == []
    assert list(calmest_prefix(PolicyInput(9, 0.0, {"a": 0.1}, ((("a",),),)))) == []


def test_grades_takes_units_below_half_of_their_maximum():
    policy = _Converged(0.5)
    assert policy(chain(a=1.0, b=0.2)) == []
    assert policy(chain(a=0.49, b=0.19)) == ["a"]
    assert policy(chain(a=0.6, b=0.09)) == ["b"]


def test_methods_come_after_those_they_need():
    methods = [find_method(name) for name in ("equal-flops", "top-blocks", "safe", "plain")]
    assert [method.name for method in in_order(methods)] == ["safe", "plain", "equal-flops", "top-blocks"]
    with pytest.raises(ConfigError, match="needs the result of 'safe'"):
        in_order([find_method("top-blocks")])
    with pytest.raises(ConfigError, match="named twice"):
        in_order([find_method("plain"), find_method("plain")])


def test_a_method_fails_without_the_results_it_needs(trained):
    with pytest.raises(ConfigError, match="no result of 'safe'"):
        trained("top-blocks")
    with pytest.raises(ConfigError, match="out of memory"):
        trained("top-blocks", found={"safe": Outcome("reviews", "safe", 42, reason="out of memory")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter-drop", "adapterdrop"),
        ("safe+", "no method ''"),
        ("nowhere.py:Mine", "FileNotFoundError"),
        ("json:dumps", "not a subclass"),
        ("adafreeze.methods:Nothing", "AttributeError"),
    ],
)
def test_unknown_methods_are_rejected(text, message):
    with pytest.raises(ConfigError, match=message):
        find_method(text)


def test_a_digest_depends_on_code_and_results_but_not_on_comments(tmp_path):
    def digest(body: str, found=None) -> str:
        file = tmp_path / "own.py"
        head = "from adafreeze.methods.plain import EqualFlops\n\nclass Own(EqualFlops):\n    name = 'own'\n"
        file.write_text(head + body)
        linecache.clearcache()  # as in a new process
        _source.cache_clear()
        return find_method(f"{file}:Own").digest(found or {})

    bare = digest("    share = 0.5\n")
    assert digest("    '''Says what it is.'''\n    share = 0.5  # of it\n") != digest("    share = 0.6\n")
    assert digest("    share = 0.5  # of it\n") == bare
    assert digest("    share = 0.6\n") != bare
    assert digest("    share = 0.5\n", {"safe": FROZEN}) != bare
    other = replace(FROZEN, freezes=((8, 1, 1),))
    assert digest("    share = 0.5\n", {"safe": other}) != digest("    share = 0.5\n", {"safe": FROZEN})


def test_a_method_in_a_users_file_is_found(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from adafreeze.methods import Method\n\nclass Mine(Method):\n    name = 'mine'\n\n"
        "class Nameless(Method):\n    pass\n"
    )
    assert find_method(f"{file}:Mine").name == "mine"
    with pytest.raises(ConfigError, match="not a subclass"):
        find_method(f"{file}:Nameless")
