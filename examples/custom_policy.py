"""A custom policy: a function of the scores that names the units to freeze next.

    python examples/custom_policy.py

This one freezes from the bottom up while a block scores below the mean. ``prefix_only`` declares that, so that
``min_live_blocks`` keeps the topmost blocks live. Frozen units stay frozen.
"""

from collections.abc import Iterator
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, set_seed

from adafreeze import Safe, SafeConfig
from adafreeze.decide import PolicyInput, prefix_only


@prefix_only
def below_the_mean(given: PolicyInput) -> Iterator[str]:
    """Units of the longest prefix in which no block scores above the mean; none during warm-up."""
    if given.ramp <= 0:
        return
    for chain in given.chains:
        limit = mean(given.scores.values())
        for block in chain:
            if any(given.scores.get(unit, limit) > limit for unit in block):
                break
            yield from block


EPOCHS = 4
set_seed(0)
ids = torch.randint(8, 64, (512, 12))
labels = torch.arange(512) % 2
ids[labels == 1, 5] = 7
rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
batches = DataLoader(rows, batch_size=16, shuffle=True)

config = BertConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_labels=2
)
adapters = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
model = get_peft_model(BertForSequenceClassification(config), adapters)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

settings = SafeConfig(policy=below_the_mean)
safe = Safe(model, settings, optimizer=optimizer, probe=batches, total_steps=EPOCHS * len(batches))
model.train()
for _ in range(EPOCHS):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()
for event in safe.journal.events:
    if event["event"] == "freeze":
        print(f"step {event['step']}: {', '.join(event['units'])}")
print("frozen:", sorted(safe.frozen))
safe.close()
