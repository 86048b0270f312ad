"""The numbers of runs as pictures, drawn from metrics.jsonl: curves.png, and SVG for pages."""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.tracker import read_metrics

PANELS = [
    ("loss, nats per token", ["train/loss", "val/loss"]),
    ("learning rate", ["train/learning_rate"]),
    ("gradient norm", ["train/grad_norm"]),
    ("tokens per second", ["train/tokens_per_second"]),
]
PREFERENCE_PANELS = [
    ("DPO loss, nats per pair", ["train/loss", "val/loss"]),
    ("rewards", ["rewards/chosen", "rewards/rejected"]),
    ("reward margin", ["rewards/margins", "val/rewards/margins"]),
    ("reward accuracy", ["rewards/accuracies", "val/rewards/accuracies"]),
    ("log-prob of an answer, nats", ["logps/chosen", "logps/rejected"]),
    *PANELS[1:],
]
AXES = ("step", "tokens", "hours")
SMOOTHING = 0.03  # of the run: how far the moving average over a noisy curve looks back
MOST_POINTS = 1000  # of one curve in a picture, which is 500 pixels wide


def panels_of(runs: Sequence[list[dict]]) -> list[tuple[str, list[str]]]:
    has_preferences = any("rewards/margins" in m for metrics in runs for m in metrics)
    return PREFERENCE_PANELS if has_preferences else PANELS


def smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Exponential moving average, without the bias towards its start (as Adam corrects it).

    It looks back by a share of the run, not by a number of points: these may be far apart.
    """
    reach = SMOOTHING * (x[-1] - x[0]) or 1.0
    average, weight, smoothed = 0.0, 0.0, np.empty(len(y))
    for place, value in enumerate(y):
        since = max(x[place] - x[place - 1], 0.0) if place else reach
        keep = math.exp(-since / reach)
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed[place] = average / weight
    return smoothed


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of a curve: of each piece the lowest and the highest. Spikes stay."""
    if len(y) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(y), MOST_POINTS // 2 + 1).astype(int)
    kept = set()
    for start, end in itertools.pairwise(edges):
        kept |= {start + int(y[start:end].argmin()), start + int(y[start:end].argmax())}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def positions(metrics: list[dict], steps: Sequence[int], axis: str) -> np.ndarray:
    """Where steps stand on an axis: "step", "tokens" seen so far, or "hours" of training so far.

    Hours are the tokens since the line before over their tokens per second: validation, samples,
    saves and the nights between two starts of a run do not count.
    """
    if axis == "step":
        return np.array(steps, dtype=float)
    known, tokens, hours = [0], [0.0], [0.0]
    for m in metrics:
        if m.get("train/tokens_seen", 0) > tokens[-1]:
            seconds = (m["train/tokens_seen"] - tokens[-1]) / m["train/tokens_per_second"]
            known.append(m["step"])
            tokens.append(m["train/tokens_seen"])
            hours.append(hours[-1] + seconds / 3600)
    return np.interp(steps, known, tokens if axis == "tokens" else hours)


def draw(panel, runs: Sequence[list[dict]], names: list[str], axis: str = "step"):
    """One panel: training faint and smoothed, validation with a marker at each point.

    Of one run each metric has a colour. Of several each run has one, C0, C1 and so on.
    """
    labelled = set()
    for number, metrics in enumerate(runs):
        for place, name in enumerate(names):
            found = [m for m in metrics if name in m and math.isfinite(m[name])]  # fp16: inf
            if not found:
                continue
            x = positions(metrics, [m["step"] for m in found], axis)
            values = np.array([m[name] for m in found], dtype=float)
            color = f"C{number if len(runs) > 1 else place}"
            label = None if name in labelled else name
            labelled.add(name)
            if name.startswith("val/"):
                color = color if len(runs) > 1 else "tab:red"
                panel.plot(x, values, "o-", markersize=4, color=color, label=label)
            elif name == "train/learning_rate" or len(found) < 10:
                panel.plot(*thin(x, values), color=color, label=label)
            else:
                style = "--" if place else "-"
                label = label and f"{name} (smoothed)"
                panel.plot(*thin(x, smooth(x, values)), style, color=color, label=label)
                panel.plot(*thin(x, values), alpha=0.25, color=color, linewidth=0.8)
    panel.locator_params(nbins=5)  # half of the time of a picture goes into ticks
    panel.set_xlabel(axis)
    panel.grid(alpha=0.3)
    if panel.lines:
        panel.legend(fontsize=8)


def make_panels(width: float, height: float, rows: int = 1, columns: int = 1):
    """(figure of so many inches, its panels). The room around them is fixed.

    To find it, a layout by matplotlib draws everything once more.
    """
    from matplotlib.figure import Figure

    above, below = 0.35, 0.5  # inches: a title; an axis with its name
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=0.65 / width,
        right=1 - 0.15 / width,
        bottom=below / height,
        top=1 - above / height,
        wspace=0.18,
        hspace=(above + below) / (height / rows - above - below),
    )
    return figure, figure.subplots(rows, columns, squeeze=False).flat


def plot_curves(run_folder: Path) -> Path:
    """Draw the curves of a run into its folder. Returns the picture's path."""
    runs = [read_metrics(run_folder / "metrics.jsonl")]
    panels = panels_of(runs)
    rows = len(panels) // 2
    figure, places = make_panels(11, 3.5 * rows, rows, columns=2)
    for panel, (title, names) in zip(places, panels, strict=True):
        draw(panel, runs, names)
        panel.set_title(title, y=1)  # as without a y, but no ticks are measured to find it
    path = run_folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def draw_svg(runs: Sequence[list[dict]], names: list[str], axis: str) -> str:
    """One panel as an SVG. It holds numbers and the metrics' names, no text from elsewhere."""
    import matplotlib

    figure, [panel] = make_panels(5.5, 3.2)
    draw(panel, runs, names, axis)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as text, not as paths
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
