"""The documentation shows every example and cites every result."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def test_the_site_includes_all_examples_and_no_page_has_a_placeholder():
    shown = [name for text in PAGES.values() for name in re.findall(r'^--8<-- "examples/(.+)"$', text, re.MULTILINE)]
    assert set(shown) == {path.name for path in (ROOT / "examples").glob("*.py")} - {"vit.py"}
    assert not [path for path, text in PAGES.items() if "@@" in text]


def test_every_result_is_cited_and_every_cited_result_exists():
    results = {path.name for path in (ROOT / "benchmarks/results").iterdir()}
    cited = {name for text in PAGES.values() for name in re.findall(r"[\w-]+\.json\b", text)}
    assert results <= cited
    assert {name for name in cited if name.startswith("paper")} <= results
