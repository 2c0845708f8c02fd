"""Attributes and containers are put back in place."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from adafreeze.model.restore import ABSENT, restorer, temporarily


def test_attributes_are_put_back_after_an_error():
    one = SimpleNamespace(a=1, b=2)
    with pytest.raises(KeyError), temporarily([(one, "a", 3), (one, "b", 4), (one, "a", 5)]):
        assert vars(one) == {"a": 5, "b": 4}
        raise KeyError
    assert vars(one) == {"a": 1, "b": 2}
    with pytest.raises(AttributeError), temporarily([(one, "a", 3), (one, "c", 4)]):
        pass
    assert vars(one) == {"a": 1, "b": 2}


@pytest.mark.parametrize("make", [list, set, deque])
def test_members_are_put_back_in_place(make):
    tensor = torch.ones(2)  # has no truth value to compare by
    container = make([1, tensor, "a"])
    restore = restorer(container)
    assert restore() == []
    container.clear()
    (container.add if make is set else container.append)(torch.ones(2))
    assert restore() == [None] and len(container) == 3 and any(one is tensor for one in container)


def test_entries_are_put_back_unless_skipped():
    tensor = torch.ones(2)
    container = {"a": 1, "b": tensor, "c": 3}
    restore = restorer(container, skip=lambda key, before, now: key == "c" or (before is ABSENT and now == 9))
    container |= {"b": torch.ones(2), "c": 4, "new": 5, "kept": 9}
    del container["a"]
    assert sorted(restore()) == ["a", "b", "new"]
    assert container.pop("b") is tensor and container == {"a": 1, "c": 4, "kept": 9}
