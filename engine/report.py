"""What a run tells while it trains: its log lines, its numbers, its samples, its curves."""

import contextlib
import json
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from engine import optim
from engine.advice import advise
from engine.cadence import Cadence
from engine.disk import write_whole
from engine.meter import Meter, active_parameters, flops_per_token, log_line
from engine.pages import write_report
from engine.plots import plot_curves
from engine.resuming import typed_command
from engine.runtime import Runtime
from engine.settings import length_key
from engine.steps import StepLoader
from engine.stop import GivenUp
from engine.tracker import Tracker
from engine.watchdog import Watchdog


class Log:
    """The log of one run: a context in which its clock runs and its progress bar is shown.

    On other ranks than the first it counts and writes nothing.
    """

    bar: tqdm

    def __init__(self, run, project_name, config, rt: Runtime, model, loader: StepLoader, tokens):
        self.rt, self.folder, self.total_steps = rt, run.folder, loader.total_steps
        self.tracker = Tracker(run, project_name, config, rt.extras) if rt.is_main else None
        flops = flops_per_token(model, config[length_key(config)]) / rt.world  # of each card
        self.meter = Meter(flops, loader.start_step, loader.total_steps, tokens, rt.device)
        self.watchdog = Watchdog(run.folder, rt.rank, rt.say)
        self.cadence = Cadence(config, loader, self.meter, rt)
        self.due = self.cadence.due

    def __enter__(self):
        hidden = not (self.rt.is_main and sys.stderr.isatty())
        start, total = self.meter.start_step, self.total_steps
        self.bar = tqdm(total=total, initial=start, disable=hidden, unit="step")
        for line in self.cadence.describe():
            self.rt.say(line)
        self.meter.start()
        self.watchdog.__enter__()
        return self

    def __exit__(self, *exception):
        self.watchdog.__exit__()
        self.bar.close()
        self.rt.say(f"Time of the loop: {self.meter.shares()}.")

    def count(self, num_tokens: int):
        """A step has ended."""
        self.meter.tokens_seen += num_tokens
        self.bar.update()
        self.watchdog.step()

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Time of a validation, samples or a save: "eval", "sample" or "save".

        A validation and samples end early when the run is asked to stop.
        """
        self.watchdog.pause()
        with self.meter.paused(kind), contextlib.suppress(GivenUp):
            yield
        self.watchdog.go_on()

    def train(self, metrics: dict, step: int, more: str = ""):
        """The numbers of a training step, and a line of them with `more` behind it."""
        metrics = metrics | self.meter.read(step)
        self._write(metrics, step)
        self.rt.say(log_line(metrics, step, self.total_steps) + more)

    def validation(self, metrics: dict, step: int):
        self._write(metrics, step)
        values = (f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())
        self.rt.say(f"step {step} | validation: " + " | ".join(values).replace("_", " "))

    def samples(self, prompts: list[str], samples: list[str], step: int):
        if self.tracker:
            self.tracker.log_samples(prompts, samples, step)
        for prompt, text in zip(prompts, samples, strict=True):
            self.rt.say(f"  {prompt.strip()} ⇒ {text.strip()}".replace("\n", " "))

    def _write(self, metrics: dict, step: int):
        if self.tracker:
            self.tracker.log(metrics, step)

    def describe(self, model, data_counts: dict):
        """description.json: what a page about the run tells beside its configuration and numbers.

        data_counts: what the preparation counted.
        """
        if self.rt.is_main:
            description = {
                "command": typed_command(),
                "total_steps": self.total_steps,
                "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
                "data": data_counts,
            }
            with self.rt.extras.attempt("description.json"):
                text = json.dumps(description, indent=1, ensure_ascii=False)
                write_whole(self.folder / "description.json", text)

    def draw(self):
        """curves.png and report.html."""
        if self.rt.is_main:
            with self.rt.extras.attempt("curves.png"):
                plot_curves(self.folder)
            with self.rt.extras.attempt("report.html"):
                write_report(self.folder)

    def state(self) -> dict:
        """What a checkpoint keeps of the log."""
        ids = self.tracker.ids if self.tracker else {}
        return {"tokens_seen": self.meter.tokens_seen, "tracker_ids": ids}

    def finish(self):
        """The end of a run: what could not be done is said again."""
        if self.tracker:
            self.tracker.finish()
        self.rt.extras.summarize()


def describe_run(config: dict, model, loader: StepLoader, rt: Runtime, trial=None) -> str:
    """The configuration in full, what it comes to, and advice.

    trial: (forward_backward, full_batch) of the stage, to count a step's memory.
    """
    total, active = sum(p.numel() for p in model.parameters()), active_parameters(model)
    order, tokens_per_step = loader.order, loader.tokens_per_step
    read = config | {"num_epochs": order.total_steps / order.steps_per_epoch}
    dtype = str(rt.dtype or torch.float32).removeprefix("torch.")
    lines = [f"  {key}: {value}" for key, value in config.items()]
    return "\n".join(
        [
            "Configuration",
            *lines,
            f"Model: {total:,} parameters ({active:,} active per token), {dtype} on "
            f"{rt.device}; up to {tokens_per_step:,} tokens per step, {order.steps_per_epoch:,} "
            f"steps per epoch, {order.total_steps:,} steps in all.",
            f"Peak {optim.describe_learning_rate(order.total_steps, tokens_per_step, config)}.",
            *advise(read, model, order.rows * loader.row_length, loader.row_length, rt, trial),
        ]
    )


def step_metrics(totals: dict, num_tokens: int, rt: Runtime) -> dict[str, float]:
    """A step's metrics, from steps.output_sums over its micro-batches. All ranks must call it.

    train/loss: nats per target. Of a mixture of experts also the balancing loss (1: balanced) and
    the largest share of tokens that one expert of one layer got.
    """
    metrics = {"train/loss": float(rt.sum(totals["loss"]))}
    if "expert_load" in totals:
        metrics["train/aux_loss"] = float(rt.sum(totals["aux_loss"]) / num_tokens)
        load = rt.sum(totals["expert_load"]) / num_tokens  # (layers, experts)
        metrics["train/max_expert_load"] = float(load.max())
    return metrics | scaler_metrics(rt)


def scaler_metrics(rt: Runtime) -> dict[str, float]:
    return {"train/loss_scale": rt.scaler.get_scale()} if rt.scaler.is_enabled() else {}
