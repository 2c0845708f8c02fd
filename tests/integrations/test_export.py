"""A run exported as PEFT configuration: selected blocks, ranks by score, a next run that trains and loads."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import cases
from adafreeze import AdafreezeError, ConfigError, ModelError, RunError, Safe, SafeConfig
from adafreeze.integrations.export import export_config, ranks_by_score

FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5", "vit")


def train(family: str, model: torch.nn.Module, folder: Path, **safe: object) -> Path:
    """Train 12 steps; writes journal and adapter to ``folder``."""
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], 1e-2)
    options = SafeConfig(**{"policy": "bottom_up", "freeze_share": 0.5, "cache": "off", **safe})
    probe, journal = [cases.batch(family)], folder / "journal.jsonl"
    run = Safe(model, options, optimizer=optimizer, probe=probe, total_steps=12, journal=journal)
    for _ in range(12):
        model(**cases.batch(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step()
    run.close()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """``finished(family, config, **SafeConfig)``: the folder of a run, shared by tests, read-only."""
    runs: dict[str, Path] = {}

    def run(family: str, config: PeftConfig | None = None, **safe: object) -> Path:
        key = f"{family} {config} {safe}"
        if key not in runs:
            lora = LoraConfig(r=4, lora_alpha=6, target_modules=cases.TARGETS[family])
            model = get_peft_model(cases.base_model(family), copy.deepcopy(config) or lora)
            runs[key] = train(family, model, tmp_path_factory.mktemp("run"), **safe)
        return runs[key]

    return run


@pytest.mark.parametrize("at_start", [{"freeze_at_start": 0.5}, {"freeze": ["bert.encoder.layer.0"]}])
def test_units_frozen_before_step_0_score_zero(finished, at_start):
    found = export_config(finished("bert", policy="share", freeze_share=0.0, **at_start))
    assert [block.name for block in found.blocks if block.frozen_at == 0] == [
        f"bert.encoder.layer.{n}" for n in range(2 if "freeze_at_start" in at_start else 1)
    ]
    assert all(block.score == 0 and not block.kept for block in found.blocks if block.frozen_at == 0)
    assert all(block.score > 0 and block.kept for block in found.blocks if block.frozen_at is None)


def next_model(family: str, folder, base: torch.nn.Module | None = None) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*did not match any targeted module")  # PEFT's, for rank_pattern
        return get_peft_model(base or cases.base_model(family), PeftConfig.from_pretrained(str(folder)))


def adapted(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix("base_model.model."): module for name, module in layers.items()}


def blocks_of(model: torch.nn.Module, names) -> set[str]:
    """The blocks with adapters; fails for adapters outside ``names``."""
    found = {layer: next(name for name in names if layer.startswith(f"{name}.")) for layer in adapted(model)}
    return set(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_run_adapts_the_live_blocks_and_trains_saves_and_loads(finished, family, tmp_path):
    made = export_config(finished(family))
    assert {block.frozen_at is None for block in made.blocks} == {True, False}
    assert all(block.kept == (block.frozen_at is None) == (block.rank is not None) for block in made.blocks)
    made.config.save_pretrained(str(tmp_path / "next"))
    assert isinstance(LoraConfig.from_pretrained(str(tmp_path / "next")), LoraConfig)
    model = next_model(family, tmp_path / "next").train()
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in adapted(model).items()}
    for block in made.blocks:
        inside = {pair for name, pair in found.items() if name.startswith(f"{block.name}.")}
        assert inside == ({(block.rank, 6 / 4)} if block.kept else set()), block
    assert sum(any(n.startswith(f"{b.name}.") for b in made.blocks) for n in found) == len(found)

    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(2):
        model(**cases.batch(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(cases.base_model(family), tmp_path / "saved").eval()
    with torch.no_grad():
        batch = cases.batch(family)
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_number_of_parameters_is_kept_up_to_rounding(finished, family, tmp_path):
    folder = finished(family)
    made = export_config(folder)
    made.config.save_pretrained(str(tmp_path / "next"))
    before = get_peft_model(cases.base_model(family), PeftConfig.from_pretrained(str(folder)))
    run, following = (
        sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        for model in (before, next_model(family, tmp_path / "next"))
    )
    assert made.parameters == (run, following)
    dearest = max(
        sum(
            layer.in_features + layer.out_features for name, layer in adapted(before).items() if name.startswith(b.name)
        )
        for b in made.blocks
    )
    assert 0 <= run - following < dearest
    kept = sorted((block for block in made.blocks if block.kept), key=lambda block: block.score)
    if family == "bert":  # all blocks cost the same
        assert sum(block.rank for block in kept) == 4 * len(made.blocks)
        assert [block.rank for block in kept] == sorted(block.rank for block in kept)
        total = sum(block.score for block in kept)
        for block in kept:
            assert abs(block.rank - max(1.0, 16 * block.score / total)) < 1, block


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="selects no block by a number that comes first")
def test_one_stack_uses_block_numbers(finished):
    config = export_config(finished("gpt2")).config
    assert (config.layers_to_transform, config.layers_pattern) == ([2, 3], r"transformer\.h")
    assert config.target_modules == {"c_attn"}
    config = export_config(finished("t5")).config  # the whole encoder is frozen
    assert (config.layers_to_transform, config.layers_pattern) == ([0, 1, 2, 3], r"decoder\.block")
    assert export_config(finished("bert"), keep_ranks=True).config.layers_to_transform == [2, 3]


def test_two_stacks_use_a_pattern(finished):
    shares = {block.name: block.share for block in export_config(finished("t5")).blocks}
    config = export_config(finished("t5"), min_share=min(shares["encoder.block.3"], shares["decoder.block.0"])).config
    assert config.layers_to_transform is None and shares["encoder.block.0"] < shares["decoder.block.0"]
    for name, taken in {
        "encoder.block.3.layer.0.SelfAttention.q": True,
        "encoder.block.0.layer.0.SelfAttention.q": False,
        "decoder.block.0.layer.0.SelfAttention.q": True,
        "decoder.block.0.layer.0.SelfAttention.k": False,
    }.items():
        assert bool(re.fullmatch(config.target_modules, name)) == taken, name


def test_blocks_can_be_selected_by_their_share_of_the_score(finished):
    folder = finished("bert", dry_run=True)
    by_share = sorted(export_config(folder, min_share=1e-6).blocks, key=lambda block: block.share)
    assert sum(block.share for block in by_share) == pytest.approx(1)
    made = export_config(folder, min_share=(by_share[1].share + by_share[2].share) / 2)
    assert {block.name for block in made.blocks if block.kept} == {block.name for block in by_share[2:]}


def test_ranks_can_be_kept(finished):
    config = export_config(finished("bert"), keep_ranks=True).config
    assert (config.rank_pattern, config.alpha_pattern, config.r) == ({}, {}, 4)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, use_dora=True, target_modules=["query", "value"], task_type="SEQ_CLS"),
        LoraConfig(r=4, use_rslora=True, target_modules=r".*\.(query|value)"),
        LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"),
        IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"),
        VeraConfig(r=4, target_modules=["query"]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=12, target_modules=["query", "value"]),
    ],
    ids=["dora", "pattern", "all-linear", "ia3", "vera", "adalora"],
)
def test_other_adapters_can_be_exported(finished, config, tmp_path):
    made = export_config(finished("bert", config))
    made.config.save_pretrained(str(tmp_path / "next"))
    model = next_model("bert", tmp_path / "next")
    kept = {block.name for block in made.blocks if block.kept}
    assert len(kept) == 2 and blocks_of(model, [block.name for block in made.blocks]) == kept
    if isinstance(config, AdaLoraConfig) or not isinstance(config, LoraConfig):
        assert all(block.rank is None for block in made.blocks) and "no ranks" in " ".join(made.notes)
        return
    ranks = {block.name: block.rank for block in made.blocks}
    root = math.sqrt if config.use_rslora else float
    for name, layer in adapted(model).items():
        block = next(block for block in kept if name.startswith(f"{block}."))
        assert layer.r["default"] == ranks[block]
        assert layer.scaling["default"] == pytest.approx(config.lora_alpha / root(4), rel=1e-5)
    assert ("bert.pooler.dense" in " ".join(made.notes)) == (config.target_modules == "all-linear")
    model(**cases.batch("bert")).loss.backward()


def test_an_export_can_be_trained_and_exported_again(finished, tmp_path):
    first = export_config(finished("llama"))
    first.config.save_pretrained(str(tmp_path / "next"))
    model = next_model("llama", tmp_path / "next")
    second = export_config(train("llama", model, tmp_path / "second", freeze_share=0.75))
    assert len(second.blocks) == 2 and sum(block.kept for block in second.blocks) == 1
    assert second.parameters[0] == first.parameters[1]
    second.config.save_pretrained(str(tmp_path / "third"))
    (block,) = (block for block in second.blocks if block.kept)
    layers = adapted(next_model("llama", tmp_path / "third"))
    assert {(name.split(".self")[0], layer.r["default"]) for name, layer in layers.items()} == {
        (block.name, block.rank)
    }
    assert block.rank <= 16  # v_proj has the fewest features, 16


def test_a_truncated_journal_is_exported_with_a_note(finished, tmp_path):
    folder = shutil.copytree(finished("bert"), tmp_path / "run")
    journal = folder / "journal.jsonl"
    text = journal.read_text()
    journal.write_text(text[: text.index('"event": "close"') + 30])
    made = export_config(folder)
    assert sum(block.kept for block in made.blocks) == 2
    assert re.search(r"ends at step \d+ of 12", made.notes[0])
    journal.write_text(text[: text.index('"event": "measure"') + 60])
    with pytest.raises(RunError, match=r"(?s)no score for 4 of 4 blocks.*ends at step \d of 12"):
        export_config(folder)


def test_the_later_of_two_runs_in_a_journal_is_exported(finished, tmp_path):
    folder = shutil.copytree(finished("bert"), tmp_path / "run")
    later = finished("bert", freeze_share=0.25)
    with (folder / "journal.jsonl").open("a") as file:
        file.write((later / "journal.jsonl").read_text())
    assert [block.kept for block in export_config(folder).blocks] == [False, True, True, True]


def test_a_score_that_is_not_finite_is_ignored(finished, tmp_path):
    folder = shutil.copytree(finished("bert"), tmp_path / "run")
    expected = export_config(folder).blocks
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"event": "measure", "step": 12, "scores": {"bert.encoder.layer.3": "nan"}}\n')
    assert export_config(folder).blocks == expected


def test_runs_that_cannot_be_exported_are_rejected_with_the_reason(finished, tmp_path):
    def refused(kind, text, *args, **kwargs):
        with pytest.raises(kind, match=f"(?s){text}") as caught:
            export_config(*args, **kwargs)
        assert isinstance(caught.value, AdafreezeError) and "Fix:" in str(caught.value)

    refused(RunError, r"There is no journal .*journal\.jsonl", tmp_path)
    head = '{"event": "journal", "version": 1}\n'
    (tmp_path / "journal.jsonl").write_text(head + 'not json\n{"event": "other"}\n[1]\n')
    refused(RunError, "contains no scores", tmp_path)
    (tmp_path / "journal.jsonl").write_text(head + '{"event": "run", "method": "none", "settings": {}}\n')
    refused(RunError, r"--method none", tmp_path)
    refused(RunError, r"granularity=\"site\"", finished("bert", granularity="site"))
    dry = shutil.copytree(finished("bert", dry_run=True), tmp_path / "dry")
    refused(RunError, r"dry run.*--min_share", dry)
    refused(ConfigError, r"No block has 0\.9\d* of the score.*--min_share 0\.", dry, min_share=0.99)
    refused(ConfigError, r"--min_share is 2", dry, min_share=2)
    config = json.loads((dry / "adapter_config.json").read_text())
    (dry / "adapter_model.safetensors").write_bytes(b"cut off")
    refused(RunError, r"adapter_model\.safetensors cannot be read", dry, min_share=0.01)
    (dry / "adapter_model.safetensors").unlink()
    for changed, text in (
        ({"rank_pattern": {"query": 2}}, r"rank_pattern.*--keep_ranks"),
        ({"target_modules": "all-linear"}, r"'all-linear'.*--adapter_config FOLDER"),
        ({"peft_type": "PREFIX_TUNING"}, "it has no weights in layers"),
        ({"peft_type": "NO_SUCH"}, "is not the configuration of a PEFT adapter"),
    ):
        (dry / "adapter_config.json").write_text(json.dumps(config | changed))
        refused((ConfigError, ModelError, RunError), text, dry, min_share=0.3)
    (dry / "adapter_config.json").write_text('{"config": {"mh_adapter": true}, "model_type": "bert"}')  # AdapterHub's
    refused(RunError, "missing required keys", dry, min_share=0.01)
    (dry / "adapter_config.json").unlink()
    refused(RunError, r"no flags of .*--adapter_config", dry, min_share=0.01)


def test_different_ranks_in_one_block_are_not_overwritten(finished):
    config = LoraConfig(r=4, target_modules=["query", "value"], rank_pattern={"query": 2})
    folder = finished("bert", config)
    with pytest.raises(ConfigError, match=r"(?s)different ranks.*--keep_ranks"):
        export_config(folder)
    assert export_config(folder, keep_ranks=True).config.rank_pattern == {"query": 2}


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50), st.integers(1, 64)), min_size=1, max_size=12),
    st.integers(0, 5000),
)
@settings(deadline=None, max_examples=60)
def test_ranks_respect_the_budget_the_bounds_and_the_order_of_scores(blocks, more):
    scores, costs, most = (list(column) for column in zip(*blocks, strict=True))
    budget = sum(costs) + more
    ranks = ranks_by_score(scores, costs, budget, most)
    spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    assert spent <= budget and all(1 <= rank <= limit for rank, limit in zip(ranks, most, strict=True))
    if any(rank < limit for rank, limit in zip(ranks, most, strict=True)):
        assert budget - spent < max(costs)
    unbounded = ranks_by_score(scores, [1] * len(scores), budget)
    assert sum(unbounded) == budget
    by_score = [rank for _, rank in sorted(zip(scores, unbounded, strict=True))]
    assert all(below <= above + 1 for below, above in itertools.pairwise(by_score))
