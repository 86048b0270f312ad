import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from engine import plots
from engine.plots import draw, draw_svg, plot_curves, positions, smooth, thin
from engine.tracker import read_metrics


def test_smoothing_starts_at_the_first_value_and_follows_a_constant():
    assert smooth(np.arange(3), np.full(3, 3.0)) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth(np.array([7]), np.array([2.0])).tolist() == [2.0]
    smoothed = smooth(np.arange(100), np.repeat([0.0, 1.0], [50, 50]))
    assert smoothed[:50].tolist() == [0.0] * 50
    assert 0 < smoothed[50] < smoothed[52] < smoothed[-1] < 1


def test_smoothing_is_the_same_where_a_run_was_logged_at_fewer_steps():
    """A moving average over points would show the start of such a run until its end."""
    steps = np.arange(1, 1001)
    values = 9 * np.exp(-steps / 300)
    few = [*range(10), *range(19, 1000, 20)]
    assert smooth(steps[few], values[few]) == pytest.approx(smooth(steps, values)[few], rel=0.06)


@pytest.mark.parametrize("extra", [{}, {"rewards/margins": 0.5, "rewards/accuracies": 0.7}])
def test_curves_are_drawn_for_every_stage(tmp_path, extra):
    lines = [
        {
            "step": s,
            "train/loss": 3 / s,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0,
            **extra,
        }
        for s in range(1, 30)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 29, "val/loss": 0.5}])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_curves(tmp_path).stat().st_size > 20_000


def test_a_run_with_hardly_any_metrics_is_drawn_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert read_metrics(tmp_path / "absent.jsonl") == []


# Two starts: the second goes on at step 20, in the middle of the first one's interval.
STARTS = [
    {"step": 10, "train/tokens_seen": 3600, "train/tokens_per_second": 1.0},
    {"step": 15, "val/loss": 1.0},
    {"step": 20, "train/tokens_seen": 10800, "train/tokens_per_second": 2.0},
]


def test_tokens_and_hours_are_found_between_the_lines_that_tell_them():
    steps = [0, 5, 10, 15, 20]
    assert positions(STARTS, steps, "step").tolist() == steps
    assert positions(STARTS, steps, "tokens").tolist() == [0, 1800, 3600, 7200, 10800]
    assert positions(STARTS, steps, "hours").tolist() == [0, 0.5, 1, 1.5, 2]


def test_a_thinned_curve_keeps_its_ends_nearly_and_every_spike():
    x = np.arange(100_000)
    y = np.ones(100_000)
    y[[777, 60_001]] = [9.0, -5.0]
    few_x, few_y = thin(x, y)
    assert len(few_x) <= plots.MOST_POINTS
    assert (np.diff(few_x) > 0).all()
    assert few_y[few_x == 777] == 9.0 and few_y[few_x == 60_001] == -5.0
    assert few_x[0] == 0 and few_x[-1] > 99_000
    assert thin(x[:10], y[:10])[0].tolist() == list(range(10))


def lines_of(runs, names=("train/loss", "val/loss"), axis="step"):
    panel = Figure().subplots()
    draw(panel, runs, list(names), axis)
    return panel.lines


def test_an_infinite_gradient_norm_of_fp16_spoils_no_curve():
    metrics = [{"step": s, "train/grad_norm": math.inf if s < 3 else 1.0} for s in range(1, 20)]
    smoothed, raw = lines_of([metrics], ["train/grad_norm"])
    assert smoothed.get_ydata().tolist() == pytest.approx([1.0] * 17)
    assert raw.get_xdata().tolist() == list(range(3, 20))


def test_each_of_several_runs_has_one_colour_and_a_metric_stands_in_the_legend_once():
    one = [{"step": s, "train/loss": 1 / s, "val/loss": 2 / s} for s in range(1, 5)]
    lines = lines_of([[], one, one])
    assert [line.get_color() for line in lines] == ["C1", "C1", "C2", "C2"]
    labels = [line.get_label() for line in lines]
    assert labels[:2] == ["train/loss", "val/loss"]
    assert all(text.startswith("_") for text in labels[2:])
    assert {line.get_color() for line in lines_of([one])} == {"C0", "tab:red"}


def test_a_panel_of_a_page_is_an_svg_with_letters_as_text():
    drawn = draw_svg([[{"step": 1, "train/loss": 2.0}]], ["train/loss"], "tokens")
    assert "<svg" in drawn and ">train/loss</text>" in drawn and ">tokens</text>" in drawn
