from __future__ import annotations

import pytest
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, TrainingArguments

from adafreeze.errors import ConfigError
from adafreeze.tasks import adapter_names, add_adapter
from adafreeze.tasks.adapters import make_config, optimizer_steps
from text_cases import save_bert

# Settings that a model of width 16 needs.
SETTINGS = {
    "adalora": {"total_steps": 10},
    "boft": {"options": {"boft_block_size": 4}},
    "c3a": {"options": {"block_size": 4}},
    "fourierft": {"options": {"n_frequency": 4}},
    "oft": {"options": {"oft_block_size": 4, "r": 0}},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"options": {"group_size": 8}},
    "shira": {"r": 2},
    "vblora": {"options": {"vector_length": 4, "num_vectors": 8}},
    "waveft": {"options": {"n_frequency": 4}},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("name", adapter_names())
def test_every_tuner_has_a_name(bert, name):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    config = make_config(name, "SEQ_CLS", target_modules=["query", "value"], **SETTINGS.get(name, {}))
    adapted = add_adapter(model, config)
    live = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    shared = {"lily", "tinylora", "unilora", "vblora"}  # their weights are outside the blocks
    assert any(".layer.0." in key for key in live) or name in shared


@pytest.mark.parametrize("layers", [2, [0, 2]])
def test_layers_to_transform_beyond_the_model_raise(bert, layers):
    config = make_config("lora", "SEQ_CLS", target_modules=["query"], options={"layers_to_transform": layers})
    with pytest.raises(ConfigError, match="names block 2, and the last of BertForSequenceClassification is 1"):
        add_adapter(AutoModelForSequenceClassification.from_pretrained(bert), config)


@pytest.mark.parametrize("name", ["lora", "loha", "oft"])
def test_all_linear_leaves_out_the_head_of_question_answering(bert, name):
    config = make_config(name, "QUESTION_ANS", target_modules=["all-linear"], **SETTINGS.get(name, {}))
    adapted = add_adapter(AutoModelForQuestionAnswering.from_pretrained(bert), config)
    head = {key for key, parameter in adapted.named_parameters() if "qa_outputs" in key and parameter.requires_grad}
    assert head == {f"base_model.model.qa_outputs.modules_to_save.default.{part}" for part in ("weight", "bias")}


def test_an_error_of_peft_names_adapter_and_model(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    with pytest.raises(ConfigError, match=r"PEFT cannot add miss to Bert.*in_features"):
        add_adapter(model, make_config("miss", "SEQ_CLS", r=64, target_modules=["query"]))


@pytest.mark.parametrize(
    ("name", "alpha", "dropout"),
    [
        ("lora", "lora_alpha", "lora_dropout"),
        ("loha", "alpha", "module_dropout"),
        ("randlora", "randlora_alpha", "randlora_dropout"),
    ],
)
def test_scaling_and_dropout_find_the_methods_own_field(name, alpha, dropout):
    config = make_config(name, "SEQ_CLS", alpha=3, dropout=0.25)
    assert getattr(config, alpha) == 3 and getattr(config, dropout) == 0.25


def test_adalora_takes_rank_and_steps():
    config = make_config("adalora", "SEQ_CLS", r=6, total_steps=50)
    assert config.init_r == 6 and config.total_step == 50


def test_one_pattern_is_a_pattern_and_names_are_names():
    assert make_config("lora", "SEQ_CLS", target_modules=[r".*\.query"]).target_modules == r".*\.query"
    assert make_config("lora", "SEQ_CLS", target_modules=["all-linear"]).target_modules == "all-linear"
    assert make_config("lora", "SEQ_CLS", target_modules=["query"]).target_modules == {"query"}


def test_prompt_methods_have_no_weights_in_blocks():
    with pytest.raises(ConfigError, match="no adapter 'prefix_tuning'"):
        make_config("prefix_tuning", "CAUSAL_LM")


def test_a_model_unknown_to_peft_needs_target_modules(bert, monkeypatch):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    monkeypatch.setattr(type(model.config), "model_type", "nobody")
    with pytest.raises(
        ConfigError, match=r"(?s)specify `target_modules`.*linear layers are query, key.*--target_modules query key"
    ):
        add_adapter(model, make_config("lora", "SEQ_CLS"))


@pytest.mark.parametrize(
    ("flags", "rows", "steps"),
    [
        ({"max_steps": 7}, 99, 7),
        ({"gradient_accumulation_steps": 2}, 9, 6),
        ({"dataloader_drop_last": True}, 9, 6),
    ],
)
def test_optimizer_steps_are_those_of_trainer(tmp_path, flags, rows, steps):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, use_cpu=True, **flags)
    assert optimizer_steps(args, rows) == steps
