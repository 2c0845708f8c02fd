"""A small Llama with random weights, its tokenizer, and 256 rows, for the tools that take folders and files.

    python examples/tiny_llama.py

It writes runs/tiny_llama (the model) and runs/counting.jsonl (the rows). The tokenizer has one word per token, so
nothing is downloaded.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

set_seed(0)
words = ["<unk>", "<pad>", "<bos>", "<eos>", *(str(number) for number in range(60))]
vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
vocabulary.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=vocabulary, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=1, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained("runs/tiny_llama")
tokenizer.save_pretrained("runs/tiny_llama")
rows = [{"text": " ".join(str((start + step) % 60) for step in range(5 + start % 11))} for start in range(256)]
Path("runs/counting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
