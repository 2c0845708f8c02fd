"""Your own loop: one object, and one call after each step.

    python examples/plain_loop.py

The model of examples/trainer.py, without a Trainer.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, set_seed

from adafreeze import Safe  # adafreeze

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

safe = Safe(model, optimizer=optimizer, probe=batches, total_steps=EPOCHS * len(batches))  # adafreeze
model.train()
for epoch in range(EPOCHS):
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()  # adafreeze
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {safe.logs()['safe/frozen_prefix']} blocks frozen")
print("frozen:", sorted(safe.frozen))
safe.close()  # adafreeze: removes all hooks from the model
