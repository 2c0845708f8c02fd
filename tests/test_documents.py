"""The documentation shows every example and cites every result."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def test_the_site_includes_all_examples_and_no_page_has_a_placeholder():
    shown = [name for text in PAGES.values() for name in re.findall(r'^--8<-- "examples/(.+)"$', text, re.MULTILINE)]
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".yaml")}
    assert set(shown) == examples - {"vit.py", "tiny_llama.py"}
    assert not [path for path, text in PAGES.items() if "@@" in text]


def test_the_tour_is_the_output_of_its_script():
    page = (ROOT / "docs/tour.md").read_text()
    cells = re.split(r"^# %%.*\n", (ROOT / "docs/tour.py").read_text(), flags=re.MULTILINE)[1:]
    texts = [cell for cell in cells if cell.startswith("# ")]
    written = [
        "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.split("\n")).strip() for text in texts
    ]
    code = [cell.strip() for cell in cells if not cell.startswith("# ")]
    assert re.findall(r"^```python\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL) == code, "run nox -s tour"
    assert len(written) > 5 and all(text in page for text in written), "run nox -s tour"
    for picture in re.findall(r"\((tour_files/.+?)\)", page):
        assert (ROOT / "docs" / picture).is_file()


def test_every_result_is_cited_and_every_cited_result_exists():
    results = {path.name for path in (ROOT / "benchmarks/results").iterdir()}
    cited = {name for text in PAGES.values() for name in re.findall(r"[\w-]+\.json\b", text)}
    assert results <= cited
    assert {name for name in cited if name.startswith("paper")} <= results
