"""docs/: what it lists is what there is."""

import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

import adafreeze
import cases
from adafreeze import AdafreezeError, AdafreezeWarning, Safe, SafeConfig, plan
from adafreeze.cli import main
from adafreeze.decide.cka import CKAReference
from adafreeze.model import probe
from adafreeze.sizes import parse_size
from adafreeze.tasks.data import load_file

ROOT = Path(__file__).parents[1]
SOURCE = Path(adafreeze.__file__).parent
LISTING = runpy.run_path(str(ROOT / "docs" / "messages.py"))


def test_the_list_of_messages_is_that_of_the_source():
    assert LISTING["PAGE"].read_text() == LISTING["page"](), "run: python docs/messages.py"


def test_the_site_shows_the_examples_as_they_are_and_no_page_has_a_gap():
    pages = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    shown = [name for text in pages.values() for name in re.findall(r'^--8<-- "examples/(.+)"$', text, re.MULTILINE)]
    assert set(shown) == {path.name for path in (ROOT / "examples").glob("*.py")} - {"vit.py"}
    assert not [path for path, text in pages.items() if "@@" in text]


def test_no_place_that_speaks_is_missing_from_the_list():
    text = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name != "errors.py")
    speaking = re.findall(r"\b(?:Config|Data|Model|Probe|Run)Error\(|\bwarn(?:_once)?\(|\bnote\(", text)
    assert len(LISTING["messages"]()) == len(speaking) - len(
        re.findall(r"def warn_once\(| warn\(fact, cause=cause,", text)
    )
    assert len(speaking) > 200


def is_listed(said: str, kind: str) -> bool:
    """Whether what was said is an entry of the list, at the place that it names."""
    fact = said.splitlines()[0]
    link, place = re.search(r"^  More:  (\S+)#(\S+)$", said, re.MULTILINE).groups()
    entry = (ROOT / link).read_text().split(f'<a id="{place}"></a>')[1].split("<a id")[0]
    templates = re.findall(rf"^\*\*(.*)\*\* \({kind}\)$", entry, re.MULTILINE)
    # ‹what is filled in› may be anything, [what depends on the case] may be missing
    fixed = [re.split(r"‹[^›]*›|\[[^\]]*\]", template.replace("\\", "")) for template in templates]
    return any(re.fullmatch(".*".join(map(re.escape, parts)), fact) for parts in fixed)


@pytest.mark.parametrize(
    "fail",
    [
        lambda: SafeConfig(cache="x"),
        lambda: SafeConfig(warmup=3),
        lambda: SafeConfig.from_dict({"nothing": 1}),
        lambda: parse_size("memory_budget", "6 GoB"),
        lambda: CKAReference(torch.zeros(1, 2)),
        lambda: plan("nowhere/at/all"),
        lambda: load_file("nowhere.csv"),
    ],
)
def test_an_error_names_its_entry_in_the_list(fail):
    with pytest.raises(AdafreezeError) as caught:
        fail()
    assert is_listed(str(caught.value), type(caught.value).__name__)
    other = str(caught.value).replace(caught.value.fact, "Nothing of the kind.")
    assert not is_listed(other, type(caught.value).__name__)


def test_a_warning_names_its_entry_in_the_list():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(probe.split({"input_ids": torch.tensor([[5, 6, 0], [5, 6, 7]])}, pad_token_id=0))
    assert [is_listed(str(one.message), "warning") for one in caught] == [True]


def test_a_warning_of_the_guard_names_its_entry_in_the_list():
    model = cases.lora_model("llama")
    safe = Safe(model, SafeConfig(freeze=("model.layers.0",)), probe=cases.loader("llama"), total_steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for parameter in safe.units["model.layers.0"].parameters():
            parameter.requires_grad_(True)
        safe.model(**cases.batch("llama"))
    assert [is_listed(str(one.message), "warning") for one in caught if one.category is AdafreezeWarning] == [True]


def test_the_command_line_names_the_entry_too(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    assert is_listed(capsys.readouterr().err.removeprefix("error: "), "RunError")


def test_an_error_of_other_code_names_no_entry():
    assert "More:" not in str(AdafreezeError("A fact.", cause="A cause.", fix="A fix."))
