"""A loop on Accelerate, in one or more processes.

    torchrun --nproc_per_node 2 examples/accelerate_loop.py   # on GPUs: accelerate launch

All processes freeze the same adapters at the same step.
"""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from adafreeze.integrations.accelerate import AcceleratedSafe  # adafreeze

EPOCHS = 4
set_seed(0)
accelerator = Accelerator(cpu=True)
starts = torch.randint(0, 60, (512, 1))
ids = 3 + (starts + torch.arange(12)) % 60  # counting up from a random start
batches = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=16, shuffle=True)

config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

safe = AcceleratedSafe(accelerator, model, optimizer, batches, total_steps=EPOCHS * len(batches))  # adafreeze
model.train()
for epoch in range(EPOCHS):
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            safe.step()  # adafreeze
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
accelerator.print("processes:", accelerator.num_processes)
accelerator.print("frozen:", sorted(safe.frozen))
safe.close()  # adafreeze
accelerator.end_training()
