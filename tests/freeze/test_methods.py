"""A freeze is permanent in every PEFT method with adapters in each block."""

import warnings
from contextlib import nullcontext

import peft
import pytest
import torch

import cases
from adafreeze import ModelError, Safe, SafeConfig

ATTENTION = ["q_proj", "v_proj"]
METHODS = {
    "LORA": ("LoraConfig", {"r": 4, "lora_dropout": 0.1}),
    "DORA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "ADALORA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 50}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VERA": ("VeraConfig", {"r": 4}),
    "PVERA": ("PveraConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "r": 0}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "LOHA": ("LoHaConfig", {"r": 4}),
    "LOKR": ("LoKrConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 16}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 16, "vector_length": 8, "topk": 2, "r": 2}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "MISS": ("MissConfig", {"r": 4}),
    "RANDLORA": ("RandLoraConfig", {}),
    "ROAD": ("RoadConfig", {"group_size": 8}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "SHIRA": ("ShiraConfig", {"r": 1}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 16}),
    "DELORA": ("DeloraConfig", {}),
    "GRALORA": ("GraloraConfig", {}),
    "OSF": ("OSFConfig", {}),
    "HIRA": ("HiraConfig", {}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "PEANUT": ("PeanutConfig", {}),
    "LILY": ("LilyConfig", {}),
    "GLORA": ("GloraConfig", {}),
    "BEFT": ("BeftConfig", {}),
    "DEFT": ("DeftConfig", {}),
    "SUPERTUNING": ("SupertuningConfig", {}),
    "ADAMSS": ("AdamssConfig", {}),
}
SHARING = {"VBLORA", "LILY"}  # shared parameters stay live until all units freeze, so there is no prefix before


def adapted(method: str) -> torch.nn.Module:
    kind, settings = METHODS[method]
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    torch.manual_seed(0)
    config = getattr(peft, kind)(**{"target_modules": ATTENTION, **settings})
    return peft.get_peft_model(cases.base_model("llama"), config).train()


def nothing(model: torch.nn.Module) -> None: ...


def disable_adapter(model: torch.nn.Module) -> None:
    with model.disable_adapter(), torch.no_grad():
        model(**cases.batch("llama"))


def set_adapter(model: torch.nn.Module) -> None:
    model.set_adapter("default")


def train_mode(model: torch.nn.Module) -> None:
    model.eval()
    model.train()


def reference_pass(model: torch.nn.Module) -> None:
    trl = pytest.importorskip("trl.trainer.utils")
    use_adapter = getattr(trl, "use_adapter", None) or pytest.importorskip("trl.models.utils").use_adapter
    with torch.no_grad(), use_adapter(model, None):
        model(**cases.batch("llama"))


def enable_layers(model: torch.nn.Module) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


@pytest.mark.parametrize("method", METHODS)
def test_a_freeze_survives_everything_that_undoes_one(method):
    model = adapted(method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    expected = pytest.warns(UserWarning, match="share parameters") if method in SHARING else nullcontext()
    with expected:
        safe = Safe(model, optimizer=optimizer, probe=cases.loader("llama"), total_steps=100)

    def step() -> None:
        model.train()
        model(**cases.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        safe.step()

    step()
    step()
    names = list(safe.units)[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AdaLoRA's rank allocation ends
        safe.freeze(names)
    live = {id(p) for n, u in safe.units.items() if n not in names for p in (*u.parameters(), *u.shared_parameters())}
    frozen = [p for name in names for p in safe.units[name].parameters()]
    assert frozen and not live & set(map(id, frozen))
    before = [p.detach().clone() for p in frozen]
    moved = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    requires_grad = []
    boundary = (
        safe.stacks[0]
        .blocks[1]
        .register_forward_hook(
            lambda _m, _i, output: (
                requires_grad.append(cases.first_tensor(output).requires_grad)
                if torch.is_grad_enabled()  # not while measuring
                else None
            )
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # units are frozen again
        for between in (nothing, disable_adapter, set_adapter, train_mode, reference_pass, enable_layers):
            between(model)
            requires_grad.clear()
            step()
            assert requires_grad == [method in SHARING], between.__name__
    boundary.remove()

    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert all(p.grad is None and not p.requires_grad and p not in optimizer.state for p in frozen)
    assert any(
        not torch.equal(a, b) for a, b in zip(moved, [p for p in model.parameters() if p.requires_grad], strict=True)
    )
    assert safe.prefixes["model.layers"] == (0 if method in SHARING else 2)
    safe.close()
    assert all(p.requires_grad for p in frozen)


@pytest.mark.parametrize("kind", ["TinyLoraConfig", "UniLoraConfig"])
def test_one_parameter_shared_by_all_blocks_is_refused(kind):
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    model = peft.get_peft_model(cases.base_model("llama"), getattr(peft, kind)(target_modules=ATTENTION))
    with pytest.raises(ModelError, match="are shared by all its blocks"):
        Safe(model, probe=cases.loader("llama"), total_steps=10)


def test_shared_parameters_freeze_with_their_last_owner():
    model = adapted("VBLORA")
    with pytest.warns(UserWarning, match="share parameters"):
        safe = Safe(model, SafeConfig(min_live_blocks=0), probe=cases.loader("llama"), total_steps=10)
    shared = next(iter(safe.units.values())).shared
    assert shared
    names = list(safe.units)
    safe.freeze(names[:3])
    assert all(module._parameters[name].requires_grad for module, name in shared)
    safe.freeze(names[3:])
    assert not any(module._parameters[name].requires_grad for module, name in shared)
    assert safe.prefixes["model.layers"] == 4


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 4}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
        ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
        ("TrainableTokensConfig", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    ],
)
def test_methods_outside_the_blocks_are_refused(kind, settings):
    model = peft.get_peft_model(cases.base_model("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    with pytest.raises(ModelError, match="is of type") as caught:
        Safe(model, probe=cases.loader("llama"), total_steps=10)
    assert "Fix:" in str(caught.value)


def test_adalora_stops_allocating_ranks_at_the_first_freeze():
    model = adapted("ADALORA")
    safe = Safe(model, probe=cases.loader("llama"), total_steps=10)
    assert not safe.frozen  # otherwise no rank would ever move
    model(**cases.batch("llama")).loss.backward()
    model.base_model.update_and_allocate(1)
    with pytest.warns(UserWarning, match="rank allocation ends"):
        safe.freeze(list(safe.units)[:1])
    model.base_model.update_and_allocate(2)  # without adafreeze it fails on a gradient of None
    safe.close()
    assert "update_and_allocate" not in model.base_model.__dict__
