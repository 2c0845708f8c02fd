"""docs/: what it lists is what there is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site_shows_the_examples_as_they_are_and_no_page_has_a_gap():
    pages = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    shown = [name for text in pages.values() for name in re.findall(r'^--8<-- "examples/(.+)"$', text, re.MULTILINE)]
    assert set(shown) == {path.name for path in (ROOT / "examples").glob("*.py")} - {"vit.py"}
    assert not [path for path, text in pages.items() if "@@" in text]
