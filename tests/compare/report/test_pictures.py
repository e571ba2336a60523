import dataclasses
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctkd.compare.analysis.analyze import analyze
from ctkd.compare.report import drawing, pictures
from ctkd.compare.report.drawing import METHOD_COLORS, colors_of, short_names, spread
from ctkd.compare.report.pictures import Curve, last_common, mean_at
from tests.compare.fake_comparison import (
    METHODS,
    fake_comparison,
    with_nan,
    without_eval_ce,
)

EIGHT = (
    "sft",
    "seqkd",
    "uld kd_weight=0.15",
    "uld kd_weight=1.5",
    "mined",
    "multilevelot kd_weight=0.15",
    "multilevelot kd_weight=1.5",
    "a very long name of a method, with $math$ & <b>",
)
# Two labels of 9 points need this much from one baseline to the next.
LINE = 10.5


def draw(comparison):
    """All pictures by name."""
    analysis = analyze(comparison, resamples=200)
    return {
        "metric": pictures.metric_intervals(comparison, analysis),
        "curves": pictures.learning_curves(comparison),
        "effort": pictures.equal_effort(comparison),
        "costs": pictures.costs(comparison, analysis),
    }


@functools.cache
def drawn(case):
    """The pictures of one of the cases below, drawn once."""
    return draw(CASES[case]())


def texts(picture):
    """What can be read in a picture, each with its place."""
    root = ElementTree.fromstring(picture)
    found = []
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        style = element.get("style") or ""
        place = re.search(r"(?:rotate|translate)\(([-\d. ]+)\)", element.get("transform") or "")
        numbers = [float(one) for one in place.group(1).split()] if place else []
        x, y = numbers[-2:] if numbers else (float(element.get("x")), float(element.get("y")))
        found.append(("".join(element.itertext()), x, y, style))
    return found


def words(picture):
    return [text for text, *_ in texts(picture)]


CASES = {
    "as usual": lambda: fake_comparison(),
    "one method": lambda: fake_comparison(methods=("sft",), seeds=(0,)),
    "one seed": lambda: fake_comparison(seeds=(3,)),
    "eight methods": lambda: fake_comparison(methods=EIGHT, gain=0.3),
    "no held-out values": lambda: fake_comparison(eval_steps=None),
    "one without held-out values": lambda: without_eval_ce(fake_comparison(), "mined"),
    "nan in one": lambda: with_nan(fake_comparison(), "multilevelot", after=20),
    "nan in all": lambda: with_nan(fake_comparison(), *METHODS, after=-1),
    "one step": lambda: fake_comparison(steps=1, logging_steps=1, eval_steps=1),
    "one group": lambda: fake_comparison(groups=1),
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_drawn_and_names_every_method_wherever_it_has_values(case):
    names = short_names(CASES[case]().methods).values()
    for name in names:
        for picture in ("metric", "costs"):
            assert name in words(drawn(case)[picture])
    for picture in drawn(case).values():
        assert "<path" in picture or "No finite" in picture


@pytest.mark.parametrize("name", ["curves", "effort"])
def test_labels_beside_lines_do_not_lie_over_each_other(name):
    picture = drawn("eight methods")[name]
    starts = tuple(short_names(EIGHT).values())
    labels = [(x, y) for text, x, y, _ in texts(picture) if text.startswith(starts)]
    assert len(labels) == 16
    first = sorted(y for _, y in labels[:8])
    second = sorted(y for _, y in labels[8:])
    for below in (first, second):
        assert min(np.diff(below)) > LINE


def test_equal_records_give_equal_files_in_every_process():
    program = (
        "from tests.compare.fake_comparison import fake_comparison;"
        "from ctkd.compare.report.pictures import learning_curves;"
        "import hashlib;"
        "print(hashlib.sha256(learning_curves(fake_comparison()).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    ours = hashlib.sha256(pictures.learning_curves(fake_comparison()).encode()).hexdigest()
    assert done.stdout.strip() == ours
    picture = drawn("as usual")["metric"]
    assert not re.search(r"\d{4}-\d\d-\d\d|matplotlib\.org|Matplotlib v", picture)


def test_no_id_is_in_two_pictures_and_every_reference_has_one():
    usual = drawn("as usual").values()
    ids = [set(re.findall(r'\bid="([^"]+)"', picture)) for picture in usual]
    for one, other in itertools.combinations(ids, 2):
        assert not one & other
    for own, picture in zip(ids, usual, strict=True):
        named = re.findall(r'(?:href="|url\()#([^")]+)', picture)
        assert named and set(named) <= own


def test_a_method_has_one_colour_in_all_pictures():
    for picture in drawn("as usual").values():
        for colour in colors_of(METHODS).values():
            assert colour in picture


def test_values_at_the_last_common_step_and_second_are_printed():
    comparison = fake_comparison()
    steps, seconds = {}, {}
    last = min(record.seconds for record in comparison.finals)
    for record in comparison.finals:
        rows = [row for row in record.history if "eval_ce" in row]
        times, losses = [row["seconds"] for row in rows], [row["eval_ce"] for row in rows]
        steps.setdefault(record.method, []).append(losses[-1])
        seconds.setdefault(record.method, []).append(np.interp(last, times, losses))
    read = words(pictures.equal_effort(comparison))
    for method, name in short_names(METHODS).items():
        assert f"{name} {np.mean(steps[method]):.3f}" in read
        assert f"{name} {np.mean(seconds[method]):.3f}" in read
    assert "At equal steps: values at step 60" in read
    assert "At equal training time: values at second 24" in read


def test_a_run_that_broke_down_does_not_end_the_comparison_of_the_others():
    read = words(drawn("nan in one")["effort"])
    assert "At equal steps: values at step 60" in read
    assert "multilevelot –" in read
    assert any(text.startswith("not finite, left out: 12") for text in read)


def test_what_is_missing_is_said():
    read = words(drawn("one without held-out values")["effort"])
    assert any("no values: mined" in text for text in read)
    assert words(drawn("no held-out values")["effort"]) == [
        "No finite held-out cross-entropy was logged."
    ]
    assert words(drawn("nan in all")["curves"]) == ["No finite cross-entropy was logged."]


def test_what_was_not_measured_has_no_bar_of_a_made_up_length():
    comparison = fake_comparison(methods=("sft", "uld"))
    finals = tuple(dataclasses.replace(one, peak_memory=None) for one in comparison.finals)
    comparison = dataclasses.replace(comparison, finals=finals)
    read = words(pictures.costs(comparison, analyze(comparison, resamples=200)))
    assert read.count("not measured") == 2


def test_a_diverging_run_does_not_flatten_the_others():
    def diverged(row):
        return {**row, "eval_ce": 1e6} if "eval_ce" in row and row["step"] else row

    comparison = fake_comparison()
    finals = tuple(
        dataclasses.replace(record, history=tuple(map(diverged, record.history)))
        if (record.method, record.seed) == ("mined", 0)
        else record
        for record in comparison.finals
    )
    read = words(pictures.learning_curves(dataclasses.replace(comparison, finals=finals)))
    assert any("higher values are cut off" in text for text in read)
    assert not any(text.endswith("00000") for text in read)


def test_any_name_can_be_drawn():
    names = ["$x_1$", "<b>&amp;</b>", "\x1b[31m\x00", "\ud800", 'id="a"', "数据"]
    comparison = fake_comparison(methods=("sft", *names))
    shown = short_names(comparison.methods)
    for picture in draw(comparison).values():
        read = words(picture)
        for name in names:
            assert any(text.startswith(shown[name]) for text in read), name
        picture.encode()


def test_short_names_fit_and_stay_different():
    long = [f"multilevelot kd_weight=0.{digit * 30}5 of these" for digit in "123"]
    names = list(short_names(["sft", *long]).values())
    assert len(set(names)) == 4
    assert max(map(len, names)) <= 26


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_spread_keeps_order_and_distance(wished, gap):
    placed = spread(sorted(wished), gap)
    assert len(placed) == len(wished)
    assert all(b - a >= gap * (1 - 1e-9) for a, b in itertools.pairwise(placed))
    assert all(place >= -1e-9 for place in placed)


def test_spread_leaves_alone_what_has_room():
    assert spread([0.1, 0.5, 0.9], 0.2) == [0.1, 0.5, 0.9]


def test_places_in_common():
    early, late = Curve([0.0, 5.0], [3.0, 2.0]), Curve([6.0, 9.0], [1.0, 1.0])
    assert last_common([early, late]) is None
    assert last_common([early, Curve([], [])]) == 5.0
    assert last_common([]) is None
    assert mean_at([early, late], 5.0) is None
    assert mean_at([early], 2.5) == 2.5
    assert mean_at([Curve([4.0], [1.5])], 4.0) == 1.5


DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
          [-0.011820, 0.042940, 0.968881]]  # fmt: skip
PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
          [-0.003882, -0.048116, 1.051998]]  # fmt: skip
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def linear(colour):
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(light):
    xyz = np.array(TO_XYZ) @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    bright, dim = sorted((float(np.dot(TO_XYZ[1], linear(c))) for c in (one, other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", [np.eye(3), DEUTAN, PROTAN], ids=["all", "deutan", "protan"])
def test_colours_of_methods_are_told_apart_by_most_eyes(dark, eyes):
    colours = [drawing.DARK[one] if dark else one for one in METHOD_COLORS]
    seen = [lab(np.array(eyes) @ linear(colour)) for colour in colours]
    # Okabe and Ito's eight come to 12 by this measure.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(dark):
    paper = drawing.DARK[drawing.PAPER] if dark else drawing.PAPER
    for colour in METHOD_COLORS:
        assert contrast(drawing.DARK[colour] if dark else colour, paper) >= 2.99
    for colour in (drawing.INK, drawing.FAINT, drawing.ALARM):
        assert contrast(drawing.DARK[colour] if dark else colour, paper) >= 4.5
