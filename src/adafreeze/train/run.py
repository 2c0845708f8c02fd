"""One run: data, model, adapter, Trainer, and the files in the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..errors import ConfigError
from ..integrations.transformers import SafeCallback
from ..journal import Journal
from ..methods import Method, Setup
from ..tasks import add_adapter
from ..tasks.adapters import config_from_flags, head_names, optimizer_steps
from .arguments import Arguments, contradiction
from .inputs import load_base, load_rows, make_task
from .live import add_live_view
from .output import JOURNAL_FILE, clear_run, find_checkpoint, prepare_folder, write_config
from .trainer import JournalCallback, MeteredTrainer, RankAllocationCallback, meter_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..methods import Outcome
    from ..tasks import Task

__all__ = ["Prepared", "make_trainer", "prepare", "train"]


def train(
    arguments: Arguments, *, method: Method | None = None, found: Mapping[str, Outcome] | None = None
) -> dict[str, Any]:
    """Train, evaluate and save; returns all metrics.

    Args:
        arguments: all settings.
        method: how to train, instead of ``arguments.method``.
        found: results of the methods in ``method.after``, by name.

    Raises:
        AdafreezeError: the input cannot be used; nothing has been trained yet.
    """
    training, folder = arguments.training, arguments.folder
    checkpoint, is_main = find_checkpoint(training.resume_from_checkpoint, folder), training.process_index == 0
    if is_main:  # the other processes would find the files of this one
        prepare_folder(folder, overwrite=arguments.run.overwrite_output_dir, resume=checkpoint)
    method = method or Method()
    made = prepare(arguments, method, found or {})
    setup, task, model, eval_rows = made.setup, made.task, made.model, made.eval_rows

    if is_main and checkpoint is None:
        clear_run(folder)
        write_config(folder, arguments.resolved)
    journal = Journal(folder / JOURNAL_FILE if is_main else None)
    name = getattr(method, "name", arguments.method)
    begins = {"command": "train", "method": name, "task": task.name, "settings": arguments.resolved}
    resumed = None if checkpoint is None else {**begins, "checkpoint": checkpoint}
    if resumed is None:
        journal.write("run", **begins)

    safe = SafeCallback(setup.safe, journal=journal) if setup.safe is not None else None
    meter = meter_of(model, safe, setup.kinds) if arguments.run.count_costs else None
    # JournalCallback is last, because SafeCallback adds to the logs.
    callbacks = [RankAllocationCallback(), *setup.callbacks, *([safe] if safe is not None else [])]
    callbacks.append(JournalCallback(journal, resumed, rewinds=safe is None, meter=meter))
    trainer = make_trainer(made, callbacks, meter=meter)
    metrics = _fit(trainer, setup.rows, safe, checkpoint)
    if eval_rows is not None:
        scores = trainer.evaluate()
        if made.mismatched is not None:
            others = trainer.evaluate(made.mismatched, metric_key_prefix="eval_mm")
            scores |= {f"{n.replace('eval_mm_', 'eval_')}_mm": value for n, value in others.items() if n != "epoch"}
        if "eval_perplexity" in scores:
            scores["perplexity"] = scores["eval_perplexity"]  # the name in run_clm
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)
        metrics.update(scores)
    journal.write("done", step=trainer.state.global_step, **metrics)
    journal.close()
    if is_main:
        print(f"Adapter: {folder}\nJournal: {folder / JOURNAL_FILE}")
    return metrics


@dataclass
class Prepared:
    """A run that is ready to start: its task, model and rows."""

    setup: Setup
    task: Task
    model: Any
    processor: Any
    eval_rows: Any
    mismatched: Any


def prepare(arguments: Arguments, method: Method, found: Mapping[str, Outcome]) -> Prepared:
    """Read data and model, add the adapters and tokenize; raises as ``train``."""
    training, task = arguments.training, make_task(arguments.data)
    # Cheapest first, so that a typing error fails in seconds: data, tokenizer, model, adapter.
    with training.main_process_first(desc="reading the data"):
        train_rows, eval_rows, mismatched = load_rows(task, arguments)
    _check_evaluation(training, task, has_rows=eval_rows is not None)
    steps = optimizer_steps(training, len(train_rows))
    adapter: Any = config_from_flags(vars(arguments.adapter), task.peft_task_type, steps)
    base, processor = load_base(task, arguments)
    if task.peft_task_type is None and getattr(adapter, "modules_to_save", None) is None:
        adapter.modules_to_save = head_names(base)
    setup = Setup(
        safe=arguments.safe,
        settings=arguments.freezing,
        collator=task.collator(processor),
        training=training,
        adapter=adapter,
        base=base,
        found=found,
    )
    method.configure(setup)
    model: Any = add_adapter(base, setup.adapter)
    with training.main_process_first(desc="tokenizing"):
        setup.rows = task.prepare(train_rows, processor)
        if getattr(adapter, "total_step", None) is not None:  # one row may have become several
            adapter.total_step = optimizer_steps(training, len(setup.rows))
        eval_rows, mismatched = (
            task.prepare_evaluation(rows, processor) if rows is not None else None for rows in (eval_rows, mismatched)
        )
    method.prepare(model, setup)
    return Prepared(setup, task, model, processor, eval_rows, mismatched)


def make_trainer(made: Prepared, callbacks: list[TrainerCallback], **options: Any) -> MeteredTrainer:
    """The Trainer of a run.

    Raises:
        ConfigError: transformers refuses its arguments.
    """
    setup, task = made.setup, made.task
    training = setup.training
    # True would make the callbacks from the checkpoint; these are made from the flags.
    training.restore_callback_states_from_checkpoint = False
    if training.label_names is None:
        # Trainer cannot infer them from a PeftModel, and then computes no metrics.
        training.label_names = list(task.label_names)
    try:
        return MeteredTrainer(
            args=training,
            train_dataset=setup.rows,
            data_collator=setup.collator,
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.preprocess_logits,
            callbacks=callbacks,
            optimizers=(setup.optimizer, None),
            score=task.score,
            model=made.model,
            eval_dataset=made.eval_rows,
            processing_class=made.processor,
            **options,
        )
    except (ValueError, ImportError) as error:
        raise contradiction(error) from error


def _fit(
    trainer: MeteredTrainer, rows: Sized, safe_callback: SafeCallback | None, checkpoint: str | None
) -> dict[str, Any]:
    """Train and save: adapter, tokenizer, and metrics under the names in transformers' scripts."""
    view = add_live_view(trainer, lambda: getattr(safe_callback, "safe", None))
    try:
        metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    finally:
        if view is not None:
            view.close()
    metrics["train_samples"] = len(rows)
    if trainer.meter is not None:
        metrics.update({f"train_{name}": value for name, value in trainer.meter.summary().items()})
    safe = getattr(safe_callback, "safe", None)
    if safe is not None:
        metrics |= {"frozen_units": len(safe.frozen), "score_flops": safe.flops_spent}
        for event in safe.journal.events:
            if event["event"] == "cache":
                found = event["hits"] + event["advanced"]
                metrics["cache_hit_rate"] = found / max(1, found + event["misses"])
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def _check_evaluation(training: TrainingArguments, task: Task, *, has_rows: bool) -> None:
    wants = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no" or training.do_eval
    if wants and not has_rows:
        raise ConfigError(
            "--eval_strategy or --do_eval is given, but there is nothing to evaluate on.",
            fix="--validation_file validation.csv, or --validation_split 0.1",
        )
    # The second name is that of transformers 4.57.
    grouped = getattr(training, "train_sampling_strategy", "") == "group_by_length"
    if has_rows and task.scored_in_order and (grouped or getattr(training, "group_by_length", False)):
        raise ConfigError(
            f"Rows grouped by length cannot be evaluated by --task {task.name}: Trainer would assign predictions to "
            "the wrong rows.",
            fix="--train_sampling_strategy random",
        )
