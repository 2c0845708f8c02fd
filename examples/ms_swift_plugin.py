r"""A plugin for ms-swift: with it, ``--callbacks adafreeze`` freezes adapters.

    python examples/tiny_llama.py
    swift sft --external_plugins examples/ms_swift_plugin.py --callbacks adafreeze \
        --model runs/tiny_llama --model_type llama --template dummy --dataset runs/counting.jsonl \
        --tuner_type lora --target_modules all-linear --torch_dtype float32 --num_train_epochs 4 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 1e-2 \
        --lr_scheduler_type constant --logging_steps 1 --save_strategy epoch --report_to none \
        --output_dir runs/ms_swift --add_version false

The first line writes the model and the rows.
"""

from pathlib import Path

from swift.callbacks import callbacks_map

from adafreeze import SafeCallback, SafeConfig

config = SafeConfig()  # the settings of the run


def callback(args, trainer):
    """As ms-swift calls it: a SafeCallback, with its journal in the run's folder."""
    return SafeCallback(config, journal=Path(args.output_dir) / "journal.jsonl")


callbacks_map["adafreeze"] = callback
