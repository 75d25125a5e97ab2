"""The pages of a run, a sweep and a comparison in a browser, on phones and projectors."""

import json
import re

import pytest
from browser import CHROMIUM, Browser
from folders import FOLDERS

from mlvicx_dist.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: chromium)"),
]
PHONE, PROJECTOR = {"width": 390, "height": 844}, {"width": 1920, "height": 1080}
LEAST_CONTRAST = 4.5
"""Of text, as WCAG 2.2 has it (1.4.3)."""

# Charts that are not drawn yet in the colours and the size of the page as it is.
NOT_DRAWN = """
[...document.querySelectorAll(".chart .plot")].filter(plot => {
  const root = getComputedStyle(document.documentElement), drawn = plot._fullLayout;
  return !plot.querySelector(".main-svg") || drawn.paper_bgcolor !== root.getPropertyValue("--card")
    || Math.abs(drawn.font.size - 0.75 * parseFloat(root.fontSize)) > 0.1
    || Math.abs(drawn.width - plot.clientWidth) > 1;
}).length
"""
# Charts that show nothing, whose axes have no title or labels, or whose text is cut off at a side.
POOR_CHARTS = """
[...document.querySelectorAll(".chart")].flatMap(chart => {
  const plot = chart.querySelector(".plot"), box = chart.getBoundingClientRect();
  const told = axis => plot.layout[axis].title.text || plot.layout[axis].autorange === "reversed"
    || plot.data.every(trace => typeof trace.y[0] === "string");
  const out = [...chart.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left || own.right > box.right
      || own.top < box.top || own.bottom > box.bottom);
  }).map(text => text.textContent);
  const shown = chart.querySelectorAll(".plot .trace, .plot .points path, .plot .point").length;
  const good = shown && told("xaxis") && told("yaxis") && plot.ariaLabel.length > 20 && !out.length;
  return good ? [] : [[chart.querySelector("h3").textContent, shown, out]];
})
"""
# What is not told to those who do not see it, or not reached by those without a mouse.
OUT_OF_REACH = """
[
  ...[...document.images].filter(image => !image.alt || !image.naturalWidth),
  ...[...document.querySelectorAll("table")].filter(table => !table.ariaLabel
    || table.rows.length < 2 || [...table.rows[0].cells].some(cell => cell.scope !== "col")
    || [...table.tBodies[0].rows].some(row => row.cells[0].scope !== "row")),
  ...[...document.querySelectorAll("main *")].filter(one =>
    ["auto", "scroll"].includes(getComputedStyle(one).overflowX)
    && one.scrollWidth > one.clientWidth && one.tabIndex < 0),
].map(one => one.outerHTML.slice(0, 200))
"""
# A place of each chart at which it draws something, scrolled to.
POINT = """
(k => {
  const plot = document.querySelectorAll(".chart .plot")[k];
  plot.scrollIntoView({block: "center"});
  const {xaxis, yaxis} = plot._fullLayout, box = plot.getBoundingClientRect();
  const trace = plot.data.find(one => one.x.length), at = Math.floor(trace.x.length / 2);
  const x = trace.type !== "bar" ? trace.x[at] : (trace.base?.[at] ?? 0) + trace.x[at] / 2;
  return [box.left + xaxis._offset + xaxis.d2p(x),
    box.top + yaxis._offset + yaxis.d2p(trace.y[at])];
})(%d)
"""
HOVERED = "document.querySelectorAll('.chart .plot')[%d].querySelector('.hoverlayer')?.textContent"
# The least contrast of a text that is seen to what is behind it, and the text.
CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = colour => rgba(colour).slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const found = [...document.querySelectorAll("body *")].filter(one =>
    one.getClientRects().length && !one.closest("script, .hoverlayer")
    && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  return found.map(one => {
    const style = getComputedStyle(one), svg = one instanceof SVGElement;
    const [a, b] = [luminance(svg ? style.fill : style.color), luminance(behind(one))];
    const share = svg ? style.fillOpacity * style.opacity : style.opacity;
    const ratio = share < 1 ? 0 : (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return [ratio, one.textContent.trim()];
  }).sort((one, other) => one[0] - other[0]);
})()
"""


@pytest.fixture(scope="module")
def browser():
    one = Browser()
    one.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    yield one
    one.close()


@pytest.fixture(scope="module", params=list(FOLDERS))
def page(request, browser, phantom_shards, tmp_path_factory):
    folder = FOLDERS[request.param](tmp_path_factory.mktemp("pages") / "small", phantom_shards)
    one = browser.open(write_report(folder), **PHONE)
    one.until(f"{NOT_DRAWN} == 0")
    yield one
    one.close()


def show(page, window, *, dark):
    page.window(**window, dark=dark)
    page.until(f"{NOT_DRAWN} == 0")


def test_all_is_there_without_a_complaint_and_without_a_network(page):
    show(page, PHONE, dark=False)
    assert page.value("document.querySelectorAll('.chart').length") >= 4
    assert page.value("document.querySelectorAll('.table').length") >= 2
    assert page.value(POOR_CHARTS) == []
    assert page.value(OUT_OF_REACH) == []
    assert page.complaints() == []
    (address,) = page.requests()
    assert address.endswith("/report.html")


@pytest.mark.parametrize("window", [PHONE, PROJECTOR])
def test_nothing_is_wider_than_the_screen(page, window):
    show(page, window, dark=True)
    assert page.value("document.scrollingElement.scrollWidth - innerWidth") <= 0
    assert page.value(POOR_CHARTS) == []
    lines = "[...document.querySelectorAll('tbody th')].map(one => one.clientHeight"
    assert page.value(f"Math.max(...{lines} / parseFloat(getComputedStyle(one).fontSize)))") < 8
    if window is PROJECTOR:
        small = "[...document.querySelectorAll('td, p, text')].filter(one => one.textContent.trim()"
        sizes = f"{small}).map(one => parseFloat(getComputedStyle(one).fontSize))"
        assert page.value(f"Math.min(...{sizes})") > 15


def test_hovering_shows_a_value(page):
    show(page, PROJECTOR, dark=False)
    for k in range(page.value("document.querySelectorAll('.chart').length")):
        page.point(0, 0)
        page.until(f"!({HOVERED % k})")
        page.point(*page.value(POINT % k))
        page.until(HOVERED % k)
        assert re.search(r"\d", page.value(HOVERED % k))
    assert page.complaints() == []


def test_tables_can_be_copied_without_a_mouse(page):
    """Those of the page, and that of a chart's values, which comes when it is asked for."""
    page.value("document.querySelector('.values summary').focus()")
    page.enter()
    page.until("document.querySelector('.values table')")
    for where in (".table", ".values"):
        page.value(f"document.querySelector('{where} button').focus()")
        page.enter()
        page.until(f"document.querySelector('{where} button').textContent == 'Copied'")
        text = page.value("navigator.clipboard.readText()")
        cells = page.value(
            f"[...document.querySelector('{where} table').rows].map(row =>"
            " [...row.cells].map(cell => cell.innerText.trim()))"
        )
        assert len(cells) > 1 and [row.split("\t") for row in text.splitlines()] == cells


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(page, dark):
    show(page, PHONE, dark=dark)
    texts = page.value(CONTRAST)
    assert len(texts) > 100
    assert [one for one in texts if one[0] < LEAST_CONTRAST] == [], json.dumps(texts[:5])
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
