"""TRL's SFTTrainer on a Llama: the same line as in a Trainer.

    pip install trl
    python examples/trl_sft.py

The tokenizer is built here, one word per token, so nothing is downloaded.
"""

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from adafreeze import SafeCallback  # adafreeze

set_seed(0)
words = ["<pad>", "<bos>", "<eos>", *(str(number) for number in range(60))]
vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
vocabulary.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
)
counting = [" ".join(str((start + step) % 60) for step in range(10)) for start in range(256)]

config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
safe = SafeCallback()  # adafreeze
trainer = SFTTrainer(
    model=LlamaForCausalLM(config),
    args=SFTConfig(
        output_dir="runs/trl_sft",
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_length=16,
        logging_steps=32,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"text": counting}),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    callbacks=[safe],  # adafreeze
)
trainer.train()
print("frozen:", sorted(safe.safe.frozen))
