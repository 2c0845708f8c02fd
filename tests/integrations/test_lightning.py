"""AdapterFreezing in Lightning's Trainer, in one process and in two."""

import pickle

import pytest
import torch

pytest.importorskip("lightning")

import lightning_worker
from launch import found, start, wait
from lightning.pytorch import Callback, LightningModule, Trainer

import cases
from adafreeze import ModelError, RunError
from adafreeze.integrations.lightning import AdapterFreezing


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a finished run, shared by several tests."""
    folder = tmp_path_factory.mktemp("lightning")
    return folder, lightning_worker.fit(folder, "whole")


def host(folder, *callbacks, max_epochs=6):
    return Trainer(
        accelerator="cpu", max_epochs=max_epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=list(callbacks), default_root_dir=folder,
    )  # fmt: skip


def test_one_callback_freezes_logs_and_restores_the_module(llama):
    _, made = llama
    assert made["history"][-1] and not made["moved"]
    assert made["steps"] == made["global_step"] == made["total"]
    assert made["logged"] == len(made["history"][-1])
    assert made["trainable"] == 16 and made["events"][-1] == "close"


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.0), ("bert", 0.1)])
def test_a_resumed_fit_is_bit_identical(llama, tmp_path, family, dropout):
    folder, whole = llama
    settings = {"family": family, "dropout": dropout}
    if family != "llama":
        folder, whole = tmp_path, lightning_worker.fit(tmp_path, "whole", **settings)
    resumed = lightning_worker.fit(folder, "resumed", resume="whole", **settings)
    assert whole["history"][17] and "resume" in resumed["events"]
    assert resumed["history"] == whole["history"][18:]
    assert resumed["weights"] == whole["weights"]


def test_accumulation_and_mixed_precision(tmp_path):
    # Gradient norms exist only after the closure that Lightning passes to the optimizer.
    config = {"score": "grad_norm"}
    made = lightning_worker.fit(tmp_path, "run", accumulate=3, precision="bf16-mixed", config=config)
    assert made["history"][-1] and not made["moved"]
    assert made["steps"] == made["global_step"] == made["total"] == len(made["history"]) / 3


def test_gradients_are_read_after_the_closure(tmp_path):
    class Listening(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            scorer = freezing.safe.decider.scorer
            if scorer is not None and trainer.global_step == 2:
                heard.update(scorer._gradients)
                made.update({name: list(unit.parameters()) for name, unit in freezing.safe.units.items()})
                norms.update({n: sum(float(p.grad.pow(2).sum()) for p in ps) ** 0.5 for n, ps in made.items()})
                trainer.should_stop = True

    heard, made, norms = {}, {}, {}
    freezing = AdapterFreezing(
        lightning_worker.SafeConfig(**lightning_worker.CONFIG, score="grad_norm", freeze_at_start=0)
    )
    trainer = host(tmp_path, Listening(), freezing)
    trainer.fit(lightning_worker.Module("llama", 0.0), cases.loader("llama", 18, 3, length=12))
    assert norms and heard == pytest.approx(norms)


def test_two_ranks_under_ddp(tmp_path):
    wait(start("lightning_worker.py", 2, tmp_path, *lightning_worker.RUNS), tmp_path)
    for name in lightning_worker.RUNS:
        first, second = found(tmp_path, name, 0), found(tmp_path, name, 1)
        assert first["parallel"] == "DDP" and first["history"][-1]
        assert first["history"] == second["history"]
        assert first["weights"] == second["weights"]
        assert not first["moved"] and not second["moved"]
        assert first["steps"] == first["global_step"] == first["total"]
    whole, resumed = found(tmp_path, "whole"), found(tmp_path, "resumed")
    assert whole["history"][8] and resumed["history"] == whole["history"][9:]
    assert resumed["weights"] == whole["weights"]


def test_an_exception_restores_the_module(tmp_path):
    class Failing(lightning_worker.Module):
        def training_step(self, batch, index):
            if freezing.safe.frozen:
                raise KeyError("data")
            return super().training_step(batch, index)

    freezing = AdapterFreezing(lightning_worker.SafeConfig(**lightning_worker.CONFIG))
    module = Failing("llama", 0.0)
    trainer = host(tmp_path, freezing)
    with pytest.raises(KeyError):
        trainer.fit(module, cases.loader("llama", 18, 3, length=12))
    assert freezing.safe.frozen
    assert sum(p.requires_grad for p in module.parameters()) == 16
    assert not any("forward" in part.__dict__ for part in module.model.modules())


def test_it_resumes_for_longer_than_planned_and_fits_twice(tmp_path, caplog):
    def fit(callback, epochs, **more):
        torch.manual_seed(3)
        trainer = host(tmp_path, callback, max_epochs=epochs)
        trainer.fit(lightning_worker.Module("llama", 0.0), cases.loader("llama", 18, 3, length=12), **more)
        return trainer

    def measured(callback):
        return [e["step"] for e in callback.safe.journal.events if e["event"] == "measure"]

    config = lightning_worker.SafeConfig(warmup=0.5, ramp_end=0.7, freeze_at_start=0, overhead=1.0)
    twice = AdapterFreezing(config)
    fit(twice, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(twice, 6)
    control, longer = measured(twice), AdapterFreezing()
    with caplog.at_level("INFO", logger="adafreeze"):
        fit(longer, 6, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert "Resumed at step 12 with 36 steps now, 12 planned then" in caplog.text
    assert longer.safe.config == twice.safe.config and longer.safe.steps == twice.safe.steps == 36
    assert measured(longer) == [step for step in control if step > 12]
    assert longer.safe.frozen >= twice.safe.frozen


def test_a_module_without_exactly_one_adapted_model_is_rejected(tmp_path):
    class Plain(LightningModule):
        def __init__(self, *models):
            super().__init__()
            self.models = torch.nn.ModuleList(models)

        def training_step(self, batch, index):
            return self.models[0](**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    class ByHand(Plain):
        def __init__(self, *models):
            super().__init__(*models)
            self.automatic_optimization = False

    def fit(module):
        host(tmp_path, AdapterFreezing(), max_epochs=1).fit(module, cases.loader("bert", 4, 4))

    with pytest.raises(ModelError, match="Plain has 0 models with PEFT adapters"):
        fit(Plain(cases.base_model("bert")))
    with pytest.raises(ModelError, match="Plain has 2 models"):
        fit(Plain(cases.lora_model("bert"), cases.lora_model("llama")))
    with pytest.raises(RunError, match="automatic_optimization=False"):
        fit(ByHand(cases.lora_model("bert")))


def test_it_is_a_lightning_callback():
    assert issubclass(AdapterFreezing, Callback)
    assert pickle.loads(pickle.dumps(AdapterFreezing)) is AdapterFreezing
    assert "callbacks=[AdapterFreezing()]" in AdapterFreezing.__doc__
