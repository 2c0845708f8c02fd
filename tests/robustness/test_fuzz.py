"""Whatever comes: settings of any type, and scores of any value."""

import dataclasses
import itertools
import json
import math
import warnings
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cases
from adafreeze import AdafreezeWarning, ConfigError, Safe, SafeConfig
from adafreeze.sizes import parse_size

STEADY = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))  # timing decides no test
FIELDS = [field.name for field in dataclasses.fields(SafeConfig)]

shares = st.floats(0, 1)
sizes = st.integers(1, 2**70) | st.sampled_from(["4GiB", "1.5 kb", "7", "2 TiB"])
VALID = {
    "policy": st.sampled_from(["share", "threshold", "bottom_up"]),
    "score": st.sampled_from(["cka", "cka_debiased", "local_cka", "grad_norm", "weight_change", "random"]),
    "granularity": st.sampled_from(["block", "site"]),
    **dict.fromkeys(["freeze_share", "freeze_at_start", "threshold", "settle_tolerance", "overhead"], shares),
    "settle_patience": st.integers(1),
    "min_live_blocks": st.integers(0),
    "probe_tokens": st.integers(2),
    "min_measurements": st.integers(1),
    "seed": st.integers(0, 2**32 - 1),
    **dict.fromkeys(["wait_for_loss", "normalize_rows", "prefix_dropout", "lean", "dry_run"], st.booleans()),
    "cache_budget": sizes,
    "lr_scale": st.just("sqrt") | st.floats(0.1, 10),
    "fill": st.sampled_from([None, "before"]),
    "cache_dtype": st.sampled_from([None, "bfloat16", "int8"]),
    "memory_budget": st.none() | st.just("auto") | st.floats(0, 1, exclude_min=True) | sizes,
    "freeze": st.lists(st.text()).map(tuple),
}
# Their ranges depend on each other.
ALONE = {"warmup", "ramp_end", "cache", "cache_dir", "keep_cache", "checkpointing", "offload"}
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [2**63, 2**64, 10**400, -(10**400), math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.0000000000000002]
    )
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["9" * 400, "9" * 400 + "GiB", "nan", "inf", "1e999", "auto", "off", "disk", "٣GiB", "\x00"])
    | st.binary(max_size=3)
    | st.lists(st.none() | st.integers() | st.text(max_size=2), max_size=2)
    | st.dictionaries(st.text(max_size=2), st.none(), max_size=2)
    | st.sampled_from([1j, (), object(), ..., torch.ones(2), torch.tensor(0.5), float, len])
)


def test_every_field_has_a_strategy():
    assert set(VALID) | ALONE == set(FIELDS)


@STEADY
@given(st.fixed_dictionaries({}, optional=VALID), st.lists(shares, min_size=2, max_size=2))
def test_valid_settings_survive_json(values, ends):
    warmup, ramp_end = sorted(ends)
    config = SafeConfig(**values, warmup=warmup, ramp_end=ramp_end)
    assert SafeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@STEADY
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_any_settings_are_accepted_or_refused_with_a_reason(values):
    try:
        config = SafeConfig(**values)
    except ConfigError as error:
        assert any(name in error.fact for name in values) and error.fix
    else:
        assert config.cache_bytes > 0
        assert config.memory_limit is None or config.memory_limit == "auto" or config.memory_limit > 0
        json.dumps(config.to_dict())


@STEADY
@given(st.dictionaries(st.text(max_size=8) | st.integers(), VALUES, min_size=1, max_size=2))
def test_fields_that_do_not_exist_are_refused_by_name(values):
    with pytest.raises(ConfigError, match="has no field"):
        SafeConfig.from_dict({f"{name}?": value for name, value in values.items()})


@STEADY
@given(VALUES)
def test_sizes_of_any_value_are_positive_or_refused(value):
    try:
        assert parse_size("size", value) > 0
    except ConfigError as error:
        assert "size is" in error.fact


@settings(STEADY, max_examples=12)
@given(
    st.lists(st.floats() | st.sampled_from([0.0, -0.0, 5e-324, 1e308, math.nan, 0.5]), min_size=1, max_size=40),
    st.sampled_from(["share", "threshold", "bottom_up"]),
    st.lists(shares, min_size=2, max_size=2).map(sorted),
    shares,
    st.integers(0, 5),
)
def test_a_run_whose_scores_are_any_numbers_freezes_within_its_bounds(numbers, policy, ends, share, least):
    stream = itertools.cycle(numbers)
    config = SafeConfig(
        policy=policy,
        score=lambda before, now: next(stream),
        warmup=ends[0],
        ramp_end=ends[1],
        freeze_share=share,
        threshold=share,
        min_live_blocks=least,
        overhead=1.0,
        cache="off",
        freeze_at_start=0.0,
    )
    safe = Safe(llama(), config, probe=[cases.batch("llama", rows=2)], total_steps=12, samples_per_step=64)
    units, frozen, ramp = list(safe.units), set(), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdafreezeWarning)  # that scores are not finite
        for _ in range(12):
            named = set(safe.step())
            assert not named & frozen
            frozen |= named
            assert safe.frozen == frozen
            assert not frozen or safe.warmup_end is not None
            assert len(units) - len(frozen) >= min(max(least, 1), len(units))
            assert ramp <= (ramp := safe.logs()["safe/ramp"]) <= 1
            if policy != "threshold":
                assert frozen == set(units[: len(frozen)])
            assert safe.prefixes == {"model.layers": next(i for i, unit in enumerate(units) if unit not in frozen)}
    assert not [event for event in safe.journal.events if event["event"] == "measure_failed"]
    safe.close()


@cache
def llama():
    return cases.lora_model("llama", blocks=3)


def test_huge_integers_are_accepted():
    huge = 10**30
    config = SafeConfig(
        settle_patience=huge, min_live_blocks=huge, probe_tokens=huge, min_measurements=huge, seed=2**32 - 1,
        cache_budget=huge,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdafreezeWarning)
        safe = Safe(llama(), config, probe=cases.loader("llama"), total_steps=10, samples_per_step=64)
        for _ in range(10):
            llama()(**cases.batch("llama")).loss.backward()
            assert safe.step() == []
    safe.close()
