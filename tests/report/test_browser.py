"""The page in headless Chromium."""

import re
import shutil
import subprocess

import pytest

from adafreeze.report import write_report
from report_cases import write_run

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

# Moves the pointer over every shape and records missing tooltips, clipped text and overflow.
PROBE = """
<script>
const said = [];
for (const shape of document.querySelectorAll("[data-tip]")) {
  const box = shape.getBoundingClientRect();
  shape.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: box.left, clientY: box.top}));
  const tip = document.getElementById("tip"), at = tip.getBoundingClientRect();
  if (tip.style.display !== "block" || tip.textContent !== shape.dataset.tip) said.push("no tip: " + shape.dataset.tip);
  if (at.left < 0 || at.right > window.innerWidth || at.top < 0) said.push("tip outside: " + shape.dataset.tip);
}
for (const text of document.querySelectorAll("svg text")) {
  const box = text.getBoundingClientRect(), whole = text.closest("svg").getBoundingClientRect();
  if (box.left < whole.left - 1 || box.right > whole.right + 1 || box.bottom > whole.bottom + 1) {
    said.push("clipped: " + text.textContent);
  }
}
for (const drawing of document.querySelectorAll("svg[role=img]")) {
  if (drawing.getBoundingClientRect().height < 40) said.push("flat: " + drawing.getAttribute("aria-label"));
}
if (document.documentElement.scrollWidth > window.innerWidth) said.push("wider than the window");
document.body.dataset.said = JSON.stringify(said);
document.body.dataset.shapes = document.querySelectorAll("[data-tip]").length;
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = write_run(folder / "mine", blocks=12), write_run(folder / "a-run-with-a-rather-long-name", "plain")
    return write_report(runs, folder / "report.html")


def browse(page, *flags):
    """The document after its scripts ran, and the messages on the console."""
    call = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *flags,
            f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("flags", [("--window-size=1100,900",), ("--window-size=500,800", "--force-dark-mode")])
def test_every_value_can_be_hovered_and_nothing_is_clipped(page, flags):
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    document, console = browse(probed, *flags)
    assert console == []
    assert 'data-said="[]"' in document, re.search(r'data-said="([^"]*)"', document)
    assert int(re.search(r'data-shapes="(\d+)"', document)[1]) > 100


def test_the_page_blocks_requests(page):
    leaking = page.with_name("leaking.html")
    leaking.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    _, console = browse(leaking)
    assert any(
        "Content Security Policy" in line for line in console
    )  # shows that the empty console above is meaningful


def test_every_chart_has_a_text_and_data(page):
    document, _ = browse(page)
    charts = re.findall(r"<figure.*?</figure>", document, re.S)
    assert len(charts) == 6
    for chart in charts:
        assert 'role="img"' in chart
        assert re.search(r'aria-label="[^"]+"', chart)
        assert re.search(r'download="[\w-]+\.csv" href="data:text/csv;base64,', chart)
