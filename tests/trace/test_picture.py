"""The picture of a trace shows the computed statistics."""

import io
import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from fluxmoe.errors import ConfigError, MissingDependencyError, TraceError
from fluxmoe.trace.picture import draw
from fluxmoe.trace.statistics import describe
from fluxmoe.trace.synth import Workload, write

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "t.parquet"
    write(Workload(3, 16, 4, 40, 4, seed=1), path)
    return describe(path)


def test_svg(statistics, tmp_path):
    draw(statistics, tmp_path / "p.svg", "a <title> & more")
    root = ET.fromstring((tmp_path / "p.svg").read_text())
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts[0] == "a <title> & more"
    assert "3 layers x 16 experts, top 4; 40 steps, 120 events (0 prefill)" in texts[1]
    for word in ("Share", "Experts in common", "Working set", "Reuse", "Union"):
        assert any(text.startswith(word) for text in texts)
    bars = [r for r in root.iter(f"{SVG}rect") if r.get("fill") == "#2f6fb4"]
    heights = [float(bar.get("height")) for bar in bars]
    # Three layers' top tenths, three overlaps, one union; in units of the plots' height.
    height = (800 - 64) / 2 - 92
    expected = [layer.top_share for layer in statistics.layers]
    expected += [layer.overlap for layer in statistics.layers]
    expected += [union.mean_experts / 16 for union in statistics.unions]
    assert heights == pytest.approx([share * height for share in expected], abs=0.06)
    for line in root.iter(f"{SVG}polyline"):
        points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        assert all(0 <= x <= 1260 and 0 <= y <= 800 for x, y in points)


def test_png_shows_the_same(statistics, tmp_path):
    draw(statistics, tmp_path / "p.png", "t")
    image = Image.open(io.BytesIO((tmp_path / "p.png").read_bytes()))
    assert image.size == (2520, 1600)
    blue = sum(count for count, colour in image.getcolors(1 << 20) if colour == (47, 111, 180))
    assert blue > 10_000


def test_without_pillow(statistics, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"fluxmoe\[report\].*\.svg"):
        draw(statistics, tmp_path / "p.png", "t")


def test_where_it_cannot_be_drawn(statistics, tmp_path):
    with pytest.raises(ConfigError, match=r"neither \.svg nor \.png"):
        draw(statistics, tmp_path / "p.pdf", "t")
    with pytest.raises(TraceError, match="cannot write the file"):
        draw(statistics, tmp_path / "no" / "p.svg", "t")
