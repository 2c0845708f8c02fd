"""Exact bytes: freezing the lower half of a stack frees about half of the saved bytes."""

import pytest
from torch.nn import ModuleList

import cases
from adafreeze import Safe, SafeConfig
from adafreeze.costs import SavedBytes


def saved(model, family):
    with SavedBytes(model) as count:
        model(**cases.batch(family, rows=8, length=24))
    return count.total


def saved_in_blocks(model, family):
    """The same without final norm, head and loss."""
    blocks = next(module for module in model.modules() if isinstance(module, ModuleList))
    at_top = []
    with SavedBytes(model) as count:
        handle = blocks[-1].register_forward_hook(lambda *_: at_top.append(count.total))
        model(**cases.batch(family, rows=8, length=24))
    handle.remove()
    return at_top[0]


def lowest(count, family):
    """Names of the lowest units."""
    return [f"{'model.layers' if family == 'llama' else 'bert.encoder.layer'}.{index}" for index in range(count)]


def as_it_is(model): ...


def forced_twice(model):
    model.enable_input_require_grads()
    model.enable_input_require_grads()


def checkpointing(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def checkpointing_reentrant(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()


# With activation checkpointing a block saves only its input, and the head of such a tiny model as much as several
# blocks. No freeze can change that, so only blocks are counted. Whole: 0.64 (llama), 0.40 (bert).
@pytest.mark.parametrize(
    ("arrange", "count"),
    [
        (as_it_is, saved),
        (forced_twice, saved),
        (checkpointing, saved_in_blocks),
        (checkpointing_reentrant, saved_in_blocks),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_half_the_blocks_frozen_is_about_half_the_bytes(family, arrange, count):
    model = cases.lora_model(family, blocks=8)
    arrange(model)
    plain, whole = count(model, family), saved(model, family)
    safe = Safe(model, SafeConfig(freeze=lowest(4, family)), probe=cases.loader(family), total_steps=10)
    assert list(safe.prefixes.values()) == [4]
    half, half_whole = count(model, family), saved(model, family)
    print(f"{family} {arrange.__name__}: {half / plain:.3f}, with the head {half_whole / whole:.3f}")
    assert half <= 0.55 * plain
    safe.close()
    assert count(model, family) == plain


@pytest.mark.parametrize(
    ("name", "frozen", "low", "high"),
    [
        ("the lower half", range(4), 0.45, 0.55),
        ("the upper half", range(4, 8), 0.8, 0.99),
        ("every second", range(1, 8, 2), 0.8, 0.99),
    ],
)
def test_only_a_prefix_pays(name, frozen, low, high):
    model = cases.lora_model("llama", blocks=8)
    plain = saved(model, "llama")
    names = [f"model.layers.{index}" for index in frozen]
    safe = Safe(model, SafeConfig(freeze=names), probe=cases.loader("llama"), total_steps=10)
    assert set(safe.frozen) == set(names)
    ratio = saved(model, "llama") / plain
    print(f"llama, frozen {name}: {ratio:.3f}")
    assert low < ratio < high


def saved_by_part(model, family):
    """Bytes before the bottom block, in each block, and above the top one."""
    blocks = next(module for module in model.modules() if isinstance(module, ModuleList))
    totals = [0]
    with SavedBytes(model) as count:
        handles = [blocks[0].register_forward_pre_hook(lambda *_: totals.append(count.total))]
        handles += [block.register_forward_hook(lambda *_: totals.append(count.total)) for block in blocks]
        model(**cases.batch(family, rows=8, length=24))
    for handle in handles:
        handle.remove()
    parts = [after - before for before, after in zip(totals, [*totals[1:], count.total], strict=True)]
    return parts[0], parts[1:-1], parts[-1]


@pytest.mark.parametrize("arrange", [as_it_is, forced_twice, checkpointing, checkpointing_reentrant])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_block_of_the_prefix_saves_nothing_and_the_others_what_they_saved(family, arrange):
    model = cases.lora_model(family, blocks=8)
    arrange(model)
    _, plain, head = saved_by_part(model, family)
    Safe(model, SafeConfig(freeze=lowest(4, family), cache="off"), probe=cases.loader(family), total_steps=10)
    below, half, head_then = saved_by_part(model, family)
    one_input = 8 * 24 * 32 * 4  # tokens × features, float32
    assert below == 0 and half[:4] == [0, 0, 0, 0] and head_then == head
    assert half[5:] == plain[5:] and plain[4] - one_input <= half[4] <= plain[4]  # its input needs no gradient
    if "checkpointing" in arrange.__name__:
        assert plain == [one_input] * 8 and half[4:] == [one_input] * 4
    # The bytes equal those of a run whose embeddings never required grad.
    if arrange is forced_twice:
        untouched = cases.lora_model(family, blocks=8)
        Safe(untouched, SafeConfig(freeze=lowest(4, family), cache="off"), probe=cases.loader(family), total_steps=10)
        assert saved(model, family) == saved(untouched, family)


@pytest.mark.parametrize("arrange", [checkpointing, checkpointing_reentrant])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_the_depth_of_a_real_model_the_head_does_not_matter(family, arrange):
    model = cases.lora_model(family, blocks=32)
    arrange(model)
    plain = saved(model, family)
    Safe(model, SafeConfig(freeze=lowest(16, family), cache="off"), probe=cases.loader(family), total_steps=10)
    assert saved(model, family) <= 0.55 * plain


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_bytes_fall_with_every_block_of_the_prefix(family):
    model = cases.lora_model(family, blocks=4)
    safe = Safe(model, SafeConfig(freeze_at_start=0), probe=cases.loader(family), total_steps=10)
    counted = [saved(model, family)]
    for name in list(safe.units)[:4]:
        safe.freeze([name])
        counted.append(saved(model, family))
    assert counted == sorted(counted, reverse=True) and len(set(counted)) == 5


def test_frozen_units_outside_the_prefix_save_no_dropped_copies():
    model = cases.lora_model("llama", lora_dropout=0.1)
    plain = saved(model, "llama")
    safe = Safe(model, SafeConfig(freeze_at_start=0), probe=cases.loader("llama"), total_steps=10)
    safe.freeze(["model.layers.2"])
    assert safe.prefixes == {"model.layers": 0}
    copies = 2 * 8 * 24 * 32 * 4  # two targets save a dropped input of 8 × 24 tokens × 32 features in float32
    assert saved(model, "llama") <= plain - copies
