"""One rank of a fit with Lightning: python lightning_worker.py FOLDER NAME ... (see RUNS)."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from launch import tell
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from worker import CONFIG, History, weights

import cases
from adafreeze import SafeConfig
from adafreeze.integrations.lightning import AdapterFreezing

EPOCHS = 6
RUNS = {"whole": {}, "resumed": {"resume": "whole"}, "accumulate": {"accumulate": 3}}


class Module(LightningModule):
    """A tiny model as a LightningModule."""

    def __init__(self, family: str, dropout: float) -> None:
        super().__init__()
        self.model = cases.lora_model(family, dropout=dropout)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        live = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(live, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 500)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class HistoryCallback(Callback):
    """Adds to a ``History`` after each batch, and records a logged value."""

    def __init__(self, freezing, history) -> None:
        self.freezing, self.history, self.logged = freezing, history, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.history.add(self.freezing.safe, pl_module.model)
        self.logged.append(trainer.callback_metrics.get("safe/frozen_units"))


def fit(
    folder: Path, name: str, *, family="llama", dropout=0.0, rows=3, accumulate=1, resume=None, ranks=1, config=None,
    **settings,
):  # fmt: skip
    """A fit with a checkpoint after each epoch, or one resumed from the run ``resume``."""
    seed_everything(3, verbose=False)
    module = Module(family, dropout)
    freezing = AdapterFreezing(SafeConfig(**{**CONFIG, **(config or {})}))
    history = History()
    callback = HistoryCallback(freezing, history)
    keep = ModelCheckpoint(folder / name, save_top_k=-1, every_n_epochs=1)
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=EPOCHS, logger=False,
        callbacks=[freezing, callback, keep], enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate, log_every_n_steps=1, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    # Lightning saves no random state, and shuffles before a callback can restore one.
    data = DataLoader(cases.Samples(family, 18, 12), rows, collate_fn=cases.collate, generator=torch.Generator())
    trainer.fit(module, data, ckpt_path=resume and folder / resume / f"epoch=2-step={9 * 2 // ranks}.ckpt")
    safe = freezing.safe
    return {
        "history": history.frozen, "moved": history.moved, "weights": weights(module.model), "steps": safe.steps,
        "global_step": trainer.global_step, "total": safe.total_steps, "parallel": safe.parallel.name,
        "events": [event["event"] for event in safe.journal.events], "logged": float(callback.logged[-1]),
        "trainable": sum(p.requires_grad for p in module.parameters()),
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in names:
        os.environ["WORLD_SIZE"] = ranks  # Lightning removes it when a fit ends
        tell(folder, name, int(rank), **fit(folder, name, ranks=int(ranks), **RUNS[name]))


if __name__ == "__main__":
    main()
