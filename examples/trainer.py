"""transformers' Trainer: one line added.

    python examples/trainer.py

Does a sentence contain token 7? A BERT of six blocks with random weights learns it with LoRA from 512 rows.
"""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from adafreeze import SafeCallback  # adafreeze

set_seed(0)
ids = torch.randint(8, 64, (512, 12))
labels = torch.arange(512) % 2
ids[labels == 1, 5] = 7
rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")

config = BertConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_labels=2
)
adapters = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
model = get_peft_model(BertForSequenceClassification(config), adapters)

safe = SafeCallback()  # adafreeze
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/trainer",
        num_train_epochs=4,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        logging_steps=32,
        save_strategy="no",
        report_to=[],  # "tensorboard", "wandb", ... also get safe/frozen_prefix and the other scalars
        use_cpu=True,
    ),
    train_dataset=rows,
    callbacks=[safe],  # adafreeze
)
trainer.train()
print("frozen:", sorted(safe.safe.frozen))
