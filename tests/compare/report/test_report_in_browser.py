"""The page as a browser shows it: what it has parsed, and what it has painted."""

import json
import re
import shutil
import subprocess
from html import unescape
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from ctkd.compare.analysis.analyze import analyze
from ctkd.compare.report import drawing
from ctkd.compare.report.report import write_report
from tests.compare.fake_comparison import METHODS, fake_comparison

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
WIDTH = 900
# More than any page here needs.
HEIGHT = 9000
PICTURES = ["picture-metric", "picture-learning-curves", "picture-equal-effort", "picture-costs"]
# Only in the tests' copy of a page: puts into it where its pictures lie.
PROBE = """<script>addEventListener('load', () => {
const boxes = {
  height: document.body.getBoundingClientRect().bottom + scrollY, wide: document.body.scrollWidth,
};
for (const one of document.querySelectorAll('figure')) {
  const svg = one.querySelector('svg'), box = svg.getBoundingClientRect();
  boxes[one.id] = [box.left, box.top + scrollY, box.right, box.bottom + scrollY];
}
const found = document.createElement('output');
found.textContent = JSON.stringify(boxes);
document.body.append(found);
})</script></body>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Painted(NamedTuple):
    """A page as it was shown."""

    pixels: np.ndarray
    boxes: dict
    wide: float
    dom: str


class Browser:
    """Shows pages without a window, each time with a fresh profile."""

    def __init__(self, folder):
        self.folder = folder
        self.count = 0

    def run(self, page, *options, dark=False):
        self.count += 1
        profile = self.folder / f"profile{self.count}"
        file = self.folder / f"page{self.count}.html"
        file.write_text(page, encoding="utf-8")
        scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
        done = subprocess.run(
            [CHROMIUM, *FLAGS, scheme, f"--user-data-dir={profile}",
             f"--window-size={WIDTH},{HEIGHT}", *options, file.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        shutil.rmtree(profile, ignore_errors=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def parsed(self, page):
        return self.run(page, "--dump-dom")

    def painted(self, page, *, dark=False):
        """The page's pixels, where its pictures lie in them, its width, and what was parsed."""
        shot = self.folder / f"shot{self.count}.png"
        probed = page.replace("</body>", PROBE)
        dom = self.run(probed, "--dump-dom", f"--screenshot={shot}", dark=dark)
        boxes = json.loads(unescape(re.search(r"<output>(.*?)</output>", dom).group(1)))
        assert 1000 < boxes.pop("height") < HEIGHT
        with Image.open(shot) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        return Painted(pixels, boxes, boxes.pop("wide"), dom)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(fake_comparison(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def painted(browser, page):
    """The page as it is, shown once."""
    return browser.painted(page)


def written(comparison, folder):
    analysis = analyze(comparison, resamples=200)
    return write_report(comparison, analysis, folder).read_text(encoding="utf-8")


def check_picture(name, pixels, boxes, *, dark=False):
    """A picture is as large as it should be, and has ink and every method's colour in it."""
    assert name in boxes, f"{name} is missing"
    left, top, right, bottom = boxes[name]
    assert right - left > 500 and bottom - top > 150, f"{name} has no room"
    region = pixels[round(top) : round(bottom), round(left) : round(right)]
    for colour in (drawing.INK, *drawing.colors_of(METHODS).values()):
        shown = drawing.DARK[colour] if dark else colour
        count = np.all(region == rgb(shown), axis=-1).sum()
        assert count >= 20, f"{name} shows {count} pixels of {shown}"
    paper = rgb(drawing.DARK[drawing.PAPER] if dark else drawing.PAPER)
    share = 1 - np.all(region == paper, axis=-1).mean()
    assert 0.02 < share < 0.6, f"{name} is covered to {share:.1%}"


def rgb(colour):
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def changed(page, name, change):
    """The page with the inside of one picture's SVG changed."""
    pattern = rf'(<figure id="{name}">.*?<svg[^>]*>)(.*?)(</svg>)'
    found = re.search(pattern, page, flags=re.DOTALL)
    return page[: found.start(2)] + change(found.group(2)) + page[found.end(2) :]


def test_the_browser_has_parsed_what_was_written(page, painted):
    dom = painted.dom
    for title in re.findall(r"<h2>.*?</h2>", page):
        assert title in dom
    assert dom.count('role="img"') == 4
    assert dom.count("<tr>") == page.count("<tr>")
    assert dom.count("<path") == page.count("<path")
    assert dom.count("<use") == page.count("<use")


def test_every_picture_is_painted(painted):
    pixels, boxes = painted.pixels, painted.boxes
    assert list(boxes) == PICTURES
    for name in PICTURES:
        check_picture(name, pixels, boxes)


def test_every_picture_is_painted_on_a_dark_page(browser, page):
    pixels, boxes, *_ = browser.painted(page, dark=True)
    for name in PICTURES:
        check_picture(name, pixels, boxes, dark=True)
    assert pixels[0, 0].tolist() == rgb(drawing.DARK[drawing.PAPER])


def test_blank_pictures_would_be_noticed(browser, page):
    for name in PICTURES:
        page = changed(page, name, lambda inside: "")
    pixels, boxes, *_ = browser.painted(page)
    for name in PICTURES:
        with pytest.raises(AssertionError, match=f"{name} shows 0 pixels"):
            check_picture(name, pixels, boxes)


def test_a_missing_a_hidden_and_a_picture_without_marks_would_be_noticed(browser, page):
    page = re.sub(r'<figure id="picture-equal-effort">.*?</figure>', "", page, flags=re.DOTALL)
    page = page.replace('<figure id="picture-costs"', '<figure hidden id="picture-costs"')
    page = changed(page, "picture-metric", lambda inside: inside.replace("href=", "data-href="))
    pixels, boxes, *_ = browser.painted(page)
    for name, told in (
        ("picture-equal-effort", "is missing"),
        ("picture-costs", "has no room"),
        ("picture-metric", "shows 0 pixels"),
    ):
        with pytest.raises(AssertionError, match=f"{name} {told}"):
            check_picture(name, pixels, boxes)
    check_picture("picture-learning-curves", pixels, boxes)


def test_hostile_texts_are_no_elements_and_run_nothing(browser, tmp_path):
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    dom = browser.parsed(written(fake_comparison(methods=("sft", hostile), seeds=(0,)), tmp_path))
    assert "<img" not in dom and "<script" not in dom
    assert "<title>run" not in dom
    assert "demonstration, no ranking" in dom


def test_nothing_is_wider_than_the_page(painted):
    assert 0 < painted.wide <= WIDTH
