"""Every page in Chromium, on a wide and a narrow window, in light and in dark colours.

The screenshots stay in $SCREENSHOTS if that names a folder. Without Chromium the tests
are skipped; `apt-get install chromium` installs it on Debian and Ubuntu.
"""

import os
from pathlib import Path

import browser
import pytest
from example_pages import PAGES

WINDOWS = {1400: 1000, 420: 900}  # heights by widths, in pixels
CONTRAST = 4.5  # of text with its ground, WCAG 2.1 AA
LETTERS = 80  # a line of prose, at most
BINARY = browser.executable()
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM"
)

PROBE = """
(async (least, most) => {
  const images = [...document.images];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  const name = image => image.alt || image.src.slice(0, 60);
  const root = document.documentElement;

  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const part = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(colour).map(part);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = element => {
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const pair = [luminance(ink), luminance(ground(element))].sort((a, b) => b - a);
    return (pair[0] + .05) / (pair[1] + .05);
  };

  const pale = [], wide = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, text = node.textContent.trim();
    if (!text || !node.parentElement.getClientRects().length) continue;
    const ratio = contrast(node.parentElement);
    if (ratio < least) pale.push(`${ratio.toFixed(2)}: ${text.slice(0, 60)}`);
  }
  for (const element of document.querySelectorAll("p, figcaption, li")) {
    const range = document.createRange();
    range.selectNodeContents(element);
    const ends = [...range.getClientRects()].map(box => Math.round(box.bottom));
    const text = element.innerText;
    const letters = text.length / Math.max(1, new Set(ends).size);
    if (letters > most) wide.push(`${letters.toFixed(0)}: ${text.slice(0, 60)}`);
  }
  return {
    overflow: Math.max(0, root.scrollWidth - innerWidth),
    broken: images.filter(image => !image.naturalWidth).map(name),
    unnamed: images.filter(image => !image.alt).length,
    pale, wide,
  };
})"""
PROBE += f"({CONTRAST}, {LETTERS})"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The file of each page, made when it is first asked for."""
    made: dict[str, Path] = {}

    def page(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            made[name] = PAGES[name](folder)
        return made[name]

    return page


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.running(BINARY, tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = os.environ.get("SCREENSHOTS")
    folder = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WINDOWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_window(name, width, scheme, pages, chromium, shots):
    chromium.show(pages(name), width=width, height=WINDOWS[width], scheme=scheme)
    seen = chromium.evaluate(PROBE)
    chromium.screenshot(shots / f"{name.replace(' ', '_')}-{width}-{scheme}.png")
    assert seen == dict(overflow=0, broken=[], unnamed=0, pale=[], wide=[])
    assert chromium.errors == []


def test_the_first_plot_or_picture_is_on_a_phones_first_screen(pages, chromium):
    chromium.show(pages("report"), width=420, height=WINDOWS[420], scheme="light")
    top = chromium.evaluate(
        "document.querySelector('img, svg').getBoundingClientRect().top"
    )
    assert top < WINDOWS[420] - 200


def test_tab_shows_where_the_focus_is(pages, chromium):
    chromium.show(pages("report"), width=1400, height=1000, scheme="dark")
    for kind in ("keyDown", "keyUp"):
        tab = dict(key="Tab", code="Tab", windowsVirtualKeyCode=9)
        chromium.ask("Input.dispatchKeyEvent", type=kind, **tab)
    style = chromium.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"


def test_the_probe_sees_what_is_wrong(tmp_path, chromium):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='background:#fff'><p style='color:#bbb'>pale</p>"
        "<img src='none.png' alt='gone'><div style='width:3000px'>wide</div>"
        f"<p style='width:2000px'>{'long lines are hard to read ' * 30}</p>"
    )
    chromium.show(page, width=420, height=900, scheme="light")
    seen = chromium.evaluate(PROBE)
    assert seen["overflow"] > 2000 and seen["broken"] == ["gone"]
    assert len(seen["pale"]) == 1 and len(seen["wide"]) == 1
    assert any("ERR_FILE_NOT_FOUND" in error for error in chromium.errors)
