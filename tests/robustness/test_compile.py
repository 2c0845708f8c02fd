"""torch.compile: the same losses as in eager mode, and few compilations.

A compilation is one graph that reaches the backend. After a freeze the model is compiled once more, because its
parameters' flags are guarded; compiled block by block, once for each way to stand in the prefix (at its bottom, in its
middle, at its boundary), however many blocks there are. One more comes in the run, at the second training pass with a
prefix and without a cache, when the prefix has seen which autocast is in force.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import Trainer, TrainingArguments

import cases
from adafreeze import Safe, SafeCallback, SafeConfig
from cached_run import by_step

BLOCKS = 5
STEPS = 9
FREEZES = {2: 2, 5: 4}  # so many blocks after so many steps


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Tiny(nn.Module):
    """Compiles in a second; padding is masked out of the mean that its head reads."""

    def __init__(self, width=16):
        super().__init__()
        self.embeddings = nn.Embedding(cases.VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids, attention_mask, labels):
        x = self.embeddings(input_ids)
        for block in self.blocks:
            x = block(x)
        mask = attention_mask.unsqueeze(-1)
        return nn.functional.cross_entropy(self.head((x * mask).sum(1) / mask.sum(1)), labels)


def run(mode, cache, length):
    """Train; returns losses, the last gradients, graphs compiled in each step, and the closed Safe."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)).train()
    called = torch.compile(model, backend=backend) if mode == "whole" else model
    for module in {"in place": [model], "blocks": model.base_model.model.blocks}.get(mode, []):
        module.compile(backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = [cases.collate([cases.sample("bert", i, length) for i in rows]) for rows in (range(8), range(8, 16))]
    safe = Safe(
        called,
        SafeConfig(cache=cache),
        optimizer=optimizer,
        probe=batches,
        total_steps=1000,
        samples_per_epoch=16,
        samples_per_step=8,
    )
    losses, compiled, held = [], [], {}
    for step in range(STEPS):
        before = len(graphs)
        loss = called(**batches[step % 2])
        loss.backward()
        losses.append(loss.item())
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        compiled.append(len(graphs) - before)
        if step + 1 in FREEZES:
            safe.freeze([n for n in list(safe.units)[: FREEZES[step + 1]] if n not in safe.frozen])
            for parameter in safe.freezer.parameters():
                held.setdefault(parameter, parameter.detach().clone())
    assert len(held) == 8 and all(torch.equal(parameter, value) for parameter, value in held.items())
    safe.close()
    return losses, gradients, compiled, safe


@pytest.fixture(scope="module")
def eager():
    return {length: run("eager", "off", length) for length in (12, None)}


@pytest.mark.parametrize(
    ("mode", "cache", "length", "most"),
    [
        ("whole", "off", 12, 2 + 1),
        # Before anything is served, and again when held states are first to be, a pass runs the prefix: once a freeze.
        ("in place", "ram", 12, 2 * 3),
        ("blocks", "off", 12, 2 * 3 + 1),
        ("blocks", "ram", None, 2 * 3 + 3),
        # The cache asks padding for its gradient once; the hook that does so parts the graph into those of its blocks.
        ("whole", "ram", None, 2 * 3 + 3),
    ],
)
def test_a_compiled_model_freezes_like_an_eager_one(mode, cache, length, most, eager):
    losses, gradients, compiled, safe = run(mode, cache, length)
    assert losses == pytest.approx(eager[length][0], rel=1e-5)
    for mine, plain in zip(gradients, eager[length][1], strict=True):
        assert (mine is None) == (plain is None)
        assert mine is None or torch.allclose(mine, plain, rtol=1e-4, atol=1e-6)
    assert safe.prefixes == {"blocks": 4}
    if cache == "ram":
        (event,) = [event for event in safe.journal.events if event["event"] == "cache"]
        assert event["hits"] + event["advanced"] > 0
        assert not [event for event in safe.journal.events if event["event"] == "cache_off"]
    assert sum(compiled[min(FREEZES) :]) <= most, compiled
    assert sum(compiled[max(FREEZES) + 2 :]) == 0, "then no more"


def test_a_compiled_trainer_freezes_like_an_eager_one(tmp_path):
    def train(**more):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        settings = {"score": "random", "warmup": 0.0, "ramp_end": 1.0, "policy": by_step({2: 1})}
        safe = SafeCallback(SafeConfig(**settings))
        args = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, **more,
        )  # fmt: skip
        trainer = Trainer(
            model=cases.lora_model("llama", blocks=2),
            args=args,
            train_dataset=cases.Samples("llama", 8, length=12),
            data_collator=cases.collate,
            callbacks=[safe],
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], safe.safe

    losses, safe = train(torch_compile=True, torch_compile_backend="aot_eager")
    # One before the freeze; after it passes that run the prefix, that are watched, and that are served, in two parts.
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 9
    assert losses == pytest.approx(train()[0], rel=1e-4)
    assert safe.prefixes == {"model.layers": 1}
