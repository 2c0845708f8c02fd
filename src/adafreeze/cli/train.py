"""``adafreeze train``: data, model, adapter, Trainer, and what they leave in the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, warn
from ..train.adapter import peft_config
from ..train.arguments import Arguments, parse
from ..train.output import JOURNAL_FILE, clear_run, find_checkpoint, prepare_folder, write_config, write_page
from ..train.tasks import make_task, rows_of

if TYPE_CHECKING:
    from transformers import Trainer

    from ..methods import Method, Outcome, Setup
    from ..tasks import Task

__all__ = ["fit_length", "main", "run"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run."""
    import sys

    arguments = parse(list(sys.argv[1:] if argv is None else argv))
    run(arguments)
    if arguments.training.process_index == 0:
        folder = Path(str(arguments.training.output_dir)).expanduser()
        write_page(folder, [folder])
    return 0


def run(
    arguments: Arguments, *, method: Method | None = None, found: Mapping[str, Outcome] | None = None
) -> dict[str, Any]:
    """Train, evaluate, save; returns all metrics.

    Args:
        arguments: all settings.
        method: what trains, in the place of ``arguments.method``.
        found: results of the methods that it needs, by name.

    Raises:
        AdafreezeError: the input cannot be used; nothing has been trained yet.
    """
    from transformers import set_seed

    from ..journal import Journal
    from ..methods import Method, Setup
    from ..tasks import Source, add_adapter, load_splits
    from ..tasks.adapters import head_names, optimizer_steps
    from ..tasks.data import load_validation

    model_args, data, training = arguments.model, arguments.data, arguments.training
    assert training.output_dir is not None  # parse() asks for it
    task = make_task(data)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    is_main = training.process_index == 0
    if is_main:  # one process looks: the others would find what it has just written
        folder = prepare_folder(training.output_dir, overwrite=arguments.run.overwrite_output_dir, resume=checkpoint)

    # Cheapest first, so that a typing error is answered in seconds: data, tokenizer, model, adapter.
    place = rows_of(data)
    reading: dict[str, Any] = {
        "skip_bad_rows": data.skip_bad_rows,
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    with training.main_process_first(desc="reading the data"):
        train_rows, eval_rows = load_splits(
            task,
            **place,
            train_split=data.train_split,
            max_train_samples=data.max_train_samples,
            max_eval_samples=data.max_eval_samples,
            seed=training.seed,
            **reading,
        )
        mismatched_rows = None
        if data.task_name == "mnli":
            mismatched_rows = load_validation(
                task,
                "validation_mismatched",
                path=data.validation_mismatched_file,
                dataset_name=place["dataset_name"],
                dataset_config_name=place["dataset_config_name"],
                max_samples=data.max_eval_samples,
                **reading,
            )
    _check_evaluation(training, task, eval_rows)
    source = Source(
        name=model_args.model_name_or_path,
        tokenizer=model_args.tokenizer_name,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
        dtype=model_args.dtype,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
    )
    adapter = peft_config(arguments.adapter, task.peft_task_type, optimizer_steps(training, len(train_rows)))
    processor = task.load_processor(source)
    set_seed(training.seed)  # the new head and the adapter are drawn from it
    base = task.load_model(source)
    fit_length(task, base, processor, {"max_seq_length": data.max_seq_length, "block_size": data.block_size})
    if task.peft_task_type is None and getattr(adapter, "modules_to_save", None) is None:
        adapter.modules_to_save = head_names(base)  # type: ignore[attr-defined]
    method = method or Method()
    parts: dict[str, Any] = {"training": training, "adapter": adapter, "base": base}
    setup = Setup(arguments.safe, arguments.freezing, task.collator(processor), found=found or {}, **parts)
    method.configure(setup)
    model: Any = add_adapter(base, setup.adapter)
    with training.main_process_first(desc="tokenizing"):
        train_rows = task.prepare(train_rows, processor)
        if getattr(adapter, "total_step", None) is not None:  # a row may have become several
            adapter.total_step = optimizer_steps(training, len(train_rows))  # type: ignore[attr-defined]
        eval_rows = task.prepare_evaluation(eval_rows, processor) if eval_rows is not None else None
    setup.rows = train_rows
    method.prepare(model, setup)

    if is_main:
        if checkpoint is None:
            clear_run(folder)
            write_config(folder, arguments.resolved)
        journal = Journal(folder / JOURNAL_FILE)
    else:
        journal = Journal()
    name = getattr(method, "name", arguments.method)
    begins = {"command": "train", "method": name, "task": task.name, "settings": arguments.resolved}
    if checkpoint is None:
        journal.write("run", **begins)
    resumed = None if checkpoint is None else {**begins, "checkpoint": checkpoint}
    trainer = _make_trainer(setup, arguments.run.count_costs, task, model, processor, eval_rows, journal, resumed)
    metrics = _train(trainer, checkpoint)
    if eval_rows is not None:
        scores = trainer.evaluate()
        if mismatched_rows is not None:
            rows = task.prepare_evaluation(mismatched_rows, processor)
            for name, value in trainer.evaluate(rows, metric_key_prefix="eval_mm").items():
                if name != "epoch":
                    scores[f"{name.replace('eval_mm_', 'eval_')}_mm"] = value
        if "eval_perplexity" in scores:
            scores["perplexity"] = scores["eval_perplexity"]  # as run_clm calls it
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)
        metrics.update(scores)
    journal.write("done", step=trainer.state.global_step, **metrics)
    journal.close()
    if is_main:
        print(f"The adapter is in {folder}, the journal of the run in {folder / JOURNAL_FILE}.")
    return metrics


def _make_trainer(
    setup: Setup,
    count_costs: bool,
    task: Task,
    model: Any,
    processor: Any,
    eval_rows: Any,
    journal: Any,
    resumed: dict[str, Any] | None,
) -> Trainer:
    from ..train.trainer import JournalCallback, MeteredTrainer, RankAllocationCallback, meter_of

    callbacks: list[Any] = [RankAllocationCallback(), *setup.callbacks]
    safe_callback: Any = None
    if setup.safe is not None:
        from ..integrations.transformers import SafeCallback

        safe_callback = SafeCallback(setup.safe, journal=journal)
        callbacks.append(safe_callback)
    meter = meter_of(model, safe_callback, setup.kinds) if count_costs else None
    # Behind SafeCallback, which adds to what is logged.
    callbacks.append(JournalCallback(journal, resumed, rewinds=safe_callback is None, meter=meter))
    training = setup.training
    # The callbacks are made here, from the flags: the Trainer could not make them.
    training.restore_callback_states_from_checkpoint = False
    if training.label_names is None:
        # Trainer cannot read them off a PeftModel, and then evaluates no metric.
        training.label_names = list(task.label_names)
    try:
        trainer = MeteredTrainer(
            model=model,
            args=training,
            train_dataset=setup.rows,
            eval_dataset=eval_rows,
            processing_class=processor,
            data_collator=setup.collator,
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.preprocess_logits,
            callbacks=callbacks,
            optimizers=(setup.optimizer, None),
            meter=meter,
            score=task.score,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"The training arguments do not go together: {str(error).strip().splitlines()[0]}",
            cause="transformers.Trainer refuses them.",
            fix="Change the flag that it names; `adafreeze train --help` lists all flags.",
        ) from error
    trainer.safe_callback = safe_callback  # type: ignore[attr-defined]
    trainer.view = _watch(trainer)  # type: ignore[attr-defined]
    return trainer


def _watch(trainer: Any) -> Any:
    """A live view in the place of the progress bar and its lines, where somebody watches; None elsewhere."""
    from rich.console import Console
    from transformers import ProgressCallback

    from ..train.live import LiveView, is_watched

    console = Console()
    if trainer.args.disable_tqdm or not is_watched(console):
        return None
    trainer.remove_callback(ProgressCallback)
    view = LiveView(lambda: getattr(trainer.safe_callback, "safe", None), console)
    trainer.add_callback(view)
    return view


def _train(trainer: Any, checkpoint: str | None) -> dict[str, Any]:
    """Train and save: adapter, tokenizer, and metrics under the names that transformers' scripts use."""
    try:
        metrics = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    finally:
        if trainer.view is not None:
            trainer.view.close()
    metrics["train_samples"] = len(trainer.train_dataset)
    if trainer.meter is not None:
        metrics.update({f"train_{name}": value for name, value in trainer.meter.summary().items()})
    safe = getattr(trainer.safe_callback, "safe", None)
    if safe is not None:
        metrics["frozen_units"] = len(safe.frozen)
        metrics["score_flops"] = safe.flops_spent
        for event in safe.journal.events:
            if event["event"] == "cache":
                found = event["hits"] + event["advanced"]
                metrics["cache_hit_rate"] = found / (found + event["misses"])
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def _check_evaluation(training: Any, task: Task, eval_rows: Any) -> None:
    wants = str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no" or training.do_eval
    if wants and eval_rows is None:
        raise ConfigError(
            "An evaluation is asked for, but there is nothing to evaluate on.",
            cause="--eval_strategy or --do_eval is given without validation data.",
            fix="--validation_file validation.csv, or --validation_split 0.1",
        )
    # The second name is that of transformers 4.57.
    grouped = getattr(training, "train_sampling_strategy", "") == "group_by_length"
    if eval_rows is not None and task.scored_in_order and (grouped or getattr(training, "group_by_length", False)):
        raise ConfigError(
            f"Rows grouped by length cannot be evaluated by --task {task.name}.",
            cause="Trainer groups the rows of an evaluation too, and predictions then belong to other rows.",
            fix="--train_sampling_strategy random",
        )


def fit_length(task: Task, model: Any, tokenizer: Any, asked: dict[str, int | None]) -> None:
    """Keep rows within what the model can read, where torch would only say "index out of range"."""
    if task.max_length is None:  # no tokens
        return
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {rows} embeddings.",
            cause="They do not belong together.",
            fix="Leave out --tokenizer_name, or give the one that the model was trained with.",
        )
    positions = getattr(model.config, "max_position_embeddings", None) or task.max_length
    limit = min(tokenizer.model_max_length, positions)
    for flag, length in asked.items():
        if length is not None and length > limit:
            warn(
                f"Rows are cut to {limit} tokens, not {length}.",
                cause="The model reads no more.",
                fix=f"--{flag} {limit}",
            )
    task.max_length = min(task.max_length, limit)
