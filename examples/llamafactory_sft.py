"""LLaMA-Factory's supervised fine-tuning of a Llama: one argument of ``run_exp``.

    pip install llamafactory
    python examples/llamafactory_sft.py

Model, tokenizer (one word per token) and data are made here, so nothing is downloaded. The settings are those of a
LLaMA-Factory YAML file; they are also written to one, for its command line without a script:

    adafreeze run llamafactory-cli train runs/llamafactory/train.yaml
"""

import json
from pathlib import Path

from llamafactory.train.tuner import run_exp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from adafreeze import SafeCallback  # adafreeze

folder = Path("runs/llamafactory").resolve()
folder.mkdir(parents=True, exist_ok=True)

set_seed(0)
words = ["<pad>", "<bos>", "<eos>", "Human:", "Assistant:", *(str(number) for number in range(60))]
vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
vocabulary.pre_tokenizer = WhitespaceSplit()
PreTrainedTokenizerFast(
    tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
).save_pretrained(folder / "model")
LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
).save_pretrained(folder / "model")  # fmt: skip

counting = [[str((start + step) % 60) for step in range(10)] for start in range(256)]
rows = [{"instruction": " ".join(row[:4]), "input": "", "output": " ".join(row[4:])} for row in counting]
(folder / "counting.json").write_text(json.dumps(rows))
(folder / "dataset_info.json").write_text(json.dumps({"counting": {"file_name": "counting.json"}}))

settings = {
    "model_name_or_path": str(folder / "model"),
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset_dir": str(folder),
    "dataset": "counting",
    "template": "default",
    "cutoff_len": 32,
    "output_dir": str(folder / "adapter"),
    "overwrite_output_dir": True,
    "num_train_epochs": 4.0,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}
(folder / "train.yaml").write_text(json.dumps(settings, indent=2))  # JSON is YAML
safe = SafeCallback()  # adafreeze
run_exp(settings, callbacks=[safe])  # adafreeze
print("frozen:", sorted(safe.safe.frozen))
