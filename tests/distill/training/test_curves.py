import math

import pytest
from matplotlib.figure import Figure

from ctkd.distill.training.curves import plot_curves
from ctkd.errors import OutputError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws a history and returns its panels by title; the figure as `draw.figure`."""
    save = Figure.savefig

    def keep(figure, *arguments, **settings):
        run.figure = figure
        return save(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)

    def run(history, **settings):
        path = tmp_path / "curves.png"
        plot_curves(history, path, **settings)
        assert path.read_bytes().startswith(PNG)
        return {axes.get_title(loc="left"): axes for axes in run.figure.axes}

    return run


def points(axes):
    """What the lines of a panel show, as lists of (step, value)."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines]


def legend(axes):
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def logged(steps, **keys):
    return [{"step": step, **{key: f(step) for key, f in keys.items()}} for step in steps]


FULL = [
    {"step": 0, "eval_ce": 3.0, "eval_kd": 1.5, "eval_kd/had": 1.0, "eval_kd/sl": 0.5},
    {
        "step": 1, "epoch": 0.5, "loss": 3.2, "ce": 2.9, "kd": 1.4, "kd/had": 0.9, "kd/sl": 0.5,
        "grad_norm": 2.0, "learning_rate": 1e-5,
    },
    {
        "step": 2, "epoch": 1.0, "loss": 2.2, "ce": 2.0, "kd": 1.0, "kd/had": 0.7, "kd/sl": 0.3,
        "grad_norm": 1.0, "learning_rate": 0.0,
    },
    {"step": 2, "eval_ce": 2.1, "eval_kd": 1.1, "eval_kd/had": 0.7, "eval_kd/sl": 0.4},
    {"step": 2, "train_runtime": 9.0, "train_loss": 2.7, "total_flos": 1e12},
]  # fmt: skip


def test_a_full_history(draw):
    panels = draw(FULL, title="student taught by teacher")
    assert list(panels) == [
        "Cross-entropy",
        "Distillation loss and its parts",
        "Learning rate",
        "Gradient norm",
    ]
    assert points(panels["Cross-entropy"]) == [[(1, 2.9), (2, 2.0)], [(0, 3.0), (2, 2.1)]]
    assert points(panels["Distillation loss and its parts"]) == [
        [(1, 1.4), (2, 1.0)],
        [(0, 1.5), (2, 1.1)],
        [(1, 0.9), (2, 0.7)],
        [(0, 1.0), (2, 0.7)],
        [(1, 0.5), (2, 0.3)],
        [(0, 0.5), (2, 0.4)],
    ]
    assert points(panels["Learning rate"]) == [[(1, 1e-5), (2, 0.0)]]
    assert points(panels["Gradient norm"]) == [[(1, 2.0), (2, 1.0)]]
    assert legend(panels["Cross-entropy"]) == ["training", "held out"]
    assert legend(panels["Distillation loss and its parts"]) == [
        "total", "had", "sl", "training", "held out",
    ]  # fmt: skip
    assert panels["Cross-entropy"].get_ylabel() == "nats per token"
    assert len({axes.get_xlim() for axes in panels.values()}) == 1
    assert draw.figure.get_suptitle() == "student taught by teacher"


def test_the_legend_lies_above_the_curves(draw):
    for axes in draw(FULL).values():
        box = axes.get_legend()
        if box is not None:
            bottom = box.get_window_extent().transformed(axes.transData.inverted()).y0
            assert bottom > max(value for line in points(axes) for _, value in line)


@pytest.mark.parametrize(
    ("row", "titles"),
    [
        ({"ce": 1.0, "loss": 2.0}, ["Cross-entropy"]),
        ({"loss": 2.0}, ["Training loss"]),
        ({"eval_loss": 2.0}, ["Training loss"]),
        ({"eval_ce": 2.0}, ["Cross-entropy"]),
        ({"kd": 1.0}, ["Distillation loss"]),
        ({"kd": 1.0, "kd/sorted": 1.0}, ["Distillation loss"]),
        ({"eval_kd/sorted": 1.0}, ["Distillation loss"]),
        ({"eval_kd/had": 1.0, "eval_kd/sl": 1.0}, ["Distillation loss and its parts"]),
        ({"ce": 1.0, "grad_norm": 1.0}, ["Cross-entropy", "Gradient norm"]),
        ({"learning_rate": 1.0}, ["Learning rate"]),
    ],
)
def test_panels_follow_what_was_logged(draw, row, titles):
    panels = draw([{"step": 3, **row}])
    assert list(panels) == titles
    for axes in panels.values():
        assert len(points(axes)[0]) == 1
        low, high = axes.get_xlim()
        assert low <= 2.5 and high >= 3.5


@pytest.mark.parametrize("history", [[], [{"step": 5, "train_runtime": 1.0}], [{"ce": 1.0}]])
def test_nothing_logged(draw, history):
    assert draw(history) == {}
    assert [text.get_text() for text in draw.figure.texts] == ["Nothing was logged."]


def test_many_values_are_averaged_and_stay_visible(draw):
    noise = [(-1) ** step for step in range(61)]
    panels = draw(logged(range(61), ce=lambda s: s + 4.0 * noise[s], learning_rate=float))
    raw, mean = points(panels["Cross-entropy"])
    assert raw == [(step, step + 4.0 * noise[step]) for step in range(61)]
    assert mean[0] == raw[0] and mean[-1] == raw[-1]
    # Two neighbours on either side: of five alternating signs one is left over.
    assert mean[30] == (30, pytest.approx(30 + 4 / 5))
    assert mean[1] == (1, pytest.approx(1 + 4 / 3))
    assert legend(panels["Cross-entropy"]) == ["training, running mean"]
    assert points(panels["Learning rate"]) == [[(step, step) for step in range(61)]]


def test_values_that_are_not_finite_are_left_out_and_counted(draw):
    history = logged(
        range(4), ce=lambda s: [1.0, math.nan, math.inf, 2.0][s], kd=lambda _: math.nan
    )
    panels = draw(history)
    assert points(panels["Cross-entropy"]) == [[(0, 1.0), (3, 2.0)]]
    assert panels["Cross-entropy"].get_title(loc="right") == "not finite, left out: 2"
    assert points(panels["Distillation loss"]) == []
    assert panels["Distillation loss"].get_title(loc="right") == "not finite, left out: 4"


def test_odd_rows_are_passed_over(draw):
    history = [
        {"step": 2, "ce": 1.0, "note": "text", "kd": None},
        {"step": 1, "ce": 5.0},
        {"step": 2, "ce": 3.0},
        {"step": None, "ce": 9.0},
    ]
    panels = draw(history)
    assert list(panels) == ["Cross-entropy"]
    assert points(panels["Cross-entropy"]) == [[(1, 5.0), (2, 3.0)]]


def test_names_are_shown_as_they_are(draw):
    row = {"step": 1, "kd": 3.0, "kd/$a$": 1.0, "kd/_b": 1.0, "kd/蒸馏": 1.0}
    panels = draw([row], title="costs $5, saves $6; 学生")
    (axes,) = panels.values()
    assert legend(axes)[:4] == ["total", "$a$", "_b", "蒸馏"]
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())


def test_more_parts_than_colours(draw):
    row = {f"kd/part{number}": float(number) for number in range(12)}
    (axes,) = draw([{"step": 1, **row}]).values()
    assert len(axes.lines) == 12


def test_equal_histories_give_equal_files_in_new_folders(tmp_path):
    first, second = tmp_path / "one" / "deep" / "a.png", tmp_path / "b"
    plot_curves(FULL, first)
    plot_curves(FULL, str(second))
    assert first.read_bytes() == second.read_bytes()


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot write the picture of the curves to .*: Is a dir"):
        plot_curves([], tmp_path)
