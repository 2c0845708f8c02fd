"""sentence-transformers on pairs of texts: the same line as in a Trainer.

    pip install sentence-transformers
    python examples/sentence_transformers_pairs.py

The model is built here, with random weights, so nothing is downloaded.
"""

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from adafreeze import SafeCallback  # adafreeze

set_seed(0)
words = ["<pad>", *(str(number) for number in range(60)), *(f"n{number}" for number in range(60))]
vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
vocabulary.pre_tokenizer = WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>").save_pretrained("runs/tiny-bert")
BertModel(
    BertConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=16,
    )
).save_pretrained("runs/tiny-bert")  # fmt: skip

pairs = [[(start + step) % 60 for step in range(4)] for start in range(60)]
data = Dataset.from_dict(
    {
        "anchor": [" ".join(map(str, numbers)) for numbers in pairs for _ in range(4)],
        "positive": [" ".join(f"n{number}" for number in numbers) for numbers in pairs for _ in range(4)],
    }
)
model = SentenceTransformer("runs/tiny-bert", device="cpu")
model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules="all-linear"))
safe = SafeCallback()  # adafreeze
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir="runs/sentence_transformers_pairs",
        num_train_epochs=2,
        per_device_train_batch_size=16,
        batch_sampler="no_duplicates",
        learning_rate=1e-2,
        logging_steps=16,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=data,
    loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=8),
    callbacks=[safe],  # adafreeze
)
trainer.train()
print("frozen:", sorted(safe.safe.frozen))
