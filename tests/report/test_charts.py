import base64
import math
import xml.etree.ElementTree as ET

from adafreeze.report.charts import Caption, Curve, bands, heat_map, lines, thin

WORDS = Caption("name", "A <title> & more", "What is seen.")


def shapes(chart, kind):
    return ET.fromstring(chart.svg).findall(f".//{kind}")


def test_every_point_is_drawn_with_a_tooltip_and_in_the_csv():
    chart = lines(WORDS, [Curve("a", [(0, 1.0), (10, 3.0)]), Curve('b"<', [(5, 2.0)])], marks=[4, 400])
    assert [point.get("data-tip") for point in shapes(chart, "circle")] == [
        "a: 1 at step 0",
        "a: 3 at step 10",
        'b"<: 2 at step 5',
    ]
    assert sum(line.get("class") == "mark" for line in shapes(chart, "line")) == 1
    data = base64.b64decode(chart.link.partition(",")[2]).decode().splitlines()
    assert data[:2] == ["curve,step,value", "a,0,1.0"]
    assert len({color for _, color, _ in chart.legend}) == 2


def test_points_are_placed_by_value():
    first, middle, last = shapes(lines(WORDS, [Curve("a", [(0, 0), (5, 1), (10, 4)])]), "circle")
    assert float(first.get("cx")) < float(middle.get("cx")) < float(last.get("cx"))
    rise = [float(first.get("cy")) - float(p.get("cy")) for p in (middle, last)]
    assert math.isclose(rise[1], 4 * rise[0], abs_tol=0.3)


def test_one_point_and_equal_values_can_be_drawn():
    assert shapes(lines(WORDS, [Curve("a", [(3, 7.0)])]), "circle")
    assert len(shapes(lines(WORDS, [Curve("a", [(0, 7.0), (1, 7.0)])]), "circle")) == 2
    assert shapes(lines(WORDS, [Curve("a", [(0, 0.0), (1, 0.0)])]), "circle")


def test_a_long_curve_keeps_its_peaks():
    values = [(i, 100.0 if i == 77_777 else -50.0 if i == 5 else 0.0) for i in range(200_000)]
    kept = thin(values)
    assert len(kept) <= 402
    assert {(77_777, 100.0), (5, -50.0)} <= set(kept)
    assert kept == sorted(kept)
    assert len(lines(WORDS, [Curve("a", values)]).svg) < 100_000


def test_a_heat_map_is_darker_where_scores_are_higher_and_marks_freezes():
    chart = heat_map(WORDS, ["low", "high"], [1, 2], [[0.0, math.nan], [0.1, 0.4]], [2, None])
    cells = {cell.get("data-tip"): cell for cell in shapes(chart, "rect")}
    assert set(cells) == {
        "low, step 1: 0",
        "low, step 2: not measured, frozen",
        "high, step 1: 0.1",
        "high, step 2: 0.4",
    }
    shades = [float(cells[name].get("fill-opacity")) for name in ("low, step 1: 0", "high, step 1: 0.1")]
    assert shades[0] < shades[1] < float(cells["high, step 2: 0.4"].get("fill-opacity")) == 1
    assert float(cells["low, step 1: 0"].get("y")) > float(cells["high, step 1: 0.1"].get("y"))  # bottom up
    assert sum(line.get("class") == "freeze" for line in shapes(chart, "line")) == 1


def test_a_heat_map_of_many_measurements_keeps_its_peaks():
    row = [0.1] * 1000
    row[777] = 0.9
    chart = heat_map(WORDS, ["a"], list(range(1000)), [row], [998])
    cells = shapes(chart, "rect")
    assert len(cells) == 160
    peak = next(cell for cell in cells if cell.get("fill-opacity") == "1.000")
    assert peak.get("data-tip") == "a, step 777: 0.9"
    assert "a,777,0.9" in chart.csv
    freeze = next(line for line in shapes(chart, "line") if line.get("class") == "freeze")
    assert float(freeze.get("x1")) == float(cells[-1].get("x"))  # the cell that contains step 998


def test_twelve_curves_have_different_styles():
    chart = lines(WORDS, [Curve(str(i), [(0, i), (1, i)]) for i in range(12)])
    assert len({(color, dash) for _, color, dash in chart.legend}) == 12
    drawn = [(line.get("stroke"), line.get("stroke-dasharray")) for line in shapes(chart, "polyline")]
    assert drawn == [(color, dash) for _, color, dash in chart.legend]


def test_a_heat_map_of_many_units_stays_small():
    rows = [f"u{i}" for i in range(500)]
    chart = heat_map(WORDS, rows, list(range(1000)), [[0.5] * 1000] * 500, [None] * 500)
    assert len(shapes(chart, "rect")) <= 6500


def test_bands_have_a_color_for_each_state():
    spans = [[(0, 10, "trains"), (10, 40, "frozen")], [(0, 40, "trains")]]
    chart = bands(WORDS, ["0", "1"], spans, ("trains", "frozen", "never"), 40)
    assert [(label, dash) for label, _, dash in chart.legend] == [("trains", None), ("frozen", None)]
    first, second, third = shapes(chart, "rect")
    assert math.isclose(3 * float(first.get("width")), float(second.get("width")), rel_tol=0.01)
    assert first.get("fill") == third.get("fill") != second.get("fill")
