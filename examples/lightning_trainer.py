"""Lightning: one callback, no change to the LightningModule.

    pip install lightning
    python examples/lightning_trainer.py

The model and the rows of examples/trainer.py.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from adafreeze.integrations.lightning import AdapterFreezing  # adafreeze


class Classifier(LightningModule):
    """A LightningModule with one PEFT model in it."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
        )
        adapters = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        self.model = get_peft_model(BertForSequenceClassification(config), adapters)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Loss of one batch."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


seed_everything(0)
ids = torch.randint(8, 64, (512, 12))
labels = torch.arange(512) % 2
ids[labels == 1, 5] = 7
rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]

freezing = AdapterFreezing()  # adafreeze
trainer = Trainer(
    max_epochs=4,
    accelerator="cpu",
    logger=False,  # a logger also gets safe/frozen_units and the other scalars
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[freezing],  # adafreeze
)
trainer.fit(Classifier(), DataLoader(rows, batch_size=16, shuffle=True))
print("frozen:", sorted(freezing.safe.frozen))
