"""Nothing that adafreeze reads is ever unpickled: a pickle in the place of a file does not run."""

from __future__ import annotations

import ast
import base64
import pickle
from pathlib import Path

import pytest
import torch
import xxhash

import adafreeze
import cases
from adafreeze import AdafreezeWarning, ConfigError, Journal, RunError, Safe, SafeConfig, read_journal
from adafreeze.cache.tiers import DiskTier, Entry
from adafreeze.integrations.checkpoints import check_checkpoint
from adafreeze.loop.state import sealed
from adafreeze.train.arguments import parse

SOURCE = Path(adafreeze.__file__).parent


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trap(tmp_path):
    """A pickle, which the test must not have run at its end."""
    trace = tmp_path / "trace"
    pickled = pickle.dumps(Trap(trace))
    pickle.loads(pickled)
    assert trace.exists()  # it does what it is feared for
    trace.unlink()
    yield pickled
    assert not trace.exists()


def start(**settings) -> Safe:
    model = cases.lora_model("llama")
    return Safe(model, SafeConfig(cache="off", **settings), probe=cases.loader("llama", 16), total_steps=20)


def test_a_state(trap):
    for state in (trap, bytearray(trap), trap.decode("latin-1")):
        with pytest.raises(RunError, match="without a version"):
            start().load_state_dict(state)


def test_the_tensors_in_a_state(trap):
    safe = start(score="weight_change")
    safe.model(**cases.batch("llama"))
    safe.step()
    state = safe.state_dict()
    state["deciding"]["scorer"]["references"] = base64.b64encode(trap).decode()
    with pytest.warns(AdafreezeWarning, match="could not be measured"):
        start(score="weight_change").load_state_dict(sealed(state))


def test_the_random_state_in_a_state(trap):
    state = start().state_dict()
    state["random"]["cpu"] = base64.b64encode(trap).decode()
    with pytest.raises(RuntimeError, match="RNG state"):
        start().load_state_dict(sealed(state))


def test_a_trainer_state(trap, tmp_path):
    (tmp_path / "trainer_state.json").write_bytes(trap)
    with pytest.raises(RunError, match="not valid JSON"):
        check_checkpoint(tmp_path)


def test_a_journal(trap, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(trap)
    assert list(read_journal(path)) == []
    journal = Journal(path)
    journal.write("freeze", step=3)
    journal.close()
    assert [event["event"] for event in read_journal(path)] == ["freeze"]


def test_a_value_of_the_disk_cache(trap, tmp_path):
    pytest.importorskip("lmdb")
    tier, keys = DiskTier(tmp_path / "tier", 2**20), [bytes([n]) * 16 for n in range(3)]
    tier.put([(key, Entry(bytes(16), (1,), (torch.ones(2, 3),))) for key in keys])
    forged = bytes(16) + b"\x01\x00\x01\x00" + trap
    with tier._environment.begin(write=True) as transaction:
        transaction.put(keys[0], trap)
        transaction.put(keys[1], xxhash.xxh3_128_digest(keys[1] + forged) + forged)  # with the checksum it should have
    found = tier.get(keys)
    assert found[:2] == [None, None] and torch.equal(found[2].states[0], torch.ones(2, 3))
    assert tier.damaged == 2
    tier.close()


def test_the_file_of_the_disk_cache(trap, tmp_path):
    pytest.importorskip("lmdb")
    (tmp_path / "tier").mkdir()
    (tmp_path / "tier" / "data.mdb").write_bytes(trap * 200)
    tier = DiskTier(tmp_path / "tier", 2**20)
    assert list(tier.stored_keys()) == []  # thrown away, and made anew
    tier.close()


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_a_config_file(trap, tmp_path, name):
    (tmp_path / name).write_bytes(trap)
    with pytest.raises(ConfigError):
        parse(["--config", str(tmp_path / name), "--output_dir", str(tmp_path / "out")])
    (tmp_path / name).write_text(f"seed: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'trace'}]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse(["--config", str(tmp_path / name), "--output_dir", str(tmp_path / "out")])


# And no code that could.

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXECUTORS = {"eval", "exec", "compile", "__import__"}
SAFE_ONLY_WITH = {"torch.load": "weights_only=True"}
NEVER = {
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("pandas.read_pickle", "pd.read_pickle", "torch.package.PackageImporter"),
}


def dangers(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [name for name in names if module.split(".")[0] in UNPICKLERS]
            found += [name for name in names if name in NEVER or name in SAFE_ONLY_WITH]  # under a name of their own
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords]
            if called in EXECUTORS or called in NEVER or "allow_pickle=True" in given:
                found.append(called)
            if called in SAFE_ONLY_WITH and SAFE_ONLY_WITH[called] not in given:
                found.append(called)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_line_can_run_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "pd.read_pickle(path)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
    ],
)
def test_such_a_line_would_be_found(text):
    assert dangers(text)


@pytest.mark.parametrize("text", ["model.eval()", "torch.load(p, weights_only=True)", "yaml.safe_load(t)"])
def test_what_is_harmless_is_not(text):
    assert dangers(text) == []
