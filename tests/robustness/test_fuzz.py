"""Whatever comes: settings of any type, scores of any value, freezes and interference in any order."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adafreeze import ConfigError, SafeConfig
from adafreeze.sizes import parse_size

STEADY = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))  # timing decides no test
FIELDS = [field.name for field in dataclasses.fields(SafeConfig)]

shares = st.floats(0, 1)
sizes = st.integers(1, 2**70) | st.sampled_from(["4GiB", "1.5 kb", "7", "2 TiB"])
VALID = {
    "policy": st.sampled_from(["share", "threshold", "bottom_up"]),
    "score": st.sampled_from(["cka", "cka_debiased", "local_cka", "grad_norm", "weight_change", "random"]),
    "granularity": st.sampled_from(["block", "site"]),
    **dict.fromkeys(["freeze_share", "threshold", "settle_tolerance", "overhead"], shares),
    "settle_patience": st.integers(1),
    "min_live_blocks": st.integers(0),
    "probe_tokens": st.integers(2),
    "min_measurements": st.integers(1),
    "seed": st.integers(0, 2**32 - 1),
    **dict.fromkeys(["normalize_rows", "prefix_dropout", "dry_run"], st.booleans()),
    "cache_budget": sizes,
    "cache_dtype": st.sampled_from([None, "bfloat16"]),
    "memory_budget": st.none() | st.just("auto") | st.floats(0, 1, exclude_min=True) | sizes,
    "freeze": st.lists(st.text()).map(tuple),
}
ALONE = {"warmup", "ramp_end", "cache", "cache_dir"}  # their ranges depend on each other
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


def test_every_field_has_values_here():
    assert set(VALID) | ALONE == set(FIELDS)


@STEADY
@given(st.fixed_dictionaries({}, optional=VALID), st.lists(shares, min_size=2, max_size=2))
def test_valid_settings_survive_the_way_through_json(values, ends):
    warmup, ramp_end = sorted(ends)
    config = SafeConfig(**values, warmup=warmup, ramp_end=ramp_end)
    assert SafeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@STEADY
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_settings_of_any_value_are_taken_or_refused_with_a_reason(values):
    try:
        config = SafeConfig(**values)
    except ConfigError as error:
        assert any(name in error.fact for name in values) and error.cause and error.fix
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
