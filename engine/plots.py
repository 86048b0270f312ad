"""curves.png: the numbers of a run in one picture, drawn from its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

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
SMOOTHING = 0.9  # of the exponential moving average over a noisy curve


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias towards its start (as Adam corrects it)."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed


def draw(axis, metrics: list[dict], title: str, names: list[str]):
    """One panel: training faint and smoothed, validation with a marker at each point."""
    for name in names:
        points = [(m["step"], m[name]) for m in metrics if name in m]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if name.startswith("val/"):
            axis.plot(steps, values, "o-", markersize=4, color="tab:red", label=name)
        elif name == "train/learning_rate" or len(points) < 10:
            axis.plot(steps, values, label=name)
        else:
            (line,) = axis.plot(steps, smooth(values), label=f"{name} (smoothed)")
            axis.plot(steps, values, alpha=0.25, color=line.get_color(), linewidth=0.8)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def plot_curves(run_folder: Path) -> Path:
    """Draw the curves of a run into its folder. Returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(run_folder / "metrics.jsonl")
    panels = PREFERENCE_PANELS if any("rewards/margins" in m for m in metrics) else PANELS
    rows = len(panels) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.5 * rows), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        draw(axis, metrics, title, names)
    path = run_folder / "curves.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
