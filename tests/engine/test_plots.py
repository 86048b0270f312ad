import json

import pytest

from engine.plots import plot_curves, smooth
from engine.tracker import read_metrics


def test_smoothing_starts_at_the_first_value_and_follows_a_constant():
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    smoothed = smooth([0.0] * 5 + [1.0] * 50)
    assert smoothed[:5] == [0.0] * 5
    assert 0 < smoothed[5] < smoothed[20] < smoothed[-1] < 1


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
