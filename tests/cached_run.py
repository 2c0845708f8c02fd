"""A plain loop that freezes at known steps, with the prefix cache or without it, for the tests of the cache."""

from __future__ import annotations

import os
import sys
import textwrap

import torch

from adafreeze import Safe, SafeConfig
from cases import Samples, batch, collate, lora_model

BLOCKS = 4
EPOCHS = 3
ROWS = 4
COUNT = 14


def by_step(depths: dict[int, int]):
    """A policy that freezes all blocks below depths[step] from that step on; of T5's encoder first."""

    def policy(situation):
        depth = max((to for at, to in depths.items() if at <= situation.step), default=0)
        blocks = [block for chain in situation.chains for block in chain]
        return [unit for block in blocks[:depth] for unit in block if unit not in situation.frozen]

    return policy


def config(depths=None, cache="ram", **more) -> SafeConfig:
    """Freezes at known steps, whatever the scores."""
    settings = {"score": "random", "warmup": 0.0, "ramp_end": 1.0, "policy": by_step(depths or {2: 2})}
    return SafeConfig(**{**settings, "cache": cache, **more})


def pad_to(width: int):
    """A collator that pads text to ``width`` on the right, and labels to 6 (T5) or ``width``."""

    def padded(samples):
        made = collate(samples)
        for name, value in made.items():
            if value.ndim == 2 and width > value.shape[1] and not (name == "labels" and value.shape[1] == 6):
                fill = {"labels": -100}.get(name, 0)
                made[name] = torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill)
        return made

    return padded


def epochs(family, count=COUNT, seed=3, epochs=EPOCHS, collator=None):
    """Shuffled batches; the last of an epoch is smaller."""
    data, generator = Samples(family, count), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, ROWS):
            yield (collator or pad_to(16))([data[index] for index in order[start : start + ROWS]])


def train(family, settings, batches, model=None, accumulate=1, count=COUNT, after=None, step=None, **safe_arguments):
    """A plain loop; returns the losses, the gradients before each optimizer step, and the closed Safe."""
    model = model or lora_model(family, BLOCKS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    batches = list(batches)
    safe = Safe(
        model,
        settings,
        optimizer=optimizer,
        probe=batches[:2],
        total_steps=len(batches) // accumulate,
        samples_per_epoch=count,
        **safe_arguments,
    )
    torch.manual_seed(5)
    losses, gradients = [], []
    for number, one in enumerate(batches):
        if step is None:
            loss = model(**one).loss
            (loss / accumulate).backward()
            losses.append(loss.item())
        else:
            step(safe, model, one)
        if (number + 1) % accumulate:
            continue
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()
        if after is not None:
            after(safe, model)
    safe.weights = [p.detach().clone() for p in model.parameters()]
    safe.close()
    return losses, gradients, safe


def same_without(family, batches=None, depths=None, *, cache="ram", folder=None, model=None, exact=True, **more):
    """Train with the prefix cache and without it; every bit must be equal. Returns the Safe of the run with it.

    Args:
        family: of the model and its batches.
        batches: default: those of three epochs.
        depths: default: two blocks from the second step on.
        cache: "ram", or another with ``folder`` for its directory.
        folder: of the cache; not for "ram".
        model: makes one; default: that of the family.
        exact: False where this processor rounds a sample's result by its place in the batch.
        more: fields of ``SafeConfig``, and arguments of ``train``.
    """
    batches, runs = list(epochs(family) if batches is None else batches), []
    settings = {name: more.pop(name) for name in list(more) if name in SafeConfig.__dataclass_fields__}
    for mode in (
        {"cache": cache, "cache_dir": folder if cache != "ram" else None, **settings},
        {**settings, "cache": "off"},
    ):
        runs.append(train(family, config(depths or {1: 2}, **mode), batches, model=model and model(), **more))
    if exact:
        assert_same(*runs)
    else:
        torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)
        for one, other in zip(runs[0][2].weights, runs[1][2].weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return runs[0][2]


def frozen(family, **lora):
    """A model without dropout, a batch, and a Safe that has frozen two blocks."""
    model, inputs = lora_model(family, BLOCKS, dropout=0.0, **lora), batch(family)
    safe = Safe(model, config(), probe=inputs, total_steps=100, samples_per_epoch=40)
    safe.freeze(list(safe.units)[:2])
    return model, inputs, safe


def counts(safe):
    """hits, advanced, misses"""
    event = next(event for event in safe.journal.events if event["event"] == "cache")
    return event["hits"], event["advanced"], event["misses"]


def assert_same(one, other):
    """To the last bit."""
    assert one[0] == other[0]
    for gradients, others in zip(one[1], other[1], strict=True):
        for a, b in zip(gradients, others, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert all(map(torch.equal, one[2].weights, other[2].weights))


def command(program, *arguments):
    """Run ``program`` in another process, with the tests in its path; its arguments begin at ``sys.argv[1]``."""
    tests = os.path.dirname(__file__)
    path = f"import sys; sys.path[:0] = [{tests!r}, {tests + '/cache'!r}]\n"
    return [sys.executable, "-c", path + textwrap.dedent(program), *map(str, arguments)]
