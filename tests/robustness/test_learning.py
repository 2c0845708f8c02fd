"""Freezing never takes away all that learns: blocks that the loss does not read, blocks that are left out by chance."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, Wav2Vec2Config, Wav2Vec2ForCTC

from adafreeze import AdafreezeWarning, ConfigError, Safe, SafeConfig
from cached_run import BLOCKS, config, counts, epochs, train
from cases import lora_model


class ReadsBlock(nn.Module):
    """A head that reads what the lowest ``depth`` blocks of a BERT make, and nothing of the others."""

    def __init__(self, depth):
        super().__init__()
        torch.manual_seed(0)
        inner = lora_model("bert", BLOCKS, dropout=0.0).base_model.model.bert
        self.embeddings, self.encoder, self.depth = inner.embeddings, inner.encoder, depth
        self.head = nn.Linear(32, 2).requires_grad_(False)

    def forward(self, input_ids, labels, **_):
        hidden = read = self.embeddings(input_ids=input_ids)
        for number, block in enumerate(self.encoder.layer):
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            read = hidden if number < self.depth else read
        logits = self.head(read.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "last": hidden}


def reads_block(depth):
    return ReadsBlock(depth).train()


@pytest.fixture
def told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AdafreezeWarning)
        yield caught


def losses_and_weights(model, batches, settings=None, **safe_arguments):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    safe = None
    if settings is not None:
        safe = Safe(model, settings, optimizer=optimizer, probe=batches[:2], total_steps=len(batches), **safe_arguments)
    torch.manual_seed(3)
    losses = []
    for one in batches:
        loss = model(**one)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if safe is not None:
            safe.step()
    return losses, [p.detach().clone() for p in trained], safe


def test_the_block_that_the_loss_reads_stays_live():
    batches = list(epochs("bert", epochs=6))
    settings = SafeConfig(freeze_at_start=0.3, policy="bottom_up", freeze_share=1.0, warmup=0.2, ramp_end=0.4)
    model = reads_block(3)
    losses, _, safe = losses_and_weights(model, batches, settings)
    names = list(safe.units)
    assert set(names[:2]) <= safe.frozen and names[2] not in safe.frozen
    assert len(losses) == len(batches) and losses[-1] != losses[-2]
    safe.close()


def test_freezing_everything_the_loss_reads_at_the_start_is_undone_before_the_first_step(caplog):
    batches = list(epochs("bert", epochs=6))
    with caplog.at_level("INFO", "adafreeze"):
        losses, weights, safe = losses_and_weights(reads_block(1), batches, SafeConfig(freeze_at_start=0.5, lr_scale=1))
    assert not safe.frozen and not any(safe.prefixes.values())
    assert "depends on none of the blocks above" in caplog.text
    (thaw,) = [event for event in safe.journal.events if event["event"] == "thaw"]
    assert thaw["step"] == 0 and thaw["frozen"] == 0 and thaw["units"] == list(safe.units)[:2]
    assert sum(event["event"] == "freeze" for event in safe.journal.events) == 1
    safe.close()
    expected, others, _ = losses_and_weights(reads_block(1), batches)
    assert losses == expected and all(map(torch.equal, weights, others))


def test_freezing_everything_the_loss_reads_by_hand_is_an_error():
    settings = SafeConfig(freeze=("encoder.layer.0",), freeze_at_start=0)
    with pytest.raises(ConfigError, match="the loss has no gradient"):
        losses_and_weights(reads_block(1), list(epochs("bert")), settings)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_a_model_whose_adapters_get_no_gradient_trains_as_without_adafreeze(told):
    """A kernel without a backward pass stands above them: no error of ours may end what ran before."""
    batches = list(epochs("bert", epochs=4))

    def model():
        made = reads_block(BLOCKS)
        made.head = nn.Sequential(made.head)
        made.head.register_forward_pre_hook(lambda _, args: _Cut.apply(args[0]))
        return made

    with_safe, weights, safe = losses_and_weights(model(), batches, SafeConfig())
    without, others, _ = losses_and_weights(model(), batches)
    assert with_safe == without and not safe.frozen and not any(safe.prefixes.values())
    assert all(map(torch.equal, weights, others))
    (message,) = [str(w.message) for w in told if "no live unit has a gradient" in str(w.message)]
    assert "All units train again" in message
    safe.close()


def test_layer_drop_of_all_live_blocks_does_not_end_the_run():
    torch.manual_seed(0)
    settings = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, layerdrop=0.7, vocab_size=12, mask_time_prob=0.0, ctc_zero_infinity=True,
    )  # fmt: skip
    model = get_peft_model(Wav2Vec2ForCTC(settings), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_values": torch.randn(2, 800, generator=generator),
            "labels": torch.randint(1, 12, (2, 3), generator=generator),
        }
        for _ in range(24)
    ]
    losses, _, safe = losses_and_weights(model, batches, SafeConfig(freeze_at_start=0.6, freeze_share=0.9))
    assert len(losses) == 24 and safe.frozen
    assert not any(event["event"] == "thaw" for event in safe.journal.events)
    safe.close()


def test_a_checkpoint_keeps_which_units_have_learned():
    batches = list(epochs("bert", epochs=6))
    _, _, safe = losses_and_weights(reads_block(3), batches, SafeConfig(freeze_at_start=0))
    state = safe.state_dict()
    safe.close()
    again = Safe(reads_block(3), SafeConfig(freeze_at_start=0), probe=batches[:2], total_steps=len(batches))
    again.load_state_dict(state)
    assert again._watch.learning == set(list(again.units)[:3])
    again.close()


# A stack that only some passes call.


class TwoTowers(nn.Module):
    """A tower for pictures before a decoder; most batches have none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.tower = BertModel(BertConfig(num_hidden_layers=3, **small, **dropout), add_pooling_layer=False)
        self.decoder = GPT2LMHeadModel(
            GPT2Config(
                n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
        )

    def forward(self, input_ids, labels, pictures=None, **_):
        embeddings = self.decoder.transformer.wte(input_ids)
        if pictures is not None:
            embeddings = torch.cat([self.tower(pictures).last_hidden_state[:, :2], embeddings[:, 2:]], 1)
        return self.decoder(inputs_embeds=embeddings, labels=labels)


def test_batches_without_images_are_served_beside_a_frozen_vision_tower():
    batches = [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in epochs("llama", epochs=4)]

    def run(cache):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["query", "c_attn"])
        model = get_peft_model(TwoTowers(), lora).train()
        return train("llama", config({1: 5}, cache=cache), batches, model=model)

    cached, without = run("ram"), run("off")
    assert cached[0] == pytest.approx(without[0], rel=1e-5)
    depths = [event["prefixes"] for event in cached[2].journal.events if event["event"] == "freeze"][-1]
    assert all(depths.values()) and counts(cached[2])[0] >= 8


def test_batch_norm_that_takes_no_single_sample_does_not_end_the_run():
    batches = list(epochs("bert", epochs=2))

    def model():
        made = reads_block(BLOCKS)
        made.head = nn.Sequential(nn.BatchNorm1d(32, affine=False), made.head).train()
        return made

    losses, _, safe = losses_and_weights(model(), batches[:3], SafeConfig())
    assert len(losses) == 3 and safe.frozen
    safe.close()


def test_a_step_without_gradients_does_not_end_a_run_in_which_nothing_is_frozen():
    model = lora_model("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    probe = list(epochs("bert", epochs=1))
    safe = Safe(model.train(), SafeConfig(freeze_at_start=0), optimizer=optimizer, probe=probe, total_steps=9)
    optimizer.step()
    safe.step()
    assert not safe.frozen
    safe.close()
