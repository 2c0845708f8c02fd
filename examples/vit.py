"""Images: a ViT under a memory budget from the first step (a plain step would use 7 MiB).

    python examples/vit.py

Is the picture reddish or bluish?
"""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, set_seed

from adafreeze import Safe, SafeConfig  # adafreeze

EPOCHS = 4
set_seed(0)
pictures = torch.rand(256, 3, 32, 32)
labels = torch.arange(256) % 2
pictures[labels == 1, 0] += 0.5
pictures[labels == 0, 2] += 0.5
rows = [{"pixel_values": picture, "labels": label} for picture, label in zip(pictures, labels, strict=True)]
batches = DataLoader(rows, batch_size=16, shuffle=True)

config = ViTConfig(
    image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
)
model = get_peft_model(
    ViTForImageClassification(config),
    LoraConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"]),
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

settings = SafeConfig(memory_budget="5MiB")  # adafreeze
safe = Safe(model, settings, optimizer=optimizer, probe=batches, total_steps=EPOCHS * len(batches))  # adafreeze
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
safe.close()  # adafreeze
