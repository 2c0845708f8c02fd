"""Drawing a probe does not change the state of dataset and collator."""

import functools
import random
import types

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import cases
from adafreeze import ProbeError
from adafreeze.measure import Probe
from adafreeze.measure.draw import varies

GLOBAL = np.random.default_rng(0)
CALLS = 0
helpers = types.ModuleType("helpers")
helpers.rng = random.Random(0)


def one_id(ids, value):
    return torch.cat([ids[:-1], torch.tensor([3 + int(value) % 50])])


class Drawing(cases.Samples):
    """Replaces the last token of each sample by what ``draw`` gives."""

    def __init__(self, draw=None):
        super().__init__("bert", 40, length=8)
        self.draw = draw or (lambda: 0)

    def __getitem__(self, index):
        one = super().__getitem__(index)
        return one | {"input_ids": one_id(one["input_ids"], self.draw())}


def in_an_attribute():
    class Own(Drawing):
        def __init__(self):
            super().__init__()
            self.rng = np.random.default_rng(0)
            self.draw = lambda: self.rng.integers(50)

    return Own()


def in_a_closure():
    generator = torch.Generator().manual_seed(0)
    return Drawing(lambda: torch.randint(50, (1,), generator=generator))


def in_a_partial():
    return Drawing(functools.partial(random.Random.randrange, random.Random(0), 50))


def in_a_bound_method():
    return Drawing(functools.partial(np.random.RandomState(0).randint, 50))


def in_nested_containers():
    held = {"a": [(0, {"b": random.Random(0)})]}
    return Drawing(lambda: held["a"][0][1]["b"].random() * 50)


def in_a_default():
    def draw(rng=np.random.Generator(np.random.MT19937(0))):  # noqa: B008
        return rng.integers(50)

    return Drawing(draw)


def in_a_global():
    return Drawing(lambda: GLOBAL.integers(50))


def in_a_global_two_functions_away():
    return Drawing(_indirectly)


def _indirectly():
    return sum(GLOBAL.integers(50) for _ in range(1))


def in_a_module():
    return Drawing(lambda: helpers.rng.randrange(50))


def in_the_class():
    class Own(Drawing):
        rng = random.Random(0)

        def __init__(self):
            super().__init__()
            self.draw = lambda: type(self).rng.randrange(50)

    return Own()


def in_slots():
    class Slotted:
        __slots__ = ("rng",)

        def __init__(self):
            self.rng = random.Random(0)

        def __call__(self):
            return self.rng.randrange(50)

    return Drawing(Slotted())


def one_for_each_sample():
    class Own(Drawing):
        def __init__(self):
            super().__init__()
            self.rngs = [random.Random(i) for i in range(1000)]

        def __getitem__(self, index):
            return cases.sample("bert", index, 8) | {
                "token_type_ids": torch.tensor([self.rngs[index].randrange(2)] * 8)
            }

    return Own()


def made_when_first_needed():
    class Own(Drawing):
        rng = None

        def __getitem__(self, index):
            if self.rng is None:
                self.rng = random.Random(0)
            self.draw = lambda: self.rng.randrange(50)
            return super().__getitem__(index)

    return Own()


def behind_a_wrapper():
    return Subset(in_an_attribute(), range(40))


def with_a_counter():
    class Own(Drawing):
        def __init__(self):
            super().__init__()
            self.asked = 0
            self.draw = self._next

        def _next(self):
            self.asked += 1
            return self.asked

    return Own()


def with_a_counter_in_a_closure():
    count = 0

    def draw():
        nonlocal count
        count += 1
        return count

    return Drawing(draw)


def with_a_global_counter():
    def draw():
        global CALLS
        CALLS += 1
        return CALLS

    return Drawing(draw)


def with_a_counter_in_a_list():
    held = {"counts": [0]}

    def draw():
        held["counts"][0] += 1
        return held["counts"][0]

    return Drawing(draw)


def with_a_counter_in_a_tensor():
    count = torch.zeros(1)
    return Drawing(lambda: count.add_(1))


def transformed():
    rng = np.random.default_rng(0)

    def transform(batch):
        return {
            "input_ids": [torch.tensor([*ids[:-1], 3 + int(rng.integers(50))]) for ids in batch["input_ids"]],
            "attention_mask": [torch.ones(len(ids), dtype=torch.long) for ids in batch["input_ids"]],
            "labels": [torch.tensor(label) for label in batch["labels"]],
        }

    rows = [{"input_ids": cases.sample("bert", i, 8)["input_ids"].tolist(), "labels": i % 2} for i in range(40)]
    return datasets.Dataset.from_list(rows).with_transform(transform)


OWNERS = [
    in_an_attribute, in_a_closure, in_a_partial, in_a_bound_method, in_nested_containers, in_a_default, in_a_global,
    in_a_global_two_functions_away, in_a_module, in_the_class, in_slots, one_for_each_sample, made_when_first_needed,
    behind_a_wrapper, with_a_counter, with_a_counter_in_a_closure, with_a_global_counter, with_a_counter_in_a_list,
    with_a_counter_in_a_tensor, transformed,
]  # fmt: skip


def first_samples(data):
    return [{name: value.tolist() for name, value in data[index].items()} for index in range(8)]


@pytest.mark.parametrize("make", OWNERS)
def test_drawing_a_probe_does_not_change_the_samples_of_the_run(make, monkeypatch):
    def fresh():
        monkeypatch.setattr(f"{__name__}.GLOBAL", np.random.default_rng(0))
        monkeypatch.setattr(helpers, "rng", random.Random(0))
        monkeypatch.setattr(f"{__name__}.CALLS", 0)
        return make()

    plain, data = first_samples(fresh()), fresh()
    loader = DataLoader(data, collate_fn=cases.collate)
    probe = Probe.draw(loader, tokens=100)
    assert probe.samples >= 32
    assert varies(loader), "it was drawn from"
    assert first_samples(data) == plain


def test_a_collators_generators_and_counters_are_restored():
    class Masking:
        def __init__(self):
            self.rngs = {"python": random.Random(0), "torch": torch.Generator().manual_seed(0)}
            self.batches = 0

        def __call__(self, samples):
            self.batches += 1
            batch = cases.collate(samples)
            batch["input_ids"][:, 1] = 3 + self.rngs["python"].randrange(40)
            batch["input_ids"][:, 2] = torch.randint(3, 40, (1,), generator=self.rngs["torch"])
            return batch

    def batch(collate):
        return collate([cases.sample("bert", 0)])["input_ids"]

    collate = Masking()
    Probe.draw(DataLoader(cases.Samples("bert", 40), collate_fn=collate))
    assert collate.batches == 0 and torch.equal(batch(collate), batch(Masking()))


def test_an_open_file_is_rewound_and_a_new_one_stays_open(tmp_path):
    path = tmp_path / "numbers"
    path.write_text("".join(f"{n}\n" for n in range(100)))

    class FromFile(Drawing):
        def __init__(self):
            super().__init__(lambda: self.file.readline())
            self.file, self.second = path.open(), None

        def __getitem__(self, index):
            if self.second is None:
                self.second = path.open()
            return super().__getitem__(index)

    data = FromFile()
    assert data.file.readline() == "0\n"
    Probe.draw(DataLoader(data, collate_fn=cases.collate), tokens=10)
    assert data.file.readline() == "1\n"
    assert not data.second.closed
    data.file.close()
    data.second.close()


def test_data_in_memory_is_not_copied_or_changed():
    class Guarded(cases.Samples):
        def __init__(self):
            super().__init__("bert", 40)
            self.rows = [cases.sample("bert", index) for index in range(40)]

        def __getitem__(self, index):
            return self.rows[index]

        def __copy__(self):
            raise AssertionError

        def __getstate__(self):
            raise AssertionError

    data = Guarded()
    before = list(map(id, data.rows))
    Probe.draw(DataLoader(data, collate_fn=cases.collate))
    assert list(map(id, data.rows)) == before


def test_a_dataset_over_a_stream_is_refused():
    def numbers():
        yield from range(100)

    stream = numbers()
    loader = DataLoader(Drawing(lambda: next(stream)), collate_fn=cases.collate)
    with pytest.raises(ProbeError, match="come through a generator"):
        Probe.draw(loader)
    assert not varies(loader) and next(stream) == 0


def test_a_collator_that_takes_samples_apart_gets_copies():
    def collate(samples):
        labels = torch.stack([sample.pop("labels") for sample in samples])
        if len(samples) > 1:
            raise ValueError("one at a time")
        return cases.collate(samples) | {"labels": labels}

    rows = [cases.sample("bert", index) for index in range(8)]
    probe = Probe.draw(DataLoader(rows, collate_fn=collate))
    assert [len(chunk["labels"]) for chunk in probe.chunks] == [1] * 8
    assert all("labels" in row for row in rows)
