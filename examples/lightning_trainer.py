"""Lightning: one callback, and the LightningModule stays as it was.

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
    """Any module of yours whose parts include one model with adapters."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
        )
        adapters = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        self.model = get_peft_model(BertForSequenceClassification(config), adapters)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what trains."""
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
    logger=False,  # a logger of yours gets safe/frozen_units and the others too
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[freezing],  # adafreeze
)
trainer.fit(Classifier(), DataLoader(rows, batch_size=16, shuffle=True))
print("frozen:", sorted(freezing.safe.frozen))
