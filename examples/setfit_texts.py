"""SetFit, few texts per class: the same line as in a Trainer.

    pip install setfit
    python examples/setfit_texts.py

The model is built here, with random weights, so nothing is downloaded.
"""

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from adafreeze import SafeCallback  # adafreeze

set_seed(0)
words = ["<pad>", *(str(number) for number in range(60))]
vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
vocabulary.pre_tokenizer = WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>").save_pretrained("runs/tiny-bert")
BertModel(
    BertConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=16,
    )
).save_pretrained("runs/tiny-bert")  # fmt: skip

texts = [" ".join(str((start + step) % 60) for step in range(6)) for start in range(32)]
body = SentenceTransformer("runs/tiny-bert", device="cpu")
body.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules="all-linear"))
model = SetFitModel(model_body=body, model_head=LogisticRegression())
safe = SafeCallback()  # adafreeze
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/setfit_texts", num_epochs=1, batch_size=16, body_learning_rate=1e-3, report_to="none"
    ),
    train_dataset=Dataset.from_dict({"text": texts, "label": [start // 8 for start in range(32)]}),
    callbacks=[safe],  # adafreeze
)
trainer.train()
print(model.predict(texts[:4]))
print("frozen:", sorted(safe.safe.frozen))
