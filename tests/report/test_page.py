"""Charts as SVG, PNG and HTML; the whole page in a browser."""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rarefy.errors import RarefyError
from rarefy.report.chart import HeatMap, Line, LineChart, Section
from rarefy.report.page import page, table_of
from rarefy.report.png import save_png
from rarefy.report.run_data import Run
from rarefy.report.sections import headlines, sections_of
from rarefy.report.series import Series
from rarefy.report.svg import Frame, heat_map, line_chart, picture_of
from tiny_run import rarefy

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ),
]
NOISY = Series.of(range(10_000), np.sin(np.arange(10_000)) + 2).thinned()
LINES = LineChart(
    "k", "A <b> title", [Line("noisy", NOISY), Line("held", Series.of([0, 50], [1, 2]), "steps", True)]
)
HEAT = HeatMap("h", "heat", ["a", "b"], ["1", "2"], np.array([[0.0, 0.5], [np.nan, 1.0]]))


class Wellformed(HTMLParser):
    """Notes tags that are not closed in order."""

    VOID = frozenset({"meta", "line", "rect", "path", "circle", "image", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_a_drawing_has_a_name_a_description_a_band_and_a_staircase() -> None:
    drawing = line_chart(LINES, "falls & rises")
    assert "<title>A &lt;b&gt; title</title><desc>falls &amp; rises</desc>" in drawing
    assert 'role="img" aria-label="A &lt;b&gt; title. falls &amp; rises"' in drawing
    assert drawing.count('class="band c0"') == 1 and 'class="line c1 dashed"' in drawing
    corners = re.findall(r"[\d.]+ [\d.]+", drawing.rsplit('d="', 1)[1])
    assert len(corners) == 3


def test_one_point_is_a_dot_and_a_constant_has_an_axis() -> None:
    one = LineChart("k", "t", [Line("l", Series.of([5], [3.0]))])
    assert line_chart(one, "").count("<circle") == 1
    flat = LineChart("k", "t", [Line("l", Series.of([0, 1], [0.0, 0.0]))])
    assert flat.axis[0] < 0 < flat.axis[1] and 'class="tick"' in line_chart(flat, "")


def test_a_wide_spread_gets_a_logarithmic_axis() -> None:
    chart = LineChart("k", "t", [Line("l", Series.of([0, 1, 2], [0.01, 1.0, 100.0]))])
    frame = Frame.of(chart)
    middle = (frame.y(0.01) + frame.y(100.0)) / 2
    both = np.array([1.0, 2.0])
    outlier = Series(both, both, np.array([1e-6, 1]), np.array([2.0, 2]), np.ones(2))
    assert not LineChart("k", "t", [Line("l", outlier)]).is_logarithmic
    assert chart.is_logarithmic and frame.y(1.0) == pytest.approx(middle) and frame.value_ticks[0] == 0.01


def test_the_opacity_of_a_cell_is_its_value() -> None:
    data = base64.b64decode(picture_of(HEAT).partition(",")[2])
    pixels = zlib.decompress(data[data.index(b"IDAT") + 4 :])
    opacity = [pixels[row * 9 + 1 + column * 4 + 3] for row in range(2) for column in range(2)]
    assert opacity == [14, round(14 + 241 * 0.5), 0, 255]
    assert 'href="data:image/png;base64,' in heat_map(HEAT, "")


def test_hundreds_of_rows_stay_small() -> None:
    names = [f"layers.{row}.weight" for row in range(400)]
    columns = [str(step) for step in range(96)]
    chart = HeatMap("h", "heat", names, columns, np.random.default_rng(0).random((400, 96)))
    text = page("p", [], [Section("s", "S", charts=[chart])])
    assert len(text) < 600_000 and heat_map(chart, "").count('class="row"') == 134


def test_tables_say_what_drawings_show() -> None:
    assert table_of(LINES).rows[-1] == (f"{NOISY.steps[-1]:,.0f}", f"{NOISY.last:.4g}", "2")
    assert len(table_of(LINES).rows) == 40
    assert list(table_of(HEAT).rows) == [("a", "0%", "50%"), ("b", "", "100%")]


def test_text_of_users_is_never_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    chart = LineChart("k", evil, [Line(evil, NOISY)])
    heat = HeatMap("h", evil, [evil], [evil], np.ones((1, 1)))
    section = Section("s", evil, [evil], [chart, heat], missing=[evil], source=evil)
    assert "<script>alert" not in page(evil, [(evil, evil)], [section], evil)


@pytest.fixture(scope="session")
def html(logged: Run) -> str:
    return page("a run", headlines(logged), sections_of(logged), "foot")


def test_a_page_is_well_formed_and_refers_to_nothing_outside(html: str) -> None:
    parsed = Wellformed(html)
    assert parsed.wrong == [] and parsed.open == []
    assert "://" not in html and "@import" not in html and html.count("url(") == 0
    assert "default-src 'none'" in html


def test_a_png_of_every_chart(logged: Run, tmp_path: Path) -> None:
    charts = [chart for section in sections_of(logged) for chart in section.charts]
    save_png([*charts, LINES, HEAT], tmp_path / "new" / "all.png", title="all")
    data = (tmp_path / "new" / "all.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:4] == b"\x89PNG" and width == 960 and height > 9 * 200


def test_a_png_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RarefyError, match=r"file/a\.png: cannot be written: .*; free space or fix"):
        save_png([HEAT], tmp_path / "file" / "a.png")


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RarefyError, match=r"pip install 'rarefy\[plot\]'"):
        save_png([HEAT], tmp_path / "a.png")


PROBE = """<script>
const failures = [];
window.addEventListener("error", (event) => failures.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => failures.push("refused " + event.blockedURI));
window.addEventListener("load", () => {
  const said = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect();
    const at = { clientX: box.left + box.width * 0.7, clientY: box.top + box.height * 0.4, bubbles: true };
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    said.push(document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent);
  }
  const column = () => [...document.querySelectorAll("#parameters tbody tr")].map((row) => row.cells[4].textContent);
  const click = () => document.querySelectorAll("#parameters th button")[4].click();
  click(); const rising = column(); click(); const falling = column();
  const images = [...document.querySelectorAll("svg image")].map((one) => one.getBoundingClientRect().width);
  const wide = document.documentElement.scrollWidth > window.innerWidth;
  const height = (one) => parseFloat(getComputedStyle(one).fontSize) * (one.ownerSVGElement?.getScreenCTM().a ?? 1);
  const written = "p, td, th, li, figcaption, svg text";
  const texts = [...document.querySelectorAll(written)].filter((one) => one.textContent.trim());
  const small = [...new Set(texts.filter((one) => height(one) < 7).map((one) => one.textContent + " " + height(one)))];
  const seen = { failures, small, said, rising, falling, images, wide, ready: document.documentElement.dataset.ready,
    loaded: performance.getEntriesByType("resource").map((one) => one.name).filter((one) => !one.startsWith("data:")) };
  document.documentElement.dataset.seen = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
});
</script>"""

NARROW = """<!doctype html><iframe id="f" style="width:390px;height:2000px;border:0"></iframe><script>
const frame = document.getElementById("f");
frame.srcdoc = PAGE;
const wait = setInterval(() => {
  const seen = frame.contentDocument.documentElement.dataset.seen;
  if (seen) { document.documentElement.dataset.seen = seen; clearInterval(wait); }
}, 50);
</script>"""


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium here (Debian: apt-get install chromium)"
)


@needs_browser
@pytest.mark.parametrize("width", [1100, 500])
def test_in_a_browser(logged_dir: Path, tmp_path: Path, width: int) -> None:
    assert rarefy("report", logged_dir, "-o", tmp_path / "report.html").exit_code == 0
    seen = look_at(tmp_path / "report.html", width)
    assert seen["failures"] == [] and seen["loaded"] == [] and seen["ready"] == "true"
    assert len(seen["said"]) == 10 and all(seen["said"]) and "step" in seen["said"][0]
    assert seen["rising"] == ["32", "64"] and seen["falling"] == ["64", "32"]
    assert len(seen["images"]) == 2 and min(seen["images"]) > 100 and not seen["wide"]


@needs_browser
def test_on_a_telephone(logged_dir: Path, tmp_path: Path) -> None:
    assert rarefy("report", logged_dir, "-o", tmp_path / "report.html").exit_code == 0
    page = json.dumps((tmp_path / "report.html").read_text().replace("<title>", f"{PROBE}<title>", 1))
    # a window is at least 500 wide, a frame is not; `</` would end the script around it
    frame = NARROW.replace("PAGE", page.replace("</", "<\\/"))
    (tmp_path / "frame.html").write_text(frame)
    seen = seen_in(tmp_path / "frame.html", 800)
    assert seen["failures"] == [] and seen["ready"] == "true"
    assert not seen["wide"] and min(seen["images"]) > 100 and all(seen["said"])
    assert seen["small"] == []


@needs_browser
def test_the_browser_would_notice_a_request_and_an_error(html: str, tmp_path: Path) -> None:
    broken = '<img src="https://example.invalid/a.png"><script>nonsense()</script></main>'
    (tmp_path / "broken.html").write_text(html.replace("</main>", broken))
    failures = look_at(tmp_path / "broken.html", 1100)["failures"]
    assert any("refused https://example.invalid" in text for text in failures)
    assert any("nonsense is not defined" in text for text in failures)


def look_at(path: Path, width: int) -> dict:
    """What a page finds out about itself in a browser without a network."""
    probed = path.with_name("probed.html")
    probed.write_text(path.read_text().replace("<title>", f"{PROBE}<title>", 1))
    return seen_in(probed, width)


def seen_in(path: Path, width: int) -> dict:
    """What the probe of a page, or of the frame in it, has found."""
    own = [f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},2000"]
    command = [str(BROWSER), *FLAGS, *own, path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    found = re.search(r'data-seen="([^"]+)"', dom)
    assert found, dom[-2000:]
    return json.loads(base64.b64decode(found[1]))
