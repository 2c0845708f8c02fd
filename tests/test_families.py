"""Over families that differ in kind, adafreeze changes nothing but what freezing means.

benchmarks/families.py makes the whole table; this runs its functions on some of the rows.
"""

import gc
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def imported():
    """benchmarks/families.py as a module; its folder is on the path for no longer than that takes."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("families")
    finally:
        sys.path.remove(str(BENCHMARKS))


benchmark = imported()
KNOWN = {family.key: family for family in benchmark.families()}
CHOSEN = [
    "nn.TransformerEncoder, batch first | own module",
    "nn.TransformerEncoder, sequence first | own module",
    "bi-encoder, two calls | own module",
    "SimCSE's shape | own module",
    "luke | LukeForEntityPairClassification",
    "wav2vec2, layer drop 0.3 | CTC",
    "qwen2_5_vl, LoRA in the language model | image-text-to-text",
    "qwen2_vl, rows with and without pictures | image-text-to-text",
    "llava, LoRA in the language model | image-text-to-text",
    "bert | sequence classification",
    "modernbert | masked LM",
    "xlnet | sequence classification",
    "funnel | sequence classification",
    "deberta-v2 | multiple choice",
    "llama | causal LM",
    "gpt2 | causal LM",
    "mixtral | causal LM",
    "gemma3n_text | causal LM",
    "gemma4_text | causal LM",
    "mamba | causal LM",
    "t5 | seq2seq LM",
    "bart | seq2seq LM",
    "vit | image classification",
    "swin | image classification",
    "whisper | speech seq2seq",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared, and with several threads kernels sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_garbage_from_before():
    """Each Trainer collects garbage at its end: to walk all that the suite has imported takes longer than training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("key", CHOSEN)
def test_a_family_trains_as_without_adafreeze_but_for_what_freezing_means(key):
    row = benchmark.examine(KNOWN[key])
    assert row["verdict"] in ("served", "prefix without cache", "frozen without prefix", "refused"), row["reason"]
    assert row["verdict"] == "served" or row["reason"]


class TestTheInstrumentFinds:
    """What must be called a fault is called one; arms as a run would leave them."""

    def arms(self, **changed):
        weights = {"lora_A": torch.ones(2)}
        common = {"losses": [3.0, 2.0, 1.0], "weights": weights, "moved": 1.0}
        froze = {"first_freeze": 0, "frozen": ["a"], "prefixes": {"layers": 1}, "hits": 8}
        arms = {
            "control": common,
            "later": common | {"first_freeze": 2},
            "defaults": common | froze,
            "uncached": common | froze | {"hits": 0},
        }
        for name, fields in changed.items():
            arms[name] = arms[name] | fields
        return {name: benchmark.Arm(**fields) for name, fields in arms.items()}

    def faults(self, **changed):
        return benchmark.faults_of(self.arms(**changed), {})

    def test_nothing_where_there_is_nothing(self):
        assert self.faults() == []

    def test_one_bit_before_the_first_freeze_and_nothing_after_it(self):
        assert self.faults(later={"losses": [3.0, 2.0000002, 1.0]}) != []
        assert self.faults(later={"losses": [3.0, 2.0, 1.5]}) == []

    def test_losses_or_adapters_that_differ_with_the_cache_by_more_than_rounding(self):
        assert self.faults(defaults={"losses": [3.0, 2.0, 1.00001]}) == []
        assert self.faults(defaults={"losses": [3.0, 2.0, 1.001]}) != []
        assert self.faults(defaults={"weights": {"lora_A": torch.tensor([1.0, 1.1])}}) != []

    def test_a_crash_but_no_refusal(self):
        crash = {"error": "RuntimeError: shape (after 3 steps)"}
        assert self.faults(defaults=crash) != []
        refusal = {"error": "ModelError: no stack", "refused": True}
        assert self.faults(later=refusal, defaults=refusal, uncached=refusal) == []

    def test_a_run_that_ends_early_or_gives_no_number(self):
        assert self.faults(defaults={"losses": [3.0, 2.0]}) != []
        both = {"losses": [3.0, 2.0, float("nan")]}
        assert self.faults(defaults=both, uncached=both) != []

    def test_a_benefit_that_is_missing_without_a_word(self):
        silent = {"prefixes": {"layers": 0}, "hits": 0}
        assert self.faults(defaults=silent) != []
        assert self.faults(defaults=silent | {"messages": ["No prefix: a projector trains below it."]}) == []
        assert self.faults(defaults=silent | {"messages": ["Step 0 of 9: 2 of 6 units are frozen"]}) != []

    def test_arms_that_froze_different_units(self):
        assert self.faults(defaults={"frozen": ["a", "b"]}) != []


def test_the_page_shows_the_table_as_it_is():
    content = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.PAGE.read_text() == benchmark.page(content)
